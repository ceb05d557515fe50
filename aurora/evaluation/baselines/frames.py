"""What all baselines share: frames through the whole tower, and fewer tokens of them as a prefix for `generate`.

Shape letters: F frames, N patches of a frame, K tokens kept, C width of the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from aurora.generation.state import synchronized_s
from aurora.model.captioner import AuroraModel
from aurora.model.merge import MergeConfig, MergePlan, SizeBias
from aurora.model.splice import VisualFeatures
from aurora.model.vision import VisionBlock, num_active_layers
from aurora.modeling import AuroraForConditionalGeneration, VisualPrefix


class TowerFrames(NamedTuple):
    """The frames of one clip behind the tower, nothing merged."""

    hidden: Tensor
    """Patches in raster order, (F, N, C), without the class token."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    last_input: Tensor
    """What the last block that ran was given, (F, prefix + N, C)."""
    last_block: VisionBlock
    """That block."""


class Reduced(NamedTuple):
    """Fewer tokens."""

    tokens: Tensor
    """(F, K, C)."""
    sizes: Tensor
    """Patches that each token stands for, (F, K) float32."""


Reduction: TypeAlias = Callable[[TowerFrames, int, int], Reduced]
"""A baseline: (frames, tokens to keep of each, seed) -> exactly so many tokens of each frame."""


@torch.inference_mode()
def encode_reduced(
    model: AuroraForConditionalGeneration,
    reduction: Reduction,
    pixel_values: Sequence[Tensor],
    num_tokens: int,
    seeds: Sequence[int],
) -> VisualPrefix:
    """Encode clips whole, reduce the tokens of each frame, and project what is left.

    Args:
        model: The captioner.
        reduction: Which tokens are left, and what they hold.
        pixel_values: Normalised frames of each clip, (F, 3, H, W).
        num_tokens: Tokens to keep of each frame.
        seeds: For each clip, of a reduction's random choices.

    Returns:
        What `model.encode` returns, for `generate(prefix=...)`; its seconds include the reduction.

    Raises:
        ValueError: if the model keeps its class token, a frame has fewer than `num_tokens` patches, or the reduction
            cannot deliver so many.
    """
    if model.config.feature_select_strategy == "full":
        raise ValueError("baselines: want a model with feature_select_strategy=default, got full")
    start = synchronized_s(model.device)
    frames: list[list[Tensor]] = []
    sizes: list[list[Tensor]] = []
    plans: list[tuple[MergePlan, ...]] = []
    for clip, seed in zip(pixel_values, seeds, strict=True):
        whole = run_tower(model.model, clip)
        num_patches = whole.hidden.shape[1]
        if not 1 <= num_tokens <= num_patches:
            raise ValueError(f"num_tokens={num_tokens}: want 1 to {num_patches}, the patches of a frame")
        kept = reduction(whole, num_tokens, seed)
        assert kept.tokens.shape[:2] == kept.sizes.shape == (len(clip), num_tokens)
        frames.append(list(model.model.projector(kept.tokens)))
        sizes.append(list(kept.sizes))
        plans.append((_plan(num_patches, num_tokens, model.model),) * len(clip))
    features = VisualFeatures(
        frames=frames,
        plans=plans,
        traces=[],
        sizes=sizes,
        centres=[[] for _ in frames],
        merges=[MergeConfig()] * len(frames),
    )
    return VisualPrefix(features=features, seconds=synchronized_s(model.device) - start)


def run_tower(model: AuroraModel, clip: Tensor) -> TowerFrames:
    """Run the frames of one clip, (F, 3, H, W), through the tower as `model.encode` does without merging."""
    tower = model.vision_tower
    x, grid = tower.embed(clip.to(tower.patch_embed.weight.dtype))
    size = torch.ones(*x.shape[:2], 1, dtype=torch.float32, device=x.device)
    blocks = [
        block
        for block in tower.blocks[: num_active_layers(model.config.vision, model.config.feature_layer)]
        if isinstance(block, VisionBlock)
    ]
    last_input = x
    for block in blocks:
        last_input = x
        x, size, _ = block(x, size, 0, SizeBias.off, tower.backend)
    return TowerFrames(x[:, model.config.vision.num_prefix_tokens :], grid, last_input, blocks[-1])


def take(frames: TowerFrames, indices: Tensor) -> Reduced:
    """Keep the patches with these indices, (F, K) int64, in their order, each standing for itself alone."""
    tokens = frames.hidden.gather(1, indices[..., None].expand(-1, -1, frames.hidden.shape[-1]))
    return Reduced(tokens, torch.ones(indices.shape, dtype=torch.float32, device=tokens.device))


def _plan(num_patches: int, num_tokens: int, model: AuroraModel) -> MergePlan:
    """No merge in any layer, and everything that goes behind the last one."""
    before = num_active_layers(model.config.vision, model.config.feature_layer) - 1
    return MergePlan((0,) * before + (num_patches - num_tokens,), (num_patches,) * (before + 1) + (num_tokens,))
