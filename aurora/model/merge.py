"""Which layers merge how many tokens, known before the encoder runs, and the bookkeeping of merged tokens.

The published rule removes `r = int(W * H / patch**2 * (1 - token_kept_ratio) / num_layers)` tokens in every layer
(xtuner aurora.py:895), at most half of the unprotected ones. It floors r and its features leave one layer early, so it
keeps more than asked: 378 px at 0.2 delivers 171 of 729 tokens. A `MergePlan` therefore states what will be delivered.

The matching and the merge themselves are ops: see `aurora.kernels.merge`. Shape letters: B rows, N tokens, C width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from aurora.kernels.merge import Matching, match_tokens, max_merges, merge_tokens, merged_positions

if TYPE_CHECKING:
    from aurora.model.vision import VisionConfig

__all__ = [
    "MERGE_CHOICES",
    "Matching",
    "MergeConfig",
    "MergePlan",
    "Schedule",
    "SizeBias",
    "TextPositions",
    "TextSizeBias",
    "match_tokens",
    "max_merges",
    "merge_source",
    "merge_tokens",
    "plan_clip",
    "plan_merge",
    "unmerge_tokens",
]


class Schedule(Enum):
    """How the merges are spread over the layers."""

    constant = "constant"
    """The published rule: the same r in every layer. Keeps more than asked; released weights were trained with it."""
    exact = "exact"
    """Delivers max(1, round(ratio * N)) tokens, evenly spread."""
    linear = "linear"
    """As many merges in all as `constant`, in a number per layer that changes linearly (see `inflection`)."""
    list = "list"
    """r given for each layer."""


class SizeBias(Enum):
    """Where log(size) enters the attention of the vision tower."""

    off = "off"
    """Nowhere: what released weights were trained with (their query-axis term cancels in the softmax)."""
    keys = "keys"
    """On the key axis: proportional attention of Token Merging."""


class TextSizeBias(Enum):
    """Where log(size) enters the attention of the language model, which reads merged tokens as if all were alike."""

    off = "off"
    """Nowhere: what released weights were trained with."""
    visual = "visual"
    """On visual keys: a token that stands for n patches weighs as much as n equal ones (RESTORE, 2026)."""


class TextPositions(Enum):
    """Which positions visual tokens have in the language model."""

    merged = "merged"
    """Counted as delivered, in the order of the merge: what released weights were trained with."""
    original = "original"
    """Where their patches were, as if nothing had merged: each token stands at the mean of its patches, tokens are in
    the order of these means, and the text behind a frame counts all its patches."""


MERGE_CHOICES: dict[str, type[Enum]] = {
    "schedule": Schedule,
    "size_bias": SizeBias,
    "text_size_bias": TextSizeBias,
    "text_positions": TextPositions,
}
"""Fields of `MergeConfig` that are choices."""


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """How many visual tokens reach the language model, and how they get there."""

    token_kept_ratio: float = 1.0
    """Share of visual tokens to keep, in (0, 1]; the authors advise 0.2-0.4 for captions, > 0.5 for VQA, > 0.8 OCR."""
    schedule: Schedule = Schedule.constant
    """constant | exact | linear | list: how the merges are spread over the layers."""
    inflection: float = -1.0
    """Slope of the linear schedule, in [-1, 1]: -1 merges most in the first layers (fastest), 0 alike, 1 last."""
    r: list[int] = field(default_factory=list)
    """Tokens to merge in each layer that runs, for schedule=list."""
    visual_token_budget: int | None = None
    """At most so many visual tokens for a whole clip, instead of a ratio; spread evenly over its frames."""
    size_bias: SizeBias = SizeBias.off
    """off | keys: add log(token size) to the attention scores of the tower."""
    slowfast: bool = False
    """Keep every token of a clip's first frame and merge the others."""
    text_size_bias: TextSizeBias = TextSizeBias.off
    """off | visual: add log(token size) to the attention scores of visual keys in the language model."""
    text_positions: TextPositions = TextPositions.merged
    """merged | original: positions of visual tokens in the language model."""

    def __post_init__(self) -> None:
        if not 0.0 < self.token_kept_ratio <= 1.0:
            raise ValueError(f"merge.token_kept_ratio={self.token_kept_ratio}: want a number in (0, 1]")
        if not -1.0 <= self.inflection <= 1.0:
            raise ValueError(f"merge.inflection={self.inflection}: want a number in [-1, 1]")
        if any(r < 0 for r in self.r):
            raise ValueError(f"merge.r={self.r}: want no negative count")
        if self.r and self.schedule is not Schedule.list:
            raise ValueError(f"merge.r={self.r}: is read with merge.schedule=list only, got {self.schedule.value}")
        if self.visual_token_budget is not None:
            if self.visual_token_budget < 1:
                raise ValueError(f"merge.visual_token_budget={self.visual_token_budget}: want at least 1")
            if self.schedule is Schedule.list:
                raise ValueError(
                    "merge.visual_token_budget: cannot hold together with merge.schedule=list; want one of them"
                )


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What one frame will go through: merges per layer and the tokens left; the class token is not counted."""

    r: tuple[int, ...]
    """Tokens merged in each layer that runs; nothing is clamped any further."""
    tokens: tuple[int, ...]
    """Visual tokens before the first layer and after each one; one entry more than r."""

    @property
    def num_patches(self) -> int:
        """Visual tokens before any merging."""
        return self.tokens[0]

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens delivered."""
        return self.tokens[-1]


