"""Beam search: the most probable whole answers, found by keeping the best few beginnings of each prompt.

Freitag and Al-Onaizan (2017) survey the method; the rules are those users of Hugging Face's `generate` know:

- A step scores every continuation of a prompt's beams by its summed log-probability and looks at the best
  (1 + number of stop ids) * num_beams, at least 2 * num_beams, so that num_beams can go on whatever ends.
- An ending among the best num_beams becomes an answer, worth sum / length ** length_penalty with the ending counted in
  the length; the num_beams best answers of a prompt are kept, and continuations that do not end go on.
- A prompt is settled when it has num_beams answers and (early_stopping) at once, or when the best beam, were it to end
  at its present length, would be no better than the worst answer. At its limit every continuation ends.

All beams of a prompt share its cache; what moves between them is the decoder's business (`reorder`).

Shape letters: B prompts, W beams of each, K continuations looked at, T new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aurora.generation.sampling import LogitRules, SamplingConfig, are_finite, not_finite

Stopper = Callable[[Sequence[Sequence[int]]], list[bool]]
"""Whether the text of each row's new ids has just completed a stop string."""


class BeamDecoder(Protocol):
    """A language model behind its prompts, with W neighbouring rows for each prompt."""

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token per row, (B * W,); logits of the next one, (B * W, V)."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has generated, (B * W,) int64; both are of one prompt."""


class BeamResult(NamedTuple):
    """The best answer to each prompt."""

    sequences: Tensor
    """New ids, (B, T) int64; includes the end-of-text id, behind which a row is filled with the pad id."""
    num_generated: list[int]
    """Tokens of each answer, end-of-text included."""
    stopped_by: list[str]
    """Why each answer ends: eos, stop (a stop string) or length (its limit)."""
    logprobs: Tensor
    """Log-probability of each token before any rule, (B, T) float32; 0 behind an answer's end."""
    scores: Tensor
    """What the answers were compared by, (B,) float32."""


@torch.inference_mode()
def beam_search(
    decoder: BeamDecoder,
    logits: Tensor,
    sampling: SamplingConfig,
    *,
    stop_ids: Collection[int],
    limits: Sequence[int],
    pad_token_id: int,
    stopper: Stopper | None = None,
) -> BeamResult:
    """Search the best answer to each prompt.

    Args:
        decoder: Holds B * W rows, those of a prompt side by side, where W is `sampling.num_beams`.
        logits: Of each prompt's first new token, (B, V).
        sampling: num_beams, length_penalty, early_stopping, repetition_penalty and min_new_tokens count.
        stop_ids: Tokens that end an answer.
        limits: Tokens that each prompt may generate, at least 1.
        pad_token_id: Fills rows behind their end.
        stopper: Finds stop strings; looks at every continuation considered, so it costs time on the host.

    Returns:
        The best answer to each prompt.

    Raises:
        ValueError: if logits are not finite.
    """
    search = _Search(logits, sampling, stop_ids, limits, pad_token_id, stopper)
    step_logits = logits.repeat_interleave(sampling.num_beams, dim=0)  # (B * W, V)
    while True:
        ids, rows = search.advance(step_logits)
        if search.all_settled:
            return search.result()
        decoder.reorder(rows)
        step_logits = decoder.step(ids)


class _Hypotheses(NamedTuple):
    """Some sequences of each prompt, n of them; at first beams, later answers."""

    ids: Tensor
    """(B, n, T) int64, filled with the pad id."""
    logprobs: Tensor
    """Of each token before any rule, (B, n, T) float32."""
    scores: Tensor
    """(B, n) float32; -inf marks one that does not exist."""
    lengths: Tensor
    """Tokens, (B, n) int64."""

    def pick(self, index: Tensor) -> _Hypotheses:
        """Take some of each prompt, (B, m) int64."""
        along = index[:, :, None].expand(-1, -1, self.ids.shape[2])
        return _Hypotheses(
            self.ids.gather(1, along),
            self.logprobs.gather(1, along),
            self.scores.gather(1, index),
            self.lengths.gather(1, index),
        )

    def join(self, other: _Hypotheses) -> _Hypotheses:
        """Put the sequences of `other` behind these."""
        return _Hypotheses(*(torch.cat(pair, dim=1) for pair in zip(self, other)))


