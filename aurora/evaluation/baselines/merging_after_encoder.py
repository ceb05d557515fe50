"""Merging after the encoder: the same matching and weighted mean as inside it, on the tower's output."""

from __future__ import annotations

import torch

from aurora.evaluation.baselines.frames import Reduced, TowerFrames
from aurora.kernels.merge import match_tokens, max_merges, merge_tokens


def merging_after_encoder(frames: TowerFrames, num_tokens: int, seed: int) -> Reduced:
    """Merge the most similar tokens until so many are left, by cosine similarity of the features.

    One matching pairs at most half of the tokens, so below half of the patches there are several rounds.

    Args:
        frames: A clip behind the tower.
        num_tokens: Tokens to leave of each frame, any number up to its patches.
        seed: Not used.

    Returns:
        The merged tokens, in the order of the merge.
    """
    x = frames.hidden
    size = torch.ones(*x.shape[:2], 1, dtype=torch.float32, device=x.device)
    while x.shape[1] > num_tokens:
        r = min(x.shape[1] - num_tokens, max_merges(x.shape[1], class_token=False))
        x, size = merge_tokens(x, size, match_tokens(x, r, class_token=False))
    return Reduced(x, size[..., 0])
