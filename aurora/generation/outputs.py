"""What the calls of `AuroraForConditionalGeneration` return.

Shape letters: B rows, L positions with visual tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from aurora.generation.prompts import Prompt
from aurora.generation.state import PromptState
from aurora.model.cache import KVCache
from aurora.model.captioner import VisualFeatures
from aurora.model.merge import MergePlan


@dataclass(kw_only=True, slots=True)
class ForwardOutput:
    """Result of a forward pass."""

    loss: Tensor | None
    """Mean cross-entropy over labelled positions, a float32 scalar; None without labels."""
    logits: Tensor
    """(B, L, V) over the expanded sequence."""
    past_key_values: KVCache | None
    """With use_cache: keys and values of the L positions."""
    visual_token_counts: list[list[int]]
    """Visual tokens delivered, per row and frame; empty for a text-only row."""
    attention_mask: Tensor
    """(B, L) bool, padding on the right."""
    labels: Tensor | None
    """(B, L) int64."""


@dataclass(kw_only=True, slots=True)
class GenerateOutput:
    """Result of `generate(..., return_dict=True)`."""

    sequences: Tensor
    """New ids only, (B, T_new) int64; a finished row is filled with the pad id."""
    visual_token_counts: list[list[int]]
    """Visual tokens delivered, per row and frame; empty for a text-only row."""
    plans: list[tuple[MergePlan, ...]]
    """For each row, the plan of each frame; empty for a text-only row."""
    seconds: dict[str, float]
    """encode, prefill and decode."""
    num_generated: list[int]
    """Tokens of each row, end-of-text included."""
    stopped_by: list[str]
    """eos, stop, length or context, for each row."""
    logits: Tensor | None
    """With output_logits: (B, T_new, V) float32."""
    logprobs: Tensor | None = None
    """With output_logprobs: log-probability of each token before any sampling rule, (B, T_new) float32, 0 behind a
    row's end."""


@dataclass(kw_only=True, slots=True)
class VisualPrefix:
    """Encoded clips, for several prompts; see `AuroraForConditionalGeneration.encode`.

    What the language model has read of the clips is kept here too, so that a later call whose prompts begin with the
    same ids up to the last frame reads only what is behind.
    """

    features: VisualFeatures
    """Projected visual tokens."""
    seconds: float
    """How long encoding took."""
    _state: PromptState | None = field(default=None, repr=False)
    _rows: dict[Prompt, int] = field(default_factory=dict, repr=False)

    def keep_state(self, heads: Sequence[Prompt], state: PromptState) -> None:
        """Keep what was read of these beginnings, instead of what was kept before."""
        self._state, self._rows = state, {head: row for row, head in enumerate(heads)}

    def find_state(self, heads: Sequence[Prompt]) -> tuple[PromptState, list[int]] | None:
        """Look for beginnings that were read: the state and their rows in it, or None unless all are there."""
        if self._state is None or not all(head in self._rows for head in heads):
            return None
        return self._state, [self._rows[head] for head in heads]

    def drop_state(self) -> None:
        """Forget what the language model has read, which frees its keys and values; the encoding stays."""
        self._state, self._rows = None, {}
