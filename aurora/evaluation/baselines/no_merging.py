"""No merging: every patch of every frame."""

from __future__ import annotations

import torch

from aurora.evaluation.baselines.frames import Reduced, TowerFrames, take


def no_merging(frames: TowerFrames, num_tokens: int, seed: int) -> Reduced:
    """Keep all patches.

    Args:
        frames: A clip behind the tower.
        num_tokens: The number of patches of a frame, nothing else.
        seed: Not used.

    Returns:
        All tokens.

    Raises:
        ValueError: for another number of tokens.
    """
    num_frames, num_patches = frames.hidden.shape[:2]
    if num_tokens != num_patches:
        raise ValueError(f"no_merging: asked for {num_tokens} tokens of a frame, want {num_patches}, all there are")
    return take(frames, torch.arange(num_patches, device=frames.hidden.device).expand(num_frames, -1))
