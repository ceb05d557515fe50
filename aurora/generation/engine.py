"""The generation loop: one prefill over the spliced prompt, then one token per row and step over a static cache.

Rows are padded on the left, so every row's last prompt token is in the last column and all rows decode in step; padding
is masked and not counted in positions, so a row's tokens are those it gets alone.

Shape letters: B rows, L prompt positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aurora.generation.sampling import Sampler, SamplingConfig
from aurora.model.cache import KVCache
from aurora.model.captioner import AuroraModel, Spliced

CACHE_BUCKET = 256
"""Cache slots are allocated in multiples of this, as they are needed."""


class Streamer(Protocol):
    """Receives tokens while they are made."""

    def put(self, ids: Tensor) -> None:
        """Take the next token of each row, (B,) int64 on the CPU; a finished row gets the pad id."""

    def end(self) -> None:
        """Learn that no more tokens come, also after an error."""


class GenerateResult(NamedTuple):
    """What was generated."""

    sequences: Tensor
    """New ids only, (B, T_new) int64; includes the end-of-text id, behind which a row is filled with the pad id."""
    num_generated: list[int]
    """Tokens of each row, end-of-text included, padding not."""
    stopped_by: list[str]
    """Why each row ended: eos, length (max_new_tokens) or context (text.max_seq_len)."""
    seconds: dict[str, float]
    """prefill and decode."""
    logits: Tensor | None
    """With keep_logits: what each token was chosen from, before any sampling rule, (B, T_new, V) float32."""


def check_context(text_tokens: Sequence[int], visual_tokens: Sequence[int], max_seq_len: int) -> list[int]:
    """Check that every prompt leaves room for an answer, before anything runs.

    Args:
        text_tokens: Text tokens of each row's prompt.
        visual_tokens: Visual tokens of each row.
        max_seq_len: Context of the language model in tokens.

    Returns:
        Tokens that each row may still generate, at least 1.

    Raises:
        ValueError: if a prompt is empty, or leaves no room.
    """
    room: list[int] = []
    for row, (text, visual) in enumerate(zip(text_tokens, visual_tokens, strict=True)):
        if text + visual == 0:
            raise ValueError(f"row {row}: the prompt is empty, want at least one token")
        if text + visual >= max_seq_len:
            raise ValueError(
                f"row {row}: {text} text + {visual} visual = {text + visual} prompt tokens leave no room for an "
                f"answer; want at most {max_seq_len - 1} (text.max_seq_len={max_seq_len}): lower num_frm, "
                "token_kept_ratio or visual_token_budget"
            )
        room.append(max_seq_len - text - visual)
    return room


@torch.inference_mode()
def generate(
    model: AuroraModel,
    spliced: Spliced,
    sampling: SamplingConfig,
    *,
    streamer: Streamer | None = None,
    keep_logits: bool = False,
) -> GenerateResult:
    """Generate answers to a batch of prompts.

    Args:
        model: The captioner.
        spliced: Prompts, padded on the left.
        sampling: How tokens are chosen and when to stop.
        streamer: Gets the tokens of each step; its `end` is called in any case.
        keep_logits: Also return the logits of every step.

    Returns:
        The new ids and how long they took. A row that fills the context ends there.

    Raises:
        ValueError: if the padding is not on the left, a prompt does not fit, or the logits are not finite.
    """
    try:
        return _generate(model, spliced, sampling, streamer, keep_logits)
    finally:
        if streamer is not None:
            streamer.end()


def _generate(
    model: AuroraModel, spliced: Spliced, sampling: SamplingConfig, streamer: Streamer | None, keep_logits: bool
) -> GenerateResult:
    mask = spliced.attention_mask
    if not bool(mask[:, -1].all()):
        raise ValueError("generate: a row ends in padding, want prompts padded on the left")
    lengths: list[int] = mask.sum(dim=1).tolist()
    room = check_context(lengths, [0] * len(lengths), model.config.text.max_seq_len)
    limits = [min(sampling.max_new_tokens, tokens) for tokens in room]
    decoder = _Decoder(model, spliced, num_steps=max(limits))
    rows = _Rows(limits, sampling, model.config.eos_token_id, model.config.pad_token_id)
    sampler = Sampler(sampling, batch_size=len(limits), vocab_size=model.config.text.vocab_size, device=mask.device)
    kept: list[Tensor] = []

    start = synchronized_s(mask.device)
    logits = decoder.prefill()  # (B, V)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"logits of the prompt are not finite in {model.dtype}; want a wider dtype or sound weights")
    prefilled = synchronized_s(mask.device)
    while True:
        if keep_logits:
            kept.append(logits.float())
        ids = rows.accept(sampler(logits).tolist())
        if streamer is not None:
            streamer.put(torch.tensor(ids))
        if rows.all_finished:
            break
        logits = decoder.step(torch.tensor(ids, device=mask.device))
    seconds = {"prefill": prefilled - start, "decode": synchronized_s(mask.device) - prefilled}
    sequences = torch.tensor(rows.columns, device=mask.device).t().contiguous()  # (B, T_new)
    return GenerateResult(
        sequences, rows.num_generated, rows.stopped_by, seconds, torch.stack(kept, dim=1) if keep_logits else None
    )


class _Rows:
    """Which rows still run, what they produced, and why the others ended."""

    def __init__(self, limits: list[int], sampling: SamplingConfig, eos_token_id: int, pad_token_id: int) -> None:
        self.columns: list[list[int]] = []
        self.num_generated = [0] * len(limits)
        self.stopped_by = [""] * len(limits)
        self._limits = limits
        self._max_new_tokens = sampling.max_new_tokens
        self._stop_ids = sampling.stop_ids(eos_token_id)
        self._pad_token_id = pad_token_id

    @property
    def all_finished(self) -> bool:
        return all(self.stopped_by)

    def accept(self, ids: list[int]) -> list[int]:
        """Record one step; returns the ids with padding in rows that had finished before."""
        column = [self._pad_token_id if reason else token for token, reason in zip(ids, self.stopped_by, strict=True)]
        self.columns.append(column)
        for row, token in enumerate(column):
            if self.stopped_by[row]:
                continue
            self.num_generated[row] += 1
            if token in self._stop_ids:
                self.stopped_by[row] = "eos"
            elif self.num_generated[row] == self._limits[row]:
                self.stopped_by[row] = "length" if self._limits[row] == self._max_new_tokens else "context"
        return column


class _Decoder:
    """The language model with its cache, mask and positions for one batch."""

    def __init__(self, model: AuroraModel, spliced: Spliced, *, num_steps: int) -> None:
        rows, prompt_length = spliced.attention_mask.shape
        self.language_model = model.language_model
        self.spliced = spliced
        self.most_slots = prompt_length + num_steps
        self.padded = not bool(spliced.attention_mask.all())
        self.mask = torch.cat([spliced.attention_mask, spliced.attention_mask.new_ones(rows, num_steps)], dim=1)
        self.next_position = spliced.position_ids[:, -1:]  # (B, 1)
        self.cache = KVCache(
            model.config.text,
            batch_size=rows,
            max_length=self._bucket(prompt_length + 1),
            device=spliced.inputs_embeds.device,
            dtype=model.dtype,
        )

    def prefill(self) -> Tensor:
        """Run the prompt; logits of the next token, (B, V)."""
        return self._run(self.spliced.inputs_embeds, self.spliced.position_ids)

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token per row, (B,); logits of the next one, (B, V)."""
        if self.cache.length == self.cache.max_length:
            self.cache.grow(self._bucket(self.cache.length * 3 // 2))
        self.next_position = self.next_position + 1
        return self._run(self.language_model.embed(ids[:, None]), self.next_position)

    def _run(self, embeds: Tensor, position_ids: Tensor) -> Tensor:
        mask = self.mask[:, : self.cache.length + embeds.shape[1]] if self.padded else None
        logits: Tensor = self.language_model(
            embeds, position_ids=position_ids, attention_mask=mask, cache=self.cache, logits_to_keep=1
        )
        return logits[:, -1]

    def _bucket(self, slots: int) -> int:
        return min(-(-slots // CACHE_BUCKET) * CACHE_BUCKET, self.most_slots)


def synchronized_s(device: torch.device) -> float:
    """Return seconds on a monotonic clock, taken when the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
