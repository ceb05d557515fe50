"""Merge maps: every group of merged patches filled with its mean colour and outlined, as in Token Merging's figures.

What merged with what comes from the tower's own trace (`VisionTrace.sources`), never from a second matching.

Shape letters: F frames, H and W pixels, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aurora.model.captioner import AuroraModel, VisualFeatures
from aurora.model.merge import MergeConfig
from aurora.model.token_merging import TokenMerging
from aurora.model.vision import VisionTrace

Picture: TypeAlias = NDArray[np.uint8]
"""(H, W, 3), RGB."""

_GOLDEN_ANGLE = 0.618033988749895
"""Step on the colour circle that keeps neighbouring groups apart, in turns."""


class FrameTrace(NamedTuple):
    """Where to find one frame in a trace."""

    trace: VisionTrace
    row: int


def trace_frames(model: AuroraModel, pixel_values: Tensor, merge: MergeConfig) -> list[FrameTrace]:
    """Encode the frames of a clip and record what merged with what.

    Args:
        model: Encodes them.
        pixel_values: Normalised frames, (F, 3, H, W).
        merge: How to merge.

    Returns:
        One entry for each frame.

    Raises:
        ValueError: if the shape does not fit or the plan is impossible.
    """
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values: got shape {tuple(pixel_values.shape)}, want (frames, channels, height, width)")
    with torch.no_grad():
        return traces_of_clip(model.encode(pixel_values[None], merge=merge, trace=True))


def traces_of_clip(visual: VisualFeatures, clip: int = 0) -> list[FrameTrace]:
    """Put the traces of one clip's frames in order.

    Args:
        visual: What `AuroraModel.encode(..., trace=True)` returned.
        clip: Which clip of the batch.

    Returns:
        One entry for each frame.

    Raises:
        ValueError: if encoding was not traced, or there is no such clip.
    """
    found = {
        where: FrameTrace(trace, row)
        for frames, trace in visual.traces
        for row, where in enumerate(frames)
        if where[0] == clip
    }
    if not found:
        raise ValueError(
            f"clip={clip}: no trace of it; want one of the {len(visual.frames)} clips, encoded with trace=True"
        )
    return [found[where] for where in sorted(found)]


def frames_of_merging(merging: TokenMerging) -> list[FrameTrace]:
    """List the images of the last forward pass of another library's tower.

    Args:
        merging: What `apply_token_merging(..., trace=True)` returned, after a forward pass.

    Returns:
        One entry for each image.

    Raises:
        ValueError: if nothing was recorded.
    """
    trace = merging.trace
    return [FrameTrace(trace, row) for row in range(len(trace.sources[0]))]


def group_map(trace: VisionTrace, *, layer: int = -1, row: int = 0) -> NDArray[np.int64]:
    """Tell which visual token each patch ended in.

    Args:
        trace: What the tower recorded.
        layer: Which of the layers that ran, counted as in a list; -1 is what the language model reads.
        row: Frame within the trace.

    Returns:
        Token index of each patch, (rows, columns), 0 to N - 1; a class token is not counted.

    Raises:
        ValueError: if there is no such layer or row.
    """
    num_layers = len(trace.sources)
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"layer={layer}: want {-num_layers} to {num_layers - 1}, the layers that ran")
    source = trace.sources[layer]
    if not 0 <= row < len(source):
        raise ValueError(f"row={row}: want 0 to {len(source) - 1}, the frames of this trace")
    labels: NDArray[np.int64] = (
        (source[row, trace.num_prefix_tokens :] - trace.num_prefix_tokens).cpu().numpy().reshape(trace.grid)
    )
    return labels


def merge_map(image: Picture, labels: NDArray[np.int64], *, scale: int = 1, borders: bool = True) -> Picture:
    """Fill each group of patches with its mean colour and outline the groups of several patches.

    Args:
        image: (H, W, 3) uint8; the patches divide it evenly.
        labels: Group of each patch, (rows, columns), from `group_map`.
        scale: Enlarge by this whole factor; outlines are one pixel wide at any scale below 3, then a third of it.
        borders: Draw outlines, in a colour for each group.

    Returns:
        (scale * H, scale * W, 3) uint8.

    Raises:
        ValueError: if the image is not RGB bytes or holds fewer pixels than patches along a side.
    """
    height, width = _check_image(image, labels)
    if scale < 1:
        raise ValueError(f"scale={scale}: want at least 1")
    groups, compact = np.unique(labels, return_inverse=True)
    per_pixel = _to_pixels(compact.reshape(labels.shape), height, width)  # (H, W), 0 to groups - 1
    colours = group_colours(image, compact.reshape(labels.shape))
    filled = np.rint(colours).astype(np.uint8)[per_pixel].repeat(scale, axis=0).repeat(scale, axis=1)
    if not borders:
        return filled
    num_patches = np.bincount(compact.ravel())
    outline = _outline(per_pixel.repeat(scale, axis=0).repeat(scale, axis=1), thickness=max(1, scale // 3))
    owner = per_pixel.repeat(scale, axis=0).repeat(scale, axis=1)
    drawn = outline & (num_patches[owner] > 1)
    filled[drawn] = palette(len(groups))[owner[drawn]]
    return filled


def group_colours(image: Picture, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Average the pixels of each group.

    Args:
        image: (H, W, 3) uint8.
        labels: Group of each patch, (rows, columns), 0 to N - 1, none empty.

    Returns:
        Mean colour of each group, (N, 3), in [0, 255].

    Raises:
        ValueError: as `merge_map`.
    """
    height, width = _check_image(image, labels)
    per_pixel = _to_pixels(labels, height, width).ravel()
    num_pixels = np.bincount(per_pixel)
    channels = image.reshape(-1, 3).T
    return np.stack([np.bincount(per_pixel, weights=channel) / num_pixels for channel in channels], axis=1)


