"""Average pooling: a frame is cut into rectangular windows of nearly equal size, and each becomes its mean."""

from __future__ import annotations

import torch
from torch import Tensor

from aurora.evaluation.baselines.frames import Reduced, TowerFrames


def average_pooling(frames: TowerFrames, num_tokens: int, seed: int) -> Reduced:
    """Replace each window by the mean of its patches.

    Args:
        frames: A clip behind the tower.
        num_tokens: Windows of a frame, any number up to its patches.
        seed: Not used.

    Returns:
        One token for each window, in raster order.
    """
    num_frames, _, width = frames.hidden.shape
    window = window_of_patch(frames.grid, num_tokens).to(frames.hidden.device)
    sizes = torch.bincount(window, minlength=num_tokens).float()  # (K,)
    total = torch.zeros(num_frames, num_tokens, width, dtype=torch.float32, device=frames.hidden.device)
    total.index_add_(1, window, frames.hidden.float())
    return Reduced((total / sizes[:, None]).to(frames.hidden.dtype), sizes.expand(num_frames, -1))


def window_of_patch(grid: tuple[int, int], num_windows: int) -> Tensor:
    """Cut a grid into windows that hold every patch once.

    The grid is cut into bands of rows, about as high as windows are wide, and each band into its share of windows. So
    any number of windows is possible: 58 of a 12 x 12 grid are six bands of 7 and two of 8.

    Args:
        grid: Rows and columns of patches.
        num_windows: 1 to rows * columns.

    Returns:
        The window of each patch in raster order, (N,) int64; windows are numbered in raster order.
    """
    rows, columns = grid
    fewest_bands = -(-num_windows // columns)
    num_bands = min(rows, max(fewest_bands, round((num_windows * rows / columns) ** 0.5)), num_windows)
    band_of_row = torch.arange(rows) * num_bands // rows
    window = torch.empty(rows, columns, dtype=torch.int64)
    first = 0
    for band in range(num_bands):
        share = num_windows * (band + 1) // num_bands - num_windows * band // num_bands
        window[band_of_row == band] = first + torch.arange(columns) * share // columns
        first += share
    return window.flatten()
