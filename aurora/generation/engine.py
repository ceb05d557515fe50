"""The generation loop: choose a token for each row, see which rows have ended, run the next step.

`prefill` reads spliced prompts into a `PromptState`; `extend` lets several texts go on from one state, sharing its keys
and values; `generate` answers either. A row's tokens are those it gets alone, whatever it is batched with.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aurora.generation.beam import Stopper, beam_search
from aurora.generation.context import check_context
from aurora.generation.graphs import make_stepper
from aurora.generation.sampling import Sampler, SamplingConfig, if_finite, not_finite
from aurora.generation.state import Decoder, PromptState, extend, prefill, synchronized_s
from aurora.model.captioner import AuroraModel, Spliced

__all__ = [
    "Decoder",
    "GenerateResult",
    "PromptState",
    "Streamer",
    "check_context",
    "extend",
    "generate",
    "prefill",
    "synchronized_s",
]

STEPS_PER_CHECK = 8
"""On a GPU, ids come to the host after so many steps: waiting for each would leave the device idle between them."""


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
    """Why each row ended: eos, stop (a stop string), length (max_new_tokens) or context (text.max_seq_len)."""
    seconds: dict[str, float]
    """prefill and decode, and apart from them warmup: what later calls of this model find done."""
    logits: Tensor | None
    """With keep_logits: what each token was chosen from, before any sampling rule, (B, T_new, V) float32; behind a
    row's end they mean nothing."""
    logprobs: Tensor | None = None
    """With keep_logprobs: log-probability of each token before any sampling rule, (B, T_new) float32, 0 behind a row's
    end."""


@torch.inference_mode()
def generate(
    model: AuroraModel,
    prompt: Spliced | PromptState,
    sampling: SamplingConfig,
    *,
    streamer: Streamer | None = None,
    stopper: Stopper | None = None,
    keep_logits: bool = False,
    keep_logprobs: bool = False,
) -> GenerateResult:
    """Generate answers to a batch of prompts.

    Args:
        model: The captioner.
        prompt: Prompts padded on the left; or prompts that were read, whose cache is then used up.
        sampling: How tokens are chosen and when to stop.
        streamer: Gets the tokens of each step, of a beam search all at its end; its `end` is called in any case.
        stopper: Finds the stop strings in `sampling.stop`; without it they are not looked for.
        keep_logits: Also return the logits of every step.
        keep_logprobs: Also return the log-probability of every token.

    Returns:
        The new ids and how long they took. A row that fills the context ends there.

    Raises:
        ValueError: if the padding is not on the left, a prompt does not fit, the logits are not finite, or a beam
            search should keep logits.
    """
    try:
        if sampling.num_beams > 1 and keep_logits:
            raise ValueError(
                f"num_beams={sampling.num_beams}: an answer's tokens come from several beams, want num_beams=1 with "
                "output_logits"
            )
        if isinstance(prompt, Spliced):
            lengths: list[int] = prompt.attention_mask.sum(dim=1).tolist()
            check_context(lengths, [0] * len(lengths), model.config.text.max_seq_len)
            prompt = prefill(model, prompt, room=0 if sampling.num_beams > 1 else sampling.max_new_tokens)
        if not bool(torch.isfinite(prompt.logits).all()):
            raise ValueError(
                f"logits of the prompt are not finite in {model.dtype}; want a wider dtype or sound weights"
            )
        room = check_context(prompt.lengths, [0] * len(prompt.lengths), model.config.text.max_seq_len)
        limits = [min(sampling.max_new_tokens, tokens) for tokens in room]
        if sampling.num_beams > 1:
            result = _search(model, prompt, sampling, limits, stopper)
            if streamer is not None:
                for column in result.sequences.t().cpu():
                    streamer.put(column)
            return result if keep_logprobs else result._replace(logprobs=None)
        loop = _Loop(model, prompt, sampling, limits, streamer, stopper)
        return loop.run(keep_logits=keep_logits, keep_logprobs=keep_logprobs)
    finally:
        if streamer is not None:
            streamer.end()


