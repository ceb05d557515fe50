"""How the next token is chosen: greedy, or drawn after temperature, top-k, top-p and min-p, with a repetition penalty.

Each row draws by inverse CDF from numbers of its own generator, so what a row samples depends on its logits and its
seed, not on the rows beside it nor on the device. A step is tensor operations on tensors that stay where they are: a
CUDA graph can hold it. Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

DRAWS_AT_ONCE = 256
"""Random numbers drawn together for each row; the device is given new ones when they are used up."""
_LEAST = 1e-6
"""Of numbers that divide logits, which would be infinite else."""
_HEAD = 512
"""On a CPU, top-p first looks at so many likeliest tokens: ordering a whole vocabulary takes longer than they do."""


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How an answer is generated."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum, in (0, 1]."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 is all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as probable as the most probable one, in [0, 1]; 0 is all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already generated become less probable (Keskar et al., 2019); the prompt does not count, as in
    the published code, which gave the language model embeddings and so no ids to punish."""
    max_new_tokens: int = 256
    """Stop after this many tokens."""
    min_new_tokens: int = 0
    """Before this many, no token that ends an answer is chosen; stop strings still end it."""
    eos_token_id: int | list[int] | None = None
    """Token or tokens that end an answer; None is the model's, -1 never stops."""
    stop: str | list[str] = field(default_factory=list)
    """A row also ends when its text holds this, or one of these."""
    seed: int | list[int] | None = None
    """Of every row, or one for each row; None draws seeds from torch's default generator."""
    num_beams: int = 1
    """Hypotheses a beam search keeps for each prompt; 1 is no search."""
    length_penalty: float = 1.0
    """A beam's log-probability is divided by its length to this power: above 0 favours long answers."""
    early_stopping: bool = False
    """Whether a beam search ends with its first num_beams answers, or goes on while a better one seems possible."""

    def __post_init__(self) -> None:
        self._check_filters()
        self._check_lengths()
        self._check_beams()
        seeds = self.seed if isinstance(self.seed, list) else [self.seed]
        if not all(value is None or (_is_integer(value) and 0 <= value < 2**63) for value in seeds):
            raise ValueError(f"seed={self.seed!r}: want an integer >= 0, or one for each row")

    def _check_filters(self) -> None:
        if not _is_number(self.temperature) or not (self.temperature == 0 or _LEAST <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r}: want a number >= {_LEAST}, or 0 (greedy)")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: want a number in (0, 1]")
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r}: want an integer >= 0 (0 is all tokens)")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p!r}: want a number in [0, 1] (0 is all tokens)")
        if not _is_number(self.repetition_penalty) or not _LEAST <= self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty!r}: want a number >= {_LEAST} (1 is none)")

    def _check_lengths(self) -> None:
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r}: want an integer >= 1")
        if not _is_integer(self.min_new_tokens) or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens!r}: want an integer from 0 to max_new_tokens="
                f"{self.max_new_tokens}"
            )
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if not all(value is None or (_is_integer(value) and value >= -1) for value in ids):
            raise ValueError(
                f"eos_token_id={self.eos_token_id!r}: want a token id, a list of them, or -1 to never stop"
            )
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError(f"stop={self.stop!r}: want a text that is not empty, or a list of them")

    def _check_beams(self) -> None:
        if not _is_integer(self.num_beams) or self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams!r}: want an integer >= 1 (1 is no beam search)")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams={self.num_beams}, temperature={self.temperature}: a beam search does not sample, want "
                "temperature=0 or num_beams=1"
            )
        if not _is_number(self.length_penalty) or not abs(self.length_penalty) <= 10:
            raise ValueError(f"length_penalty={self.length_penalty!r}: want a number from -10 to 10 (0: no preference)")
        if not isinstance(self.early_stopping, bool):
            raise ValueError(f"early_stopping={self.early_stopping!r}: want True or False")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def stop_ids(self, default: int) -> frozenset[int]:
        """Tokens that end an answer, `default` where the config names none; empty if nothing does."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return frozenset(default if value is None else value for value in ids) - {-1}


class LogitRules:
    """What changes the scores of tokens before one is chosen, by what a row has generated so far."""

    def __init__(
        self,
        config: SamplingConfig,
        *,
        batch_size: int,
        vocab_size: int,
        device: torch.device,
        stop_ids: Collection[int] = (),
    ) -> None:
        """Prepare rows that have generated nothing.

        Args:
            config: repetition_penalty and min_new_tokens.
            batch_size: Rows B.
            vocab_size: Token ids V.
            device: Where the scores are.
            stop_ids: Tokens that end an answer.

        Raises:
            ValueError: if min_new_tokens forbids every token.
        """
        self._penalty = config.repetition_penalty
        self._min_new_tokens = config.min_new_tokens
        self._seen: Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=device)
        self._stops: Tensor | None = None
        known = {token for token in stop_ids if token < vocab_size}
        if config.min_new_tokens > 0 and known:
            if len(known) == vocab_size:
                raise ValueError(
                    f"min_new_tokens={config.min_new_tokens}: every token is in eos_token_id, want one that is not"
                )
            self._stops = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._stops[list(known)] = True
        # On the device, so that a step never asks the host how far it is.
        self._num_chosen = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def any_apply(self) -> bool:
        """Whether there is a rule."""
        return self._seen is not None or self._stops is not None

    def apply(self, scores: Tensor) -> Tensor:
        """Change the scores of the next tokens.

        Args:
            scores: Logits or log-probabilities, (B, V) float32; not changed.

        Returns:
            (B, V) float32: tokens of the row punished, -inf where the answer must not end yet.
        """
        if self._seen is not None:
            punished = torch.where(scores > 0, scores / self._penalty, scores * self._penalty)
            scores = torch.where(self._seen, punished, scores)
        if self._stops is not None:
            scores = scores.masked_fill(self._stops & (self._num_chosen < self._min_new_tokens), -math.inf)
        return scores

    def record(self, ids: Tensor) -> None:
        """Note what was chosen, (B,) int64."""
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        if self._stops is not None:
            self._num_chosen.add_(1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, (B_new,) int64, in this order; one may come several times."""
        if self._seen is not None:
            self._seen = self._seen[rows]


