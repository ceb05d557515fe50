"""Many questions about one clip in one forward pass: the prefix once, then turns that do not see each other.

Every turn continues the same prefix, so its positions start where the prefix ends and its mask hides the other turns:
each answer is learned exactly as inference asks for it.

Shape letters: B clips, P prefix positions, S packed turn positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that predicts nothing."""
_PUNCTUATION = ".,;:!?\"'()"


class TurnTokenizer(Protocol):
    """What turns need of a tokenizer."""

    eos_id: int

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Return the ids of `text`."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its answer, as ids."""

    name: str
    """What is asked, for per-question scores."""
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Ends with the end-of-sequence id."""
    weights: tuple[float, ...]
    """Loss weight of each answer id."""


class PackedTurns(NamedTuple):
    """The turns of B clips side by side."""

    input_ids: Tensor
    """(B, S) int64."""
    labels: Tensor
    """Next id where an answer is learned, else `IGNORED`; (B, S) int64."""
    weights: Tensor
    """Loss weight of each label, (B, S) float32."""
    position_ids: Tensor
    """Positions behind the prefix, (B, S) int64."""
    turn_index: Tensor
    """Turn of each position, -1 on padding; (B, S) int64."""


def answer_tokens(
    answer: str, tokenizer: TurnTokenizer, *, slot_words: frozenset[str], slot_weight: float
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the ids of an answer with the end of sequence, and the loss weight of each, higher on fact words."""
    ids: list[int] = []
    weights: list[float] = []
    for word in answer.split():
        pieces = tokenizer.encode(word)
        weight = slot_weight if word.strip(_PUNCTUATION).lower() in slot_words else 1.0
        ids += pieces
        weights += [weight] * len(pieces)
    return (*ids, tokenizer.eos_id), (*weights, 1.0)


def pack_turns(turns: Sequence[Sequence[Turn]], prefix_lengths: Sequence[int], *, pad_id: int) -> PackedTurns:
    """Lay the turns of each clip behind its prefix.

    Args:
        turns: Turns of each clip; a clip has at least one.
        prefix_lengths: Positions of each clip's prefix.
        pad_id: Id on padding.

    Returns:
        The packed turns, padded on the right to the longest clip.

    Raises:
        ValueError: if the lengths differ in number or a clip has no turn.
    """
    if len(turns) != len(prefix_lengths) or not all(turns):
        counts = [len(row) for row in turns]
        raise ValueError(f"turns: got {counts} for {len(prefix_lengths)} prefixes, want one or more each")
    rows = [[len(turn.prompt_ids) + len(turn.answer_ids) - 1 for turn in row] for row in turns]
    shape = (len(turns), max(sum(lengths) for lengths in rows))
    packed = PackedTurns(
        torch.full(shape, pad_id),
        torch.full(shape, IGNORED),
        torch.zeros(shape),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, -1),
    )
    for b, row in enumerate(turns):
        start = 0
        for index, (turn, length) in enumerate(zip(row, rows[b], strict=True)):
            span = slice(start, start + length)
            first_label = start + len(turn.prompt_ids) - 1  # the last prompt id predicts the first answer id
            packed.input_ids[b, span] = torch.tensor((*turn.prompt_ids, *turn.answer_ids[:-1]))
            packed.labels[b, first_label : start + length] = torch.tensor(turn.answer_ids)
            packed.weights[b, first_label : start + length] = torch.tensor(turn.weights)
            packed.position_ids[b, span] = torch.arange(length) + prefix_lengths[b]
            packed.turn_index[b, span] = index
            start += length
    return packed


def turn_mask(prefix_lengths: Sequence[int], prefix_width: int, turn_index: Tensor) -> Tensor:
    """Return who sees whom: the prefix causally, a turn the prefix and its own past, padding itself.

    Args:
        prefix_lengths: Valid prefix positions of each clip; the prefix is padded on the right.
        prefix_width: P.
        turn_index: Turn of each packed position, -1 on padding; (B, S).

    Returns:
        (B, P + S, P + S) bool.
    """
    S = turn_index.shape[1]
    valid = torch.arange(prefix_width)[None] < torch.tensor(prefix_lengths)[:, None]  # (B, P)
    owner = torch.cat([torch.where(valid, -2, -1), turn_index], dim=1)  # -2 prefix, -1 padding, else the turn
    same = owner[:, :, None] == owner[:, None, :]
    to_prefix = (owner >= 0)[:, :, None] & (owner == -2)[:, None, :]
    causal = torch.ones(prefix_width + S, prefix_width + S, dtype=torch.bool).tril()
    return (same | to_prefix) & causal


def turn_loss(logits: Tensor, packed: PackedTurns) -> Tensor:
    """Return the mean over clips of the weighted mean cross-entropy of a clip's answers.

    Args:
        logits: (B, S, V), any float dtype; the loss is float32.
        packed: The turns.
    """
    by_class = logits.float().transpose(1, 2)  # (B, V, S)
    losses = F.cross_entropy(by_class, packed.labels, ignore_index=IGNORED, reduction="none")  # (B, S)
    return ((losses * packed.weights).sum(dim=1) / packed.weights.sum(dim=1)).mean()


def exact_turns(logits: Tensor, packed: PackedTurns) -> list[list[bool]]:
    """Return for each clip and turn whether greedy decoding would give exactly the answer."""
    right = (logits.argmax(dim=-1) == packed.labels) | (packed.labels == IGNORED)  # (B, S)
    return [
        [bool(right[b][packed.turn_index[b] == turn].all()) for turn in range(int(packed.turn_index[b].max()) + 1)]
        for b in range(len(right))
    ]
