"""Key-value caches of the language model: one with all its rows' memory, and one whose rows share their prompts.

A clip's visual tokens are most of a prompt. Several questions about it, or several beams, therefore fork the prompt's
cache: every row reads the same keys and values and owns only what comes behind them.

Shape letters: B rows, P prompts, T new positions, S slots, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from aurora.model.attention import attention, causal_mask
from aurora.model.llama import LlamaConfig

FEWEST_FOR_PRODUCTS = 512
"""Keys from which two plain products are used for one query on a CPU instead of PyTorch's fused attention: measured to
take 0.7 to 1.1 of its time in float32, 0.3 to 1.0 in bfloat16 (600 to 1,500 keys, 2 to 32 key heads, 1 to 16 rows)."""


class KVCache:
    """Keys and values of every layer in memory allocated once; slots fill from the left, alike in every row."""

    keys: Tensor
    """(layers, B, K, S, D)."""
    values: Tensor
    """(layers, B, K, S, D)."""
    length: int
    """Tokens cached in each row, those of a shared prompt included."""
    key_bias: Tensor | None
    """Added to the scores of each slot, (B, max_length) float32; behind a prompt it is 0. None: there is no bias."""

    def __init__(
        self, config: LlamaConfig, *, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """Allocate the cache.

        Args:
            config: Language model.
            batch_size: Rows B.
            max_length: Slots S; running past them is an error.
            device: Where the model is.
            dtype: Of keys and values.
        """
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.key_bias = None
        self._shared = 0  # tokens of each row that lie in another cache

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        """Tokens that fit in a row, those of a shared prompt included."""
        return self._shared + self.keys.shape[3]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the filled slots of one layer.

        `length` moves only with `advance`, after the last layer.

        Args:
            layer: Layer index.
            k: New keys, (B, T, K, D).
            v: New values, (B, T, K, D).

        Returns:
            Keys and values of the layer in this cache's own slots, the new ones last, (B, tokens, K, D), as views.

        Raises:
            ValueError: if the slots do not suffice.
        """
        start, end = self.length - self._shared, self.length - self._shared + k.shape[1]
        keys, values = self.keys[layer], self.values[layer]
        if end > keys.shape[2]:
            raise ValueError(f"KVCache: {end + self._shared} tokens, but it was made for {self.max_length}")
        keys.narrow(2, start, end - start).copy_(k.transpose(1, 2))
        values.narrow(2, start, end - start).copy_(v.transpose(1, 2))
        return keys.narrow(2, 0, end).transpose(1, 2), values.narrow(2, 0, end).transpose(1, 2)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        key_bias: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Cache new keys and values of one layer, and attend to all that are cached.

        Args:
            layer: Layer index.
            q: New queries, (B, T, H, D).
            k: New keys, (B, T, K, D).
            v: New values, (B, T, K, D).
            mask: True where a query may look, (B, T, length + T) bool. None: the causal rule.
            key_bias: Added to every score of a key, (B, length + T) float32.
            backend: As of `attention`; auto leaves one query of many keys on a CPU to two plain products.

        Returns:
            (B, T, H, D) in the dtype of q.

        Raises:
            ValueError: if the slots do not suffice.
        """
        k, v = self.update(layer, k, v)
        many = q.shape[1] == 1 and k.shape[1] >= FEWEST_FOR_PRODUCTS
        if many and backend == "auto" and q.device.type == "cpu" and not torch.is_grad_enabled():
            return _one_query(q, k, v, mask, key_bias)
        return attention(q, k, v, causal=mask is None, mask=mask, key_bias=key_bias, backend=backend)

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that every layer has now written."""
        self.length += num_tokens

    def grow(self, max_length: int) -> None:
        """Move to room for at least `max_length` tokens, keeping what is filled."""
        if max_length <= self.max_length:
            return
        filled = self.length - self._shared
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], max_length - self._shared, old.shape[4])
            new[:, :, :, :filled] = old[:, :, :, :filled]
            setattr(self, name, new)
        self.key_bias = _widened(self.key_bias, max_length)

    def select(self, rows: Tensor) -> KVCache:
        """Copy some rows, in any order and any number of times.

        Args:
            rows: Row indices, (B',) int64.

        Returns:
            A cache of the same kind with B' rows.
        """
        new = copy.copy(self)
        new.keys, new.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)
        new.key_bias = None if self.key_bias is None else self.key_bias[rows]
        return new

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row `rows[i]` holds, in place; rows is (B,) int64."""
        filled = self.length - self._shared
        for tensor in (self.keys, self.values):
            tensor[:, :, :, :filled] = tensor[:, :, :, :filled].index_select(1, rows)
        if self.key_bias is not None:
            self.key_bias = self.key_bias[rows]

    def fork(self, rows: Sequence[int] | Tensor, max_length: int) -> SharedKVCache:
        """Let several rows go on from the prompts that this cache holds, without copying them.

        This cache must not be extended or reordered while a fork of it is in use; it may be forked again.

        Args:
            rows: Which row of this cache each new row continues, (B',).
            max_length: Tokens that a new row has room for, the prompt included.

        Returns:
            A cache of B' rows.
        """
        return SharedKVCache(self, torch.as_tensor(rows), max_length)


class SharedKVCache(KVCache):
    """Rows that read a prompt's keys and values where they are, and own only what comes behind.

    The rows of one prompt are queries of one product with its keys, so the prompt is read once for all of them.
    """

    def __init__(self, prompt: KVCache, row_of: Tensor, max_length: int) -> None:
        """Fork a cache; see `KVCache.fork`.

        Args:
            prompt: Holds the prompts.
            row_of: Row of `prompt` that each row continues, (B,) int64.
            max_length: Tokens that fit in a row, the prompt included.
        """
        layers, _, kv_heads, _, head_dim = prompt.keys.shape
        shape = (layers, len(row_of), kv_heads, max(max_length - prompt.length, 0), head_dim)
        self.prompt_keys = prompt.keys[:, :, :, : prompt.length]
        self.prompt_values = prompt.values[:, :, :, : prompt.length]
        self.keys, self.values = prompt.keys.new_zeros(shape), prompt.values.new_zeros(shape)
        self.length = self._shared = prompt.length
        row_of = row_of.to(prompt.keys.device)
        bias = None if prompt.key_bias is None else prompt.key_bias[row_of, : prompt.length]
        self.key_bias = _widened(bias, self.max_length)
        self._group(row_of)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        key_bias: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Cache new keys and values of one layer, and attend to the prompt and to them with one softmax.

        Scores and softmax are those of the eager backend, whatever `backend` says: no fused one reads two segments.

        Args:
            layer: Layer index.
            q: New queries, (B, T, H, D).
            k: New keys, (B, T, K, D).
            v: New values, (B, T, K, D).
            mask: True where a query may look, (B, T, length + T) bool. None: the causal rule.
            key_bias: Added to every score of a key, (B, length + T) float32.
            backend: Not used.

        Returns:
            (B, T, H, D) in the dtype of q.

        Raises:
            ValueError: if the slots do not suffice.
        """
        k, v = (t.transpose(1, 2) for t in self.update(layer, k, v))  # (B, K, suffix, D)
        rows, num_queries, heads, head_dim = q.shape
        groups = heads // k.shape[1]
        # The query heads of one key head, and the positions, are the queries of one product.
        q = (q * head_dim**-0.5).unflatten(2, (-1, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, K, T * G, D)
        shared = self._per_row(self._per_prompt(q) @ self.prompt_keys[layer].transpose(-1, -2), q.shape[2])
        scores = torch.cat([shared, q @ k.transpose(-1, -2)], dim=-1).float()  # (B, K, T * G, S), its own memory
        if mask is None and num_queries > 1:
            mask = causal_mask(num_queries, scores.shape[-1], device=q.device)[None]
        if key_bias is not None:
            scores += key_bias[:, None, None]
        if mask is not None:
            if num_queries > 1:
                mask = mask.repeat_interleave(groups, dim=1)
            scores.masked_fill_(~mask[:, None], torch.finfo(torch.float32).min)  # (B or 1, 1, T * G or 1, S)
        weights = scores.softmax(dim=-1).to(v.dtype)
        out = weights[..., self._shared :] @ v
        out += self._per_row(self._per_prompt(weights[..., : self._shared]) @ self.prompt_values[layer], q.shape[2])
        return (
            out.unflatten(2, (num_queries, groups)).permute(0, 2, 1, 3, 4).reshape(rows, num_queries, heads, head_dim)
        )

    def select(self, rows: Tensor) -> SharedKVCache:
        """Copy some rows, in any order and any number of times; the prompts stay shared.

        Args:
            rows: Row indices, (B',) int64.

        Returns:
            A cache of the same kind with B' rows.
        """
        new = super().select(rows)
        assert isinstance(new, SharedKVCache)
        new._group(self.row_of[rows])
        return new

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row `rows[i]` holds, in place; rows is (B,) int64.

        Only what lies behind the prompts moves, so rows[i] must continue the prompt that row i continues. That is not
        checked: it would make the host wait for the device.
        """
        super().reorder(rows)

    def fork(self, rows: Sequence[int] | Tensor, max_length: int) -> SharedKVCache:
        """Let several rows go on from each row; the prompts stay shared, what is behind them is copied.

        Args:
            rows: Which row of this cache each new row continues, (B',).
            max_length: Tokens that a new row has room for, the prompt included.

        Returns:
            A cache of B' rows.
        """
        new = self.select(torch.as_tensor(rows).to(self.keys.device))
        new.grow(max_length)
        return new

    def _group(self, row_of: Tensor) -> None:
        """Find the rows of each prompt.

        `_members` (P, most rows of a prompt) lists them, short prompts filled up with their row 0; `_place` (B,) is
        where a row stands in that table. Both are None where the table is the rows in their order.
        """
        self.row_of = row_of
        """Prompt that each row continues, (B,) int64."""
        prompts = row_of.tolist()
        used = sorted(set(prompts))
        table = [[row for row, prompt in enumerate(prompts) if prompt == one] for one in used]
        width = max(map(len, table), default=0)
        padded = [members + members[:1] * (width - len(members)) for members in table]
        flat = [row for members in padded for row in members]
        self._num_prompts = len(used)
        self._members = self._place = None
        if flat != list(range(len(prompts))):
            place = {row: index for index, row in reversed(list(enumerate(flat)))}
            self._members = torch.tensor(flat, device=row_of.device)
            self._place = torch.tensor([place[row] for row in range(len(prompts))], device=row_of.device)
        if used != list(range(self.prompt_keys.shape[1])):  # a prompt that nobody continues any more
            kept = torch.tensor(used, device=row_of.device)
            self.prompt_keys = self.prompt_keys.index_select(1, kept)
            self.prompt_values = self.prompt_values.index_select(1, kept)
            self.row_of = torch.tensor([used.index(prompt) for prompt in prompts], device=row_of.device)

    def _per_prompt(self, x: Tensor) -> Tensor:
        """Stack the rows of a prompt: (B, K, Q, X) to (P, K, rows * Q, X)."""
        if self._members is not None:
            x = x.index_select(0, self._members)
        return x.unflatten(0, (self._num_prompts, -1)).transpose(1, 2).flatten(2, 3)

    def _per_row(self, x: Tensor, num_queries: int) -> Tensor:
        """Undo `_per_prompt`: (P, K, rows * Q, X) to (B, K, Q, X), Q being `num_queries`."""
        x = x.unflatten(2, (-1, num_queries)).transpose(1, 2).flatten(0, 1)
        return x if self._place is None else x.index_select(0, self._place)


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_bias: Tensor | None) -> Tensor:
    """Attention of one query per row, scores and softmax in float32; arguments are those of `attention`."""
    rows, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = (q.float() * head_dim**-0.5).reshape(rows * kv_heads, heads // kv_heads, head_dim)
    k, v = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # (B * K, S, D), views
    # In float32, as the fused kernels do: scores that are rounded to half precision are wrong three times as much.
    scores = torch.bmm(k.float(), q.transpose(1, 2)).transpose(1, 2)  # (B * K, G, S)
    if mask is not None or key_bias is not None:
        scores = scores.unflatten(0, (rows, kv_heads))
        if key_bias is not None:
            scores = scores + key_bias[:, None, None]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
        scores = scores.flatten(0, 1)
    weights = scores.softmax(dim=-1).to(v.dtype)
    return torch.bmm(weights, v).view(rows, 1, heads, head_dim)


def _widened(key_bias: Tensor | None, max_length: int) -> Tensor | None:
    """Biases (B, any) with zeros behind them, (B, max_length)."""
    if key_bias is None:
        return None
    new = key_bias.new_zeros(len(key_bias), max_length)
    new[:, : key_bias.shape[1]] = key_bias
    return new