def plan_merge(
    config: MergeConfig, *, height_px: int, width_px: int, vision: VisionConfig, num_active_layers: int
) -> MergePlan:
    """Plan the merging of one frame.

    Args:
        config: The wish; its budget and slowfast concern whole clips and are not looked at here.
        height_px: Frame height in pixels; rows of pixels that fill no patch are dropped by the tower.
        width_px: Frame width in pixels.
        vision: The tower: its patch size, and its layers, which the published rule divides by.
        num_active_layers: Layers that run before the features leave.

    Returns:
        The plan.

    Raises:
        ValueError: if the frame holds no patch, `r` has the wrong length, or `exact` asks for fewer tokens than
            halving in every layer can reach.
    """
    num_patches = _num_patches(height_px, width_px, vision.patch_size)
    if config.schedule is Schedule.exact:
        target = max(1, round(config.token_kept_ratio * num_patches))
        return _plan_count(
            num_patches, target, [1.0] * num_active_layers, f"merge.token_kept_ratio={config.token_kept_ratio}"
        )
    if config.schedule is Schedule.list:
        if len(config.r) != num_active_layers:
            raise ValueError(
                f"merge.r: got {len(config.r)} counts, want {num_active_layers}, one for each layer that runs"
            )
        return _plan_clamped(num_patches, config.r)
    # The published expression in its double-precision order: 112x280 at 0.8 gives 0 where exact arithmetic gives 1.
    r = int(width_px * height_px / vision.patch_size**2 * (1 - config.token_kept_ratio) / vision.num_layers)
    plan = _plan_clamped(num_patches, [r] * num_active_layers)
    if config.schedule is Schedule.linear:
        return _plan_count(
            num_patches, plan.num_visual_tokens, _slope(config.inflection, num_active_layers), "merge.schedule=linear"
        )
    return plan


