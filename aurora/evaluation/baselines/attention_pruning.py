"""Attention-based pruning: the patches that the tower itself looks at most.

As the dominant tokens of VisionZip (Yang et al., 2024) in the last block that runs: by the attention of the class
token, or, as it does for towers without one, by the mean attention of all tokens. Its second half, which merges what
is left into a few contextual tokens, is left out: this baseline shows pruning alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aurora.evaluation.baselines.frames import Reduced, TowerFrames, take


def class_attention_pruning(frames: TowerFrames, num_tokens: int, seed: int) -> Reduced:
    """Keep the patches that the class token attends to most, in raster order.

    Args:
        frames: A clip behind the tower.
        num_tokens: Patches to keep of each frame, any number there is.
        seed: Not used.

    Returns:
        The patches kept.

    Raises:
        ValueError: if the tower has no class token.
    """
    if frames.last_input.shape[1] == frames.hidden.shape[1]:
        raise ValueError("class_attention: the tower has no class token; want mean_attention")
    return _keep_highest(frames, attention_weights(frames)[:, :, 0].mean(dim=1), num_tokens)


def mean_attention_pruning(frames: TowerFrames, num_tokens: int, seed: int) -> Reduced:
    """Keep the patches that all tokens attend to most on average, in raster order.

    Args:
        frames: A clip behind the tower.
        num_tokens: Patches to keep of each frame, any number there is.
        seed: Not used.

    Returns:
        The patches kept.
    """
    return _keep_highest(frames, attention_weights(frames).mean(dim=(1, 2)), num_tokens)


def attention_weights(frames: TowerFrames) -> Tensor:
    """Attention of the last block that ran, (F, heads, queries, keys) float32; class token first if there is one."""
    block = frames.last_block
    q, k, _ = block.attn.project(block.norm1(frames.last_input))  # (F, T, H, D)
    scores = torch.einsum("fqhd,fkhd->fhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1)


def _keep_highest(frames: TowerFrames, received: Tensor, num_tokens: int) -> Reduced:
    """Keep the patches with the highest of these values, (F, prefix + N); among equals the first."""
    of_patches = received[:, received.shape[1] - frames.hidden.shape[1] :]
    order = of_patches.sort(dim=1, descending=True, stable=True).indices
    return take(frames, order[:, :num_tokens].sort(dim=1).values)
