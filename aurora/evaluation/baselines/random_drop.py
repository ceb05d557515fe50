"""Random drop: patches chosen by chance, others for each frame."""

from __future__ import annotations

import numpy as np
import torch

from aurora.evaluation.baselines.frames import Reduced, TowerFrames, take

_STREAM = 43


def random_drop(frames: TowerFrames, num_tokens: int, seed: int) -> Reduced:
    """Keep random patches, in raster order.

    Args:
        frames: A clip behind the tower.
        num_tokens: Patches to keep of each frame, any number there is.
        seed: Of the choice.

    Returns:
        The patches kept.
    """
    num_frames, num_patches = frames.hidden.shape[:2]
    rng = np.random.default_rng([_STREAM, seed])
    kept = [np.sort(rng.choice(num_patches, num_tokens, replace=False)) for _ in range(num_frames)]
    return take(frames, torch.from_numpy(np.stack(kept)).to(frames.hidden.device))