def plan_clip(
    config: MergeConfig,
    *,
    num_frames: int,
    height_px: int,
    width_px: int,
    vision: VisionConfig,
    num_active_layers: int,
) -> tuple[MergePlan, ...]:
    """Plan the merging of every frame of a clip; arguments as in `plan_merge`.

    With a budget each merged frame gets the same count, so at most (number of merged frames - 1) tokens of it stay
    unused unless every frame is delivered whole. With slowfast the first of several frames is not merged, and counts.

    Raises:
        ValueError: as `plan_merge`; or if the budget does not hold one token for each frame.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: want at least 1")

    def plan_frame(wish: MergeConfig) -> MergePlan:
        return plan_merge(
            wish, height_px=height_px, width_px=width_px, vision=vision, num_active_layers=num_active_layers
        )

    whole = plan_frame(MergeConfig())
    num_slow = 1 if config.slowfast and num_frames > 1 else 0
    if config.visual_token_budget is None:
        merged = plan_frame(config)
    else:
        merged = _plan_budget(config, config.visual_token_budget, num_frames, num_slow, whole)
    return (whole,) * num_slow + (merged,) * (num_frames - num_slow)


def _plan_budget(config: MergeConfig, budget: int, num_frames: int, num_slow: int, whole: MergePlan) -> MergePlan:
    num_merged = num_frames - num_slow
    num_patches, num_active_layers = whole.num_patches, len(whole.r)
    per_frame = (budget - num_slow * num_patches) // num_merged
    smallest = _smallest_count(num_patches, num_active_layers)
    if per_frame < smallest:
        slow = f" and {num_patches} for the unmerged first frame" if num_slow else ""
        raise ValueError(
            f"merge.visual_token_budget={budget}: {num_merged} merged frames need at least {smallest} token"
            f"{'s' if smallest > 1 else ''} each{slow}; want at least {num_slow * num_patches + num_merged * smallest}"
        )
    slope = _slope(config.inflection if config.schedule is Schedule.linear else 0.0, num_active_layers)
    return _plan_count(num_patches, min(per_frame, num_patches), slope, f"merge.visual_token_budget={budget}")


def _num_patches(height_px: int, width_px: int, patch_size: int) -> int:
    rows, columns = height_px // patch_size, width_px // patch_size
    if rows < 1 or columns < 1:
        raise ValueError(
            f"frame of {height_px}x{width_px} px (height x width): want at least one patch of {patch_size} px"
        )
    return rows * columns


def _smallest_count(num_patches: int, num_layers: int) -> int:
    return -(-num_patches // (1 << num_layers))


def _slope(inflection: float, num_layers: int) -> list[float]:
    return [1.0 + inflection * ((2 * layer + 1) / num_layers - 1.0) for layer in range(num_layers)]


def _plan_clamped(num_patches: int, wanted: list[int]) -> MergePlan:
    tokens, r = [num_patches], []
    for count in wanted:
        # One more for the class token, which is protected: half of the visual tokens, rounded down.
        r.append(min(count, max_merges(tokens[-1] + 1, class_token=True)))
        tokens.append(tokens[-1] - r[-1])
    return MergePlan(tuple(r), tuple(tokens))


def _plan_count(num_patches: int, target: int, weights: list[float], name: str) -> MergePlan:
    """Deliver exactly `target` tokens with merges in proportion to `weights`, each layer at most halving its tokens.

    Layers are filled from the last to the first, where the room is largest: a layer that ends with n tokens merged at
    most n. What a layer cannot take, earlier ones do; if a falling slope leaves the first one short of room, the even
    spread is used.
    """
    smallest = _smallest_count(num_patches, len(weights))
    if target < smallest:
        raise ValueError(
            f"{name}: asks for {target} of {num_patches} visual tokens, but halving them in each of {len(weights)} "
            f"layers leaves {smallest}; want a count of at least {smallest}"
        )
    total = num_patches - target
    for spread in (weights, [1.0] * len(weights)):
        r = _fill_backwards(total, target, spread)
        if r is not None:
            tokens = [num_patches]
            for count in r:
                tokens.append(tokens[-1] - count)
            return MergePlan(tuple(r), tuple(tokens))
    raise AssertionError(f"no plan for {target} of {num_patches} tokens in {len(weights)} layers")


def _fill_backwards(total: int, target: int, weights: list[float]) -> list[int] | None:
    scale = total / sum(weights)
    r = [int(scale * weight) for weight in weights]
    short = total - sum(r)
    r = [count + (layer < short) for layer, count in enumerate(r)]  # what rounding left over goes to the first layers
    carry, tokens = 0, target
    for layer in range(len(weights) - 1, -1, -1):
        wanted = r[layer] + carry
        r[layer] = min(wanted, tokens)
        carry, tokens = wanted - r[layer], tokens + r[layer]
    return None if carry else r


def merge_source(source: Tensor, match: Matching) -> Tensor:
    """Follow the input tokens through one more merge.

    Args:
        source: Index of the token that holds each input token before the merge, (B, N_input) int64.
        match: The merge.

    Returns:
        The same after the merge, (B, N_input) int64.
    """
    return merged_positions(match).gather(1, source)


def unmerge_tokens(x: Tensor, match: Matching) -> Tensor:
    """Give every input token of a merge the features of the token it ended in.

    Args:
        x: Merged tokens, (B, N - R, C).
        match: The merge that produced them.

    Returns:
        (B, N, C).

    Raises:
        ValueError: if x does not have N - R tokens.
    """
    want = match.num_tokens - match.src_idx.shape[1]
    if x.shape[1] != want:
        raise ValueError(f"unmerge_tokens: got {x.shape[1]} tokens, want {want}")
    return x.gather(1, merged_positions(match)[..., None].expand(-1, -1, x.shape[-1]))