class _Search:
    """Beams and answers of every prompt."""

    def __init__(
        self,
        logits: Tensor,
        sampling: SamplingConfig,
        stop_ids: Collection[int],
        limits: Sequence[int],
        pad_token_id: int,
        stopper: Stopper | None,
    ) -> None:
        num_prompts, vocab_size = logits.shape
        device = logits.device
        self.sampling = sampling
        self.num_beams = sampling.num_beams
        self.num_considered = min(max(2, 1 + len(stop_ids)) * self.num_beams, self.num_beams * vocab_size)  # K
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.limits = torch.tensor(limits, device=device)[:, None]  # (B, 1)
        self.stopper = stopper
        self.rules = LogitRules(
            sampling,
            batch_size=num_prompts * self.num_beams,
            vocab_size=vocab_size,
            device=device,
            stop_ids=stop_ids,
        )
        shape = (num_prompts, self.num_beams)
        nothing = _Hypotheses(
            torch.full((*shape, max(limits)), pad_token_id, dtype=torch.int64, device=device),
            torch.zeros(*shape, max(limits), device=device),
            torch.full(shape, -math.inf, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
        )
        self.answers = nothing
        # The beams are alike at first; with one of them alive the first step does not find each token W times.
        alive = torch.arange(self.num_beams, device=device) == 0
        self.beams = nothing._replace(scores=nothing.scores.masked_fill(alive, 0.0))
        self.settled = torch.zeros(num_prompts, 1, dtype=torch.bool, device=device)
        self.num_steps = 0

    @property
    def all_settled(self) -> bool:
        """Whether no prompt's answers can change any more."""
        return bool(self.settled.all())

    def advance(self, step_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            step_logits: Of the next token of each beam, (B * W, V).

        Returns:
            The token that each beam goes on with, (B * W,), and the row it continues, (B * W,).

        Raises:
            ValueError: if a logit is not finite.
        """
        if not bool(are_finite(step_logits).all()):
            raise ValueError(not_finite(self.num_steps + 1, step_logits.dtype))
        log_probs = step_logits.float().log_softmax(dim=-1)
        considered, parents, tokens = self._continuations(log_probs)  # parents, tokens: (B, K)
        self.num_steps += 1
        ends = self._ends(considered, tokens)  # (B, K)
        self._collect(considered, ends)
        going = considered.scores.masked_fill(ends, -math.inf).topk(self.num_beams, dim=1)
        self.beams = considered.pick(going.indices)._replace(scores=going.values)
        self._settle()
        first_row = torch.arange(len(parents), device=parents.device)[:, None] * self.num_beams
        rows = (parents.gather(1, going.indices) + first_row).flatten()
        ids = tokens.gather(1, going.indices).flatten()
        self.rules.keep(rows)
        self.rules.record(ids)
        return ids, rows

    def _continuations(self, log_probs: Tensor) -> tuple[_Hypotheses, Tensor, Tensor]:
        """The K best continuations of each prompt, the beams they continue and their tokens."""
        vocab_size = log_probs.shape[-1]
        totals = self.rules.apply(log_probs).view(-1, self.num_beams, vocab_size) + self.beams.scores[:, :, None]
        scores, index = totals.flatten(1).topk(self.num_considered, dim=1)
        parents, tokens = index // vocab_size, index % vocab_size
        considered = self.beams.pick(parents)
        considered.ids[:, :, self.num_steps] = tokens
        considered.logprobs[:, :, self.num_steps] = log_probs.view(len(index), -1).gather(1, index)
        return considered._replace(scores=scores, lengths=considered.lengths + 1), parents, tokens

    def _ends(self, considered: _Hypotheses, tokens: Tensor) -> Tensor:
        """Which continuations are whole answers, (B, K)."""
        ends = torch.isin(tokens, self.stop_ids) | (self.num_steps >= self.limits)
        if self.stopper is not None:
            rows = considered.ids[:, :, : self.num_steps].flatten(0, 1).tolist()
            ends |= torch.tensor(self.stopper(rows), device=ends.device).view_as(ends)
        return ends

    def _collect(self, considered: _Hypotheses, ends: Tensor) -> None:
        """Keep the W best answers of each prompt, new ones among them if they are better."""
        rank = torch.arange(self.num_considered, device=ends.device)
        is_answer = ends & (rank < self.num_beams) & ~self.settled
        scores = self._worth(considered.scores).masked_fill(~is_answer, -math.inf)
        candidates = self.answers.join(considered._replace(scores=scores))
        self.answers = candidates.pick(candidates.scores.topk(self.num_beams, dim=1).indices)

    def _settle(self) -> None:
        """Note which prompts can find nothing better."""
        worst, best = self.answers.scores[:, -1:], self._worth(self.beams.scores[:, :1])
        enough = worst > -math.inf
        if not self.sampling.early_stopping:
            enough &= best <= worst
        self.settled |= enough | (best == -math.inf)

    def _worth(self, scores: Tensor) -> Tensor:
        """What log-probabilities at the present length are compared by."""
        return scores / self.num_steps**self.sampling.length_penalty

    def result(self) -> BeamResult:
        """Give the best answer to each prompt."""
        lengths: list[int] = self.answers.lengths[:, 0].tolist()
        sequences = self.answers.ids[:, 0, : max(lengths)]
        rows = [row[:length] for row, length in zip(sequences.tolist(), lengths, strict=True)]
        found = self.stopper(rows) if self.stopper is not None else [False] * len(rows)
        stop_ids = self.stop_ids.tolist()
        stopped_by = [
            "eos" if row[-1] in stop_ids else "stop" if has_stop else "length" for row, has_stop in zip(rows, found)
        ]
        logprobs = self.answers.logprobs[:, 0, : max(lengths)]
        return BeamResult(sequences, lengths, stopped_by, logprobs, self.answers.scores[:, 0])
