"""A key-value cache whose rows differ in length: an image beside a film neither pays for its padding nor reads it.

Rows of similar length are one part, an ordinary cache that is as long as the longest of them. To the language model
the whole looks like one cache that is padded on the left; attention runs part by part.

Shape letters: B rows, T new positions, S slots of the longest part, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aurora.model.cache import KVCache


class RaggedKVCache(KVCache):
    """Several caches that take turns in each layer."""

    def __init__(self, parts: Sequence[KVCache], rows: Sequence[Sequence[int]]) -> None:
        """Put caches together.

        Args:
            parts: Filled caches; they are extended in place.
            rows: For each part, which row of the batch each of its rows is; together 0 to B - 1.
        """
        self.parts = list(parts)
        self.rows = [list(part_rows) for part_rows in rows]
        self.length = max(part.length for part in self.parts)
        self.key_bias = None
        device = self.parts[0].keys.device
        order = [row for part_rows in self.rows for row in part_rows]
        self._where = {row: (part, local) for part, own in enumerate(self.rows) for local, row in enumerate(own)}
        self._row_indices = [torch.tensor(own, device=device) for own in self.rows]
        self._order = torch.tensor(order, device=device)
        self._place = self._order.argsort()
        self._in_order = order == sorted(order)
        self._local = torch.tensor([self._where[row][1] for row in range(len(order))], device=device)
        self._padded: list[bool] | None = None  # whether a part needs a mask for one query; looked up when it matters
        self._split: tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]] | None = None

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return len(self._where)

    @property
    def max_length(self) -> int:
        """Tokens that fit in the longest row; every part has room for as many new ones."""
        return self.length + min(part.max_length - part.length for part in self.parts)

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
        """Cache new keys and values of one layer, and let each row attend to its own; see `KVCache.attend`.

        Args:
            layer: Layer index.
            q: New queries, (B, T, H, D).
            k: New keys, (B, T, K, D).
            v: New values, (B, T, K, D).
            mask: True where a query may look, (B, T, length + T) bool. None: the causal rule.
            key_bias: Added to every score of a key, (B, length + T) float32.
            backend: As of `attention`.

        Returns:
            (B, T, H, D) in the dtype of q.
        """
        masks, biases = self._split_by_part(mask, key_bias, q.shape[1])
        if not self._in_order:
            q, k, v = (x.index_select(0, self._order) for x in (q, k, v))
        out, start = [], 0
        for part, own_rows, own_mask, own_bias in zip(self.parts, self.rows, masks, biases, strict=True):
            here = slice(start, start := start + len(own_rows))
            out.append(part.attend(layer, q[here], k[here], v[here], mask=own_mask, key_bias=own_bias, backend=backend))
        whole = torch.cat(out)
        return whole if self._in_order else whole.index_select(0, self._place)

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that every layer has now written."""
        for part in self.parts:
            part.advance(num_tokens)
        self.length += num_tokens
        self._split = None
        if num_tokens > 1:  # they may hold padding; a single token never does
            self._padded = None

    def grow(self, max_length: int) -> None:
        """Give every part room for `max_length - length` more tokens, keeping what is filled."""
        for part in self.parts:
            part.grow(part.length + max_length - self.length)
        if self.key_bias is not None and self.key_bias.shape[1] < self.max_length:
            wider = self.key_bias.new_zeros(self.batch_size, self.max_length)
            wider[:, : self.key_bias.shape[1]] = self.key_bias
            self.key_bias = wider

    def select(self, rows: Tensor) -> RaggedKVCache:
        """Copy some rows, (B',) int64, in any order and any number of times."""
        chosen: list[int] = rows.tolist()
        new = self._rebuilt(chosen, lambda part, local: part.select(torch.tensor(local, device=rows.device)))
        new.key_bias = None if self.key_bias is None else self.key_bias[rows]
        return new

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row `rows[i]` holds, in place; both in the same part, which is not checked."""
        for part, own in zip(self.parts, self._row_indices, strict=True):
            part.reorder(self._local[rows[own]])

    def fork(self, rows: Sequence[int] | Tensor, max_length: int) -> RaggedKVCache:  # type: ignore[override]
        """Let several rows go on from the prompts that this cache holds, without copying them; see `KVCache.fork`."""
        chosen = [int(row) for row in rows]
        new = self._rebuilt(chosen, lambda part, local: part.fork(local, part.length + max_length - self.length))
        if self.key_bias is not None:
            new.key_bias = self.key_bias.new_zeros(len(chosen), new.max_length)
            new.key_bias[:, : self.length] = self.key_bias[chosen, : self.length]
        return new

    def _rebuilt(self, chosen: Sequence[int], make: Callable[[KVCache, list[int]], KVCache]) -> RaggedKVCache:
        parts, rows = [], []
        for index, part in enumerate(self.parts):
            own = [new for new, old in enumerate(chosen) if self._where[old][0] == index]
            if own:
                parts.append(make(part, [self._where[chosen[new]][1] for new in own]))
                rows.append(own)
        new = RaggedKVCache(parts, rows)
        # The longest part may have left: to the model the cache stays as long as its masks are.
        new.length = self.length
        return new

    def _split_by_part(
        self, mask: Tensor | None, key_bias: Tensor | None, num_queries: int
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Mask and bias of each part, the same in every layer of a run."""
        if self._split is not None and self._split[0] is mask and self._split[1] is key_bias:
            return self._split[2:]
        masks: list[Tensor | None] = [None] * len(self.parts)
        biases: list[Tensor | None] = [None] * len(self.parts)
        for index, (part, own) in enumerate(zip(self.parts, self._row_indices, strict=True)):
            num_keys = part.length + num_queries
            if key_bias is not None:
                biases[index] = key_bias.index_select(0, own)[:, -num_keys:]
            needed = mask is not None and (num_queries > 1 or self._padded is None or self._padded[index])
            if needed and mask is not None:
                masks[index] = (mask if len(mask) == 1 else mask.index_select(0, own))[..., -num_keys:]
        if num_queries == 1 and self._padded is None:
            self._padded = [own is not None and not bool(own.all()) for own in masks]
            masks = [own if padded else None for own, padded in zip(masks, self._padded, strict=True)]
        self._split = (mask, key_bias, masks, biases)
        return masks, biases
