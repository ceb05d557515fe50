"""Pictures in a row as an animated GIF or an H.264 mp4."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from aurora.data.tinyworld.render import encode_h264
from aurora.visualization.merge_map import Picture

MAX_FPS = 50
"""Viewers of GIFs slow faster ones down."""


def gif_bytes(pictures: Sequence[Picture], *, fps: int = 2) -> bytes:
    """Encode an endless GIF; of each picture the 256 colours that fit it best.

    Args:
        pictures: (H, W, 3) uint8, all of one size.
        fps: Pictures per second, at most MAX_FPS.

    Returns:
        The content of the file.

    Raises:
        ValueError: if there is no picture, they differ in size, or fps is out of range.
    """
    _check(pictures, fps)
    # Undithered: groups are flat areas, and dithering would also double the size of the file.
    frames = [Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def mp4_bytes(pictures: Sequence[Picture], *, fps: int = 2) -> bytes:
    """Encode an H.264 mp4; an odd side loses nothing but gains a line.

    Args:
        pictures: (H, W, 3) uint8, all of one size.
        fps: Pictures per second.

    Returns:
        The content of the file.

    Raises:
        ValueError: as `gif_bytes`.
    """
    _check(pictures, fps)
    height, width, _ = pictures[0].shape
    frames = np.pad(np.stack(pictures), ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    encode_h264(frames, buffer, fps=fps, crf=16)
    return buffer.getvalue()


def _check(pictures: Sequence[Picture], fps: int) -> None:
    if len({picture.shape for picture in pictures}) != 1:
        raise ValueError(f"pictures: got {len(pictures)} of differing sizes, want at least one, all of one size")
    if not 1 <= fps <= MAX_FPS:
        raise ValueError(f"fps={fps}: want 1 to {MAX_FPS} pictures per second")
