"""Uniform drop: patches at even distances."""

from __future__ import annotations

import torch

from aurora.evaluation.baselines.average_pooling import window_of_patch
from aurora.evaluation.baselines.frames import Reduced, TowerFrames, take


def uniform_drop(frames: TowerFrames, num_tokens: int, seed: int) -> Reduced:
    """Keep the middle patch of each window that average pooling would take the mean of, in raster order.

    Args:
        frames: A clip behind the tower.
        num_tokens: Patches to keep of each frame, any number there is.
        seed: Not used.

    Returns:
        The patches kept.
    """
    window = window_of_patch(frames.grid, num_tokens)
    middles = []
    for index in range(num_tokens):
        patches = (window == index).nonzero()[:, 0]
        rows, columns = (patches // frames.grid[1]).unique(), (patches % frames.grid[1]).unique()
        middles.append(int(rows[(len(rows) - 1) // 2] * frames.grid[1] + columns[(len(columns) - 1) // 2]))
    kept = torch.tensor(middles, device=frames.hidden.device).sort().values
    return take(frames, kept.expand(len(frames.hidden), -1))