def _search(
    model: AuroraModel, prompt: PromptState, sampling: SamplingConfig, limits: list[int], stopper: Stopper | None
) -> GenerateResult:
    warm, start = model.language_model.products.warmup_s, synchronized_s(prompt.logits.device)
    row_of = [row for row in range(len(limits)) for _ in range(sampling.num_beams)]
    beams = extend(model, prompt, [[] for _ in row_of], row_of, room=max(limits))
    found = beam_search(
        make_stepper(model, beams, max(limits)),
        prompt.logits,
        sampling,
        stop_ids=sampling.stop_ids(model.config.eos_token_id),
        limits=limits,
        pad_token_id=model.config.pad_token_id,
        stopper=stopper,
    )
    stopped_by = [
        _limit_name(limit, sampling) if reason == "length" else reason
        for reason, limit in zip(found.stopped_by, limits, strict=True)
    ]
    seconds = _seconds(model, prompt, start, warm)
    return GenerateResult(found.sequences, found.num_generated, stopped_by, seconds, None, found.logprobs)


class _Loop:
    """Decoding of one batch. The host learns the ids every few steps, and then which rows have ended."""

    def __init__(
        self,
        model: AuroraModel,
        prompt: PromptState,
        sampling: SamplingConfig,
        limits: list[int],
        streamer: Streamer | None,
        stopper: Stopper | None,
    ) -> None:
        self.model, self.prompt, self.sampling = model, prompt, sampling
        self.streamer = streamer
        self.rows = _Rows(limits, sampling, model.config.eos_token_id, model.config.pad_token_id, stopper)
        at_once = streamer is not None or stopper is not None
        self.steps_per_check = 1 if at_once else _steps_per_check(prompt.logits.device)

    def run(self, *, keep_logits: bool, keep_logprobs: bool) -> GenerateResult:
        logits, rows, device = self.prompt.logits, self.rows, self.prompt.logits.device
        warm, start = self.model.language_model.products.warmup_s, synchronized_s(device)
        decoder = make_stepper(self.model, self.prompt, rows.most_steps)
        sampler = Sampler(
            self.sampling,
            batch_size=len(logits),
            vocab_size=logits.shape[1],
            device=device,
            stop_ids=rows.stop_ids,
            keep_logprobs=keep_logprobs,
        )
        kept_logits, kept_logprobs = _Kept(len(logits)), _Kept(len(logits))
        pending: list[Tensor] = []
        ids = sampler(logits)
        found = if_finite(ids, logits)
        decoder_chooses = sampler.is_argmax and not keep_logits
        for step in range(1, rows.most_steps + 1):
            pending.append(found)
            if keep_logits:
                kept_logits.add(rows.running, logits.float())
            if sampler.logprobs is not None:
                kept_logprobs.add(rows.running, sampler.logprobs.clone())
            if step % self.steps_per_check == 0 or step == rows.most_steps:
                self._accept(pending)
                pending = []
                if rows.all_finished:
                    break
                kept = rows.drop_finished()
                if kept is not None:  # a long answer does not carry the short ones along
                    chosen = torch.tensor(kept, device=device)
                    decoder.keep(chosen)
                    sampler.keep(chosen)
                    ids = ids[chosen]
            if decoder_chooses:  # on a GPU within the recorded step
                found = decoder.step_greedily(ids if step == 1 else None)
            else:
                logits = decoder.step(ids)
                ids = sampler(logits)
                found = if_finite(ids, logits)
        columns = len(rows.columns)
        ends = torch.tensor(rows.num_generated, device=device)[:, None]
        logprobs = kept_logprobs.stacked(columns) if keep_logprobs else None
        if logprobs is not None:
            logprobs = logprobs.masked_fill(torch.arange(columns, device=device) >= ends, 0.0)
        return GenerateResult(
            sequences=torch.tensor(rows.columns, device=device).t().contiguous(),
            num_generated=rows.num_generated,
            stopped_by=rows.stopped_by,
            seconds=_seconds(self.model, self.prompt, start, warm),
            logits=kept_logits.stacked(columns) if keep_logits else None,
            logprobs=logprobs,
        )

    def _accept(self, pending: list[Tensor]) -> None:
        """Look at the ids of some steps; what came behind the end of every row is left out."""
        for ids in torch.stack(pending).tolist():
            if self.rows.has_failed(ids):
                raise ValueError(not_finite(len(self.rows.columns) + 1, self.model.dtype))
            column = self.rows.accept(ids)
            if self.streamer is not None:
                self.streamer.put(torch.tensor(column))
            if self.rows.all_finished:
                break


