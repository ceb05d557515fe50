"""Prompts that the language model has read, and going on from them: prefill, fork, and steps of one token.

Rows are padded on the left, so every row's last prompt token is in the last column and all rows decode in step; padding
is masked and not counted in positions. Rows of very different lengths are read apart, so that a picture does not wait
for a film's padding.

Shape letters: B rows, L prompt positions, T suffix positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aurora.generation.sampling import if_finite
from aurora.model.cache import KVCache
from aurora.model.captioner import AuroraModel, Spliced
from aurora.model.ragged_cache import RaggedKVCache

CACHE_BUCKET = 256
"""Cache slots are allocated in multiples of this, as they are needed."""
PREFILL_SLACK = 64
"""Prompts whose lengths differ by at most so many tokens are read together: padding then costs less than a run."""


@dataclass(kw_only=True, slots=True)
class PromptState:
    """Prompts that the language model has read."""

    cache: KVCache
    """Their keys and values."""
    logits: Tensor
    """Of the token behind each prompt, (B, V)."""
    mask: Tensor
    """True where a token is, (B, L) bool."""
    padded: bool
    """Whether the mask is False anywhere."""
    next_position: Tensor
    """Position of the token behind each prompt, (B, 1) int64."""
    lengths: list[int]
    """How much of the context each prompt takes: its tokens, or its last position where that is more."""
    seconds: float
    """How long reading took."""
    warmup_s: float
    """Seconds of warm-up before it: arranging the weights."""


@torch.inference_mode()
def prefill(model: AuroraModel, spliced: Spliced, *, room: int = 0) -> PromptState:
    """Read prompts.

    Args:
        model: The captioner.
        spliced: Prompts, padded on the left.
        room: Tokens that may follow in the same cache, without a fork.

    Returns:
        The state behind them.

    Raises:
        ValueError: if the padding is not on the left.
    """
    if not bool(spliced.attention_mask[:, -1].all()):
        raise ValueError("generate: a row ends in padding, want prompts padded on the left")
    warm, start = model.language_model.products.warmup_s, synchronized_s(spliced.inputs_embeds.device)
    rows, width = spliced.attention_mask.shape
    lengths: list[int] = spliced.attention_mask.sum(dim=1).tolist()
    groups = _similar_lengths(lengths)
    parts, logits_of = [], []
    for group in groups:
        longest = max(lengths[row] for row in group)
        parts.append(_new_cache(model, len(group), _bucket(longest + min(room, 1), longest + room)))
        own = spliced if len(groups) == 1 else _columns(spliced, group, longest)
        logits_of.append(model.run_language_model(own, cache=parts[-1], logits_to_keep=1)[:, -1])
    cache, logits = parts[0], logits_of[0]
    if len(groups) > 1:
        cache = RaggedKVCache(parts, groups)
        order = torch.tensor([row for group in groups for row in group], device=logits.device)
        logits = torch.cat(logits_of)[order.argsort()]
    if spliced.key_bias is not None:
        cache.key_bias = spliced.key_bias.new_zeros(rows, cache.max_length)
        cache.key_bias[:, :width] = spliced.key_bias
    last: list[int] = spliced.next_position[:, 0].tolist()
    warm = model.language_model.products.warmup_s - warm
    return PromptState(
        cache=cache,
        logits=logits,
        mask=spliced.attention_mask,
        padded=min(lengths) < width,
        next_position=spliced.next_position,
        lengths=[max(pair) for pair in zip(lengths, last, strict=True)],
        seconds=synchronized_s(logits.device) - start - warm,
        warmup_s=warm,
    )


@torch.inference_mode()
def extend(
    model: AuroraModel, state: PromptState, suffixes: Sequence[Sequence[int]], row_of: Sequence[int], *, room: int = 0
) -> PromptState:
    """Let texts go on from prompts that were read, which keep their state and may be extended again.

    Args:
        model: The captioner.
        state: Where to go on.
        suffixes: Token ids of each new row, perhaps none.
        row_of: Which prompt each new row continues.
        room: Tokens that may follow.

    Returns:
        The state behind the suffixes; keys and values of the prompts are shared with `state`.
    """
    device, width, length = state.logits.device, max(map(len, suffixes)), state.cache.length
    warm, start = model.language_model.products.warmup_s, synchronized_s(device)
    most = length + width + room
    cache = state.cache.fork(list(row_of), _bucket(length + width + min(room, 1), most))
    rows = torch.tensor(list(row_of), device=device)
    logits, mask, position = state.logits[rows], state.mask[rows], state.next_position[rows]
    padded = state.padded
    if width:
        pad = model.config.pad_token_id
        ids = torch.tensor([[pad] * (width - len(text)) + list(text) for text in suffixes], device=device)
        num_ids = torch.tensor([len(text) for text in suffixes], device=device)[:, None]
        valid = torch.arange(width, device=device) >= width - num_ids  # (B, T)
        mask = torch.cat([mask, valid], dim=1)
        padded = padded or min(map(len, suffixes)) < width
        new: Tensor = model.language_model(
            model.language_model.embed(ids),
            position_ids=(position + valid.cumsum(dim=1) - 1).clamp_min(0),
            attention_mask=mask if padded else None,
            cache=cache,
            logits_to_keep=1,
        )
        logits = torch.where(num_ids > 0, new[:, -1], logits)
        position = position + num_ids
    warm = model.language_model.products.warmup_s - warm
    return PromptState(
        cache=cache,
        logits=logits,
        mask=mask,
        padded=padded,
        next_position=position,
        lengths=[state.lengths[row] + len(text) for row, text in zip(row_of, suffixes, strict=True)],
        seconds=synchronized_s(device) - start - warm,
        warmup_s=warm,
    )


class Decoder:
    """The language model behind prompts, one token per row and step."""

    def __init__(self, model: AuroraModel, state: PromptState, num_steps: int) -> None:
        """Go on from prompts.

        Args:
            model: The captioner.
            state: The prompts; their cache is extended in place.
            num_steps: Steps at most.
        """
        self.cache = state.cache
        self._language_model = model.language_model
        self._most_slots = state.cache.length + num_steps
        self._mask: Tensor | None = None
        if state.padded:
            self._mask = torch.cat([state.mask, state.mask.new_ones(len(state.mask), num_steps)], dim=1)
        self._next_position = state.next_position
        self._chosen = torch.empty(0, dtype=torch.int64)

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token per row, (B,); logits of the next one, (B, V)."""
        length = self.cache.length
        if length == self.cache.max_length:
            self.cache.grow(_bucket(length * 3 // 2, self._most_slots))
        logits: Tensor = self._language_model(
            self._language_model.embed(ids[:, None]),
            position_ids=self._next_position,
            attention_mask=None if self._mask is None else self._mask[:, : length + 1],
            cache=self.cache,
            logits_to_keep=1,
        )
        self._next_position = self._next_position + 1
        return logits[:, -1]

    def step_greedily(self, ids: Tensor | None) -> Tensor:
        """Run one more token per row, (B,), None: those chosen last; the likeliest next ones, (B,), -1 for none."""
        logits = self.step(self._chosen if ids is None else ids)
        self._chosen = logits.argmax(dim=-1)
        return if_finite(self._chosen, logits)

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has generated, (B,) int64; both behind the same prompt."""
        self.cache.reorder(rows)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (B_new,) int64."""
        self.cache = self.cache.select(rows)
        self._next_position = self._next_position[rows]
        self._chosen = self._chosen[rows] if len(self._chosen) else self._chosen
        self._mask = None if self._mask is None else self._mask[rows]


def _new_cache(model: AuroraModel, rows: int, slots: int) -> KVCache:
    return KVCache(model.config.text, batch_size=rows, max_length=slots, device=model.device, dtype=model.dtype)


def _bucket(slots: int, most: int) -> int:
    return min(-(-slots // CACHE_BUCKET) * CACHE_BUCKET, most)


def _similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups whose lengths differ by at most PREFILL_SLACK, longest first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or lengths[groups[-1][0]] - lengths[row] > PREFILL_SLACK:
            groups.append([])
        groups[-1].append(row)
    return groups


def _columns(spliced: Spliced, rows: list[int], width: int) -> Spliced:
    """Some rows of a batch padded on the left, as wide as the longest of them."""
    return Spliced(
        spliced.inputs_embeds[rows, -width:],
        spliced.attention_mask[rows, -width:],
        spliced.position_ids[rows, -width:],
        None,
        None if spliced.key_bias is None else spliced.key_bias[rows, -width:],
        spliced.next_position[rows],
    )


def synchronized_s(device: torch.device) -> float:
    """Return seconds on a monotonic clock, taken when the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