def to_pictures(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Picture]:
    """Undo the normalisation, to draw on exactly what the tower saw.

    Args:
        pixel_values: (F, 3, H, W).
        mean: Per channel, as used by the image processor.
        std: Per channel.

    Returns:
        One (H, W, 3) uint8 picture for each frame.
    """
    shift, spread = (torch.tensor(list(values)).view(1, 3, 1, 1) for values in (mean, std))
    pixels = ((pixel_values.float().cpu() * spread + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).contiguous().numpy())


def enlarge(image: Picture, scale: int) -> Picture:
    """Repeat every pixel `scale` times in both directions."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def _check_image(image: Picture, labels: NDArray[np.int64]) -> tuple[int, int]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: got {image.dtype} {image.shape}, want uint8 (H, W, 3)")
    height, width = image.shape[:2]
    if labels.ndim != 2 or not (0 < labels.shape[0] <= height and 0 < labels.shape[1] <= width):
        raise ValueError(
            f"labels: got shape {labels.shape}, want (rows, columns) of patches within {height}x{width} pixels"
        )
    return height, width


def _to_pixels(labels: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    rows, columns = labels.shape
    return labels[np.arange(height)[:, None] * rows // height, np.arange(width)[None] * columns // width]


def _outline(groups: NDArray[np.int64], *, thickness: int) -> NDArray[np.bool_]:
    """True for pixels within `thickness` of another group or of the picture's edge, (H, W)."""
    height, width = groups.shape
    padded = np.pad(groups, thickness, constant_values=-1)
    outline = np.zeros((height, width), dtype=np.bool_)
    for step in range(1, thickness + 1):
        for down, right in ((step, 0), (-step, 0), (0, step), (0, -step)):
            top, left = thickness + down, thickness + right
            outline |= padded[top : top + height, left : left + width] != groups
    return outline


def palette(num_colours: int) -> Picture:
    """Outline colours: bright, and far apart for neighbouring indices, (num_colours, 3)."""
    hue = (np.arange(num_colours) * _GOLDEN_ANGLE) % 1.0
    wave = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1  # red, green, blue of a saturated hue
    colours: Picture = np.rint(255 * (0.15 + 0.85 * wave.clip(0, 1))).astype(np.uint8)
    return colours