class _Rows:
    """Which rows still run, what they produced, and why the others ended."""

    def __init__(
        self,
        limits: list[int],
        sampling: SamplingConfig,
        eos_token_id: int,
        pad_token_id: int,
        stopper: Stopper | None,
    ) -> None:
        self.columns: list[list[int]] = []
        self.num_generated = [0] * len(limits)
        self.stopped_by = [""] * len(limits)
        self.running = list(range(len(limits)))
        """Which row each row of the batch is."""
        self.most_steps = max(limits)
        self.stop_ids = sampling.stop_ids(eos_token_id)
        self._ids: list[list[int]] = [[] for _ in limits]
        self._limits, self._sampling = limits, sampling
        self._pad_token_id, self._stopper = pad_token_id, stopper

    @property
    def all_finished(self) -> bool:
        return all(self.stopped_by)

    def has_failed(self, ids: list[int]) -> bool:
        """Whether a row that has not ended got no token in this step."""
        return any(token < 0 and not self.stopped_by[row] for row, token in zip(self.running, ids, strict=True))

    def accept(self, ids: list[int]) -> list[int]:
        """Record one step of the running rows; returns the ids of all, padding where a row had finished before."""
        column = [self._pad_token_id] * len(self.stopped_by)
        going = [(row, token) for row, token in zip(self.running, ids, strict=True) if not self.stopped_by[row]]
        for row, token in going:
            column[row] = token
            self._ids[row].append(token)
            self.num_generated[row] += 1
        found = [False] * len(going)
        if self._stopper is not None:
            found = self._stopper([self._ids[row] for row, _ in going])
        for (row, token), stopped in zip(going, found, strict=True):
            if token in self.stop_ids:
                self.stopped_by[row] = "eos"
            elif stopped:
                self.stopped_by[row] = "stop"
            elif self.num_generated[row] == self._limits[row]:
                self.stopped_by[row] = _limit_name(self._limits[row], self._sampling)
        self.columns.append(column)
        return column

    def drop_finished(self) -> list[int] | None:
        """Once half of the running rows have ended, leave them out: which rows of the batch stay, else None."""
        stay = [index for index, row in enumerate(self.running) if not self.stopped_by[row]]
        if 2 * len(stay) > len(self.running):
            return None
        self.running = [self.running[index] for index in stay]
        return stay


class _Kept:
    """Values of each step for the rows that ran in it, put together in the end."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._steps: list[tuple[list[int], Tensor]] = []

    def add(self, rows: list[int], values: Tensor) -> None:
        """Keep (b, ...) of these b rows."""
        self._steps.append((rows, values))

    def stacked(self, num_steps: int) -> Tensor:
        """(B, num_steps, ...), 0 where a row did not run."""
        first = self._steps[0][1]
        out = first.new_zeros(self._num_rows, num_steps, *first.shape[1:])
        for step, (rows, values) in enumerate(self._steps[:num_steps]):
            out[rows, step] = values
        return out


def _seconds(model: AuroraModel, prompt: PromptState, start: float, warm: float) -> dict[str, float]:
    """Seconds of each phase, decoding having begun at `start`, when `warm` seconds of warm-up had been counted."""
    warm = model.language_model.products.warmup_s - warm
    decode = synchronized_s(prompt.logits.device) - start - warm
    return {"prefill": prompt.seconds, "decode": decode, "warmup": prompt.warmup_s + warm}


def _steps_per_check(device: torch.device) -> int:
    return 1 if device.type == "cpu" else STEPS_PER_CHECK


def _limit_name(limit: int, sampling: SamplingConfig) -> str:
    return "length" if limit == sampling.max_new_tokens else "context"
