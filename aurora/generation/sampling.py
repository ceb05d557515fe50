"""How the next token is chosen: greedy, or drawn after temperature, top-k and top-p, with a repetition penalty.

Each row draws from its own generator by inverse CDF, so what a row samples depends on its logits and its seed, not on
the rows beside it nor on the device. Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How an answer is generated."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum, in (0, 1]."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already generated become less probable (Keskar et al., 2019); the prompt does not count."""
    max_new_tokens: int = 256
    """Stop after this many tokens."""
    eos_token_id: int | list[int] | None = None
    """Token or tokens that end an answer; None is the model's, -1 never stops."""
    seed: int | list[int] | None = None
    """Of every row, or one for each row; None draws seeds from torch's default generator."""
    num_beams: int = 1
    """Beams; only 1 in this version."""

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r}: want a number >= 0 (0 is greedy)")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: want a number in (0, 1]")
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r}: want an integer >= 0 (0 is all tokens)")
        if not _is_number(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty!r}: want a number > 0 (1 is none)")
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r}: want an integer >= 1")
        if not _is_integer(self.num_beams) or self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams!r}: want 1")
        if self.num_beams > 1:
            raise ValueError(f"num_beams={self.num_beams}: beam search is not available in this version, want 1")
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if not all(value is None or (_is_integer(value) and value >= -1) for value in ids):
            raise ValueError(
                f"eos_token_id={self.eos_token_id!r}: want a token id, a list of them, or -1 to never stop"
            )
        seeds = self.seed if isinstance(self.seed, list) else [self.seed]
        if not all(value is None or (_is_integer(value) and 0 <= value < 2**63) for value in seeds):
            raise ValueError(f"seed={self.seed!r}: want an integer >= 0, or one for each row")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    def stop_ids(self, default: int) -> frozenset[int]:
        """Tokens that end an answer, `default` where the config names none; empty if nothing does."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return frozenset(default if value is None else value for value in ids) - {-1}


class Sampler:
    """Chooses one token per row and step, and remembers what it chose."""

    def __init__(self, config: SamplingConfig, *, batch_size: int, vocab_size: int, device: torch.device) -> None:
        """Prepare a batch.

        Args:
            config: How to choose.
            batch_size: Rows B.
            vocab_size: Token ids V.
            device: Where the logits are.

        Raises:
            ValueError: if seeds are given for another number of rows.
        """
        self.config = config
        if isinstance(config.seed, list) and len(config.seed) != batch_size:
            raise ValueError(f"seed: got {len(config.seed)} seeds, want {batch_size}, one for each row")
        self._generators = [] if config.greedy else [_generator(config.seed, row) for row in range(batch_size)]
        penalise = config.repetition_penalty != 1
        self._seen = torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=device) if penalise else None

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose the next tokens.

        Args:
            logits: Of the next position, (B, V).

        Returns:
            Token ids, (B,) int64.
        """
        logits = logits.float()
        if self._seen is not None:
            penalty = self.config.repetition_penalty
            punished = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, punished, logits)
        ids = logits.argmax(dim=-1) if self.config.greedy else self._draw(logits)  # (B,)
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        return ids

    def _draw(self, logits: Tensor) -> Tensor:
        config = self.config
        probabilities = filter_probabilities(
            logits / config.temperature, top_k=config.top_k, top_p=config.top_p
        )  # (B, V) float64
        drawn = torch.stack([torch.rand((), dtype=torch.float64, generator=g) for g in self._generators])
        cumulative = probabilities.cumsum(dim=-1)
        threshold = drawn.to(logits.device)[:, None] * cumulative[:, -1:]
        # The first token whose cumulative probability exceeds the draw; one of probability 0 never does.
        return (cumulative > threshold).to(torch.uint8).argmax(dim=-1)


def filter_probabilities(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities with everything outside top-k and then top-p set to 0; not normalised again.

    Args:
        logits: (B, V), temperature applied.
        top_k: Keep this many; 0 is all. Of equal ones the lowest ids are kept.
        top_p: Keep the fewest whose sum reaches this; at least one.

    Returns:
        (B, V) float64.
    """
    ordered, order = logits.double().sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if 0 < top_k < logits.shape[-1]:
        keep[:, top_k:] = False
    probabilities = ordered.masked_fill(~keep, -math.inf).softmax(dim=-1)
    if top_p < 1:
        reached_before = probabilities.cumsum(dim=-1) - probabilities
        keep &= reached_before < top_p
    probabilities = probabilities.masked_fill(~keep, 0.0)
    return torch.zeros_like(probabilities).scatter(1, order, probabilities)


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