class Sampler:
    """Chooses one token per row and step, and remembers what it chose.

    `prepare` is the host's part of a step and `choose` the device's: capture `choose` in a graph and call `prepare`
    before each replay, or call the sampler, which does both.
    """

    logprobs: Tensor | None
    """With keep_logprobs: log-probability of each token chosen last, before any rule, (B,) float32, one buffer."""

    def __init__(
        self,
        config: SamplingConfig,
        *,
        batch_size: int,
        vocab_size: int,
        device: torch.device,
        stop_ids: Collection[int] = (),
        keep_logprobs: bool = False,
    ) -> None:
        """Prepare a batch.

        Args:
            config: How to choose.
            batch_size: Rows B.
            vocab_size: Token ids V.
            device: Where the logits are.
            stop_ids: Tokens that end an answer, see `SamplingConfig.stop_ids`; needed for min_new_tokens.
            keep_logprobs: Fill `logprobs`.

        Raises:
            ValueError: if seeds are given for another number of rows, or min_new_tokens forbids every token.
        """
        self.config = config
        if isinstance(config.seed, list) and len(config.seed) != batch_size:
            raise ValueError(f"seed: got {len(config.seed)} seeds, want {batch_size}, one for each row")
        self._rules = LogitRules(config, batch_size=batch_size, vocab_size=vocab_size, device=device, stop_ids=stop_ids)
        self._generators = [] if config.greedy else [_generator(config.seed, row) for row in range(batch_size)]
        self._draws = torch.empty(batch_size, 0 if config.greedy else DRAWS_AT_ONCE, dtype=torch.float64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_used = DRAWS_AT_ONCE
        self.logprobs = torch.zeros(batch_size, device=device) if keep_logprobs else None

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose the next tokens.

        Args:
            logits: Of the next position, (B, V).

        Returns:
            Token ids, (B,) int64.
        """
        self.prepare()
        return self.choose(logits)

    def prepare(self) -> None:
        """Give the device new random numbers if the last ones are used up; never waits for it."""
        if self.config.greedy:
            return
        if self._num_used == DRAWS_AT_ONCE:
            drawn = [torch.rand(DRAWS_AT_ONCE, dtype=torch.float64, generator=one) for one in self._generators]
            self._draws.copy_(torch.stack(drawn), non_blocking=True)
            self._column.zero_()
            self._num_used = 0
        self._num_used += 1

    def choose(self, logits: Tensor) -> Tensor:
        """Choose the next tokens by tensor operations alone; see `__call__` and `prepare`."""
        logits = logits.float()
        scores = self._rules.apply(logits)
        ids = scores.argmax(dim=-1) if self.config.greedy else self._draw(scores)  # (B,)
        self._rules.record(ids)
        if self.logprobs is not None:
            self.logprobs.copy_(logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0])
        return ids

    @property
    def is_argmax(self) -> bool:
        """Whether the largest logit is all that it looks for and keeps, so that a decoder may look for it itself."""
        return self.config.greedy and self.logprobs is None and not self._rules.any_apply

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, (B_new,) int64, each at most once; graphs that hold `choose` are void."""
        self._rules.keep(rows)
        self._draws = self._draws[rows]
        if self._generators:
            self._generators = [self._generators[row] for row in rows.tolist()]
        if self.logprobs is not None:
            self.logprobs = self.logprobs[rows]

    def _draw(self, logits: Tensor) -> Tensor:
        config = self.config
        probabilities = filter_probabilities(
            logits / config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
        )  # (B, V) float64
        drawn = self._draws.index_select(1, self._column)  # (B, 1)
        self._column.add_(1)
        cumulative = probabilities.cumsum(dim=-1)
        total = cumulative[:, -1:]
        # Below the total even where the product rounds up to it.
        threshold = torch.minimum(drawn * total, total.nextafter(torch.zeros_like(total)))
        # The first token whose cumulative probability exceeds the draw; one of probability 0 never does. Logits
        # that are not finite give none; an id that does not exist would end a GPU's process before they are found out.
        return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def are_finite(logits: Tensor) -> Tensor:
    """Whether all logits of a row are numbers, (B, V) to (B,): a NaN or an infinity shows in their sum."""
    return logits.sum(dim=-1, dtype=torch.float32).isfinite()


def if_finite(ids: Tensor, logits: Tensor) -> Tensor:
    """Tokens (B,) chosen from logits (B, V); -1 where these are not finite, as nothing was chosen then."""
    return torch.where(are_finite(logits), ids, -1)


def not_finite(token: int, dtype: torch.dtype) -> str:
    """Say that the logits of a new token, counted from 1, are none."""
    return f"logits of new token {token} are not finite in {dtype}; want a wider dtype or sound weights"


def filter_probabilities(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Probabilities with everything outside top-k, then top-p, then min-p set to 0; not normalised again.

    Args:
        logits: (B, V), temperature applied.
        top_k: Keep this many; 0 is all. Of equal ones the lowest ids are kept.
        top_p: Keep the fewest whose sum, among what top_k left, reaches this; at least one.
        min_p: Keep those at least this share as probable as the largest.

    Returns:
        (B, V) float64.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(~_largest(logits, least, top_k), -math.inf)
    probabilities = logits.double().softmax(dim=-1)
    kept = probabilities
    if top_p < 1:
        ordered = _descending(probabilities, top_p)  # (B, up to V)
        reached_before = ordered.cumsum(dim=-1) - ordered
        count = (reached_before < top_p).sum(dim=-1, keepdim=True)  # (B, 1), at least 1
        kept = kept.masked_fill(~_largest(probabilities, ordered.gather(1, count - 1), count), 0.0)
    if min_p > 0:
        kept = kept.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), 0.0)
    return kept


def _largest(values: Tensor, least: Tensor, count: Tensor | int) -> Tensor:
    """Mark the `count` largest of each row, given the least of them (B, 1); of equal ones the lowest ids."""
    above, equal = values > least, values == least
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= room))


def _descending(probabilities: Tensor, top_p: float) -> Tensor:
    """The largest probabilities of each row in order, (B, S), as many as top_p can need."""
    if probabilities.device.type == "cpu" and probabilities.shape[-1] > _HEAD:
        head = probabilities.topk(_HEAD, dim=-1).values
        if bool((head.sum(dim=-1) > top_p).all()):
            return head
    return probabilities.sort(dim=-1, descending=True).values


def _generator(seed: int | list[int] | None, row: int) -> torch.Generator:
    if isinstance(seed, list):
        seed = seed[row]
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    return torch.Generator().manual_seed(seed)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
