"""TinyWorld's renderer: scene -> frames, sub-patch masks, and a real H.264 file.

The canvas of everything at rest is drawn once; each frame is an affine crop of it, plus the moving object and weather.
"""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .backdrop import MARGIN, OBJECT_TINT, draw_canvas, paint_weather, rgb
from .scene import (
    LANDMARK_BASE,
    LANDMARK_HEIGHT,
    RADIUS,
    SKY_RADIUS,
    TINY_RADIUS,
    Scene,
    main_centre,
    tiny_centres,
    to_frame,
    view_at,
)
from .shapes import OUTLINES, field_of, landmark_field, sample_field, stamp

Frames = NDArray[np.uint8]

MASK_CLASSES = ("background", "main", "tiny", "landmark")
MASK_CELLS = 4
"""Mask cells per side of a patch."""


def _paint_frame(canvas: Image.Image, scene: Scene, t: float, image_size: int) -> Frames:
    centre_x, centre_y, view = (float(v) for v in view_at(scene.camera, t))
    unit = canvas.width / (1 + 2 * MARGIN)
    step = unit * view / image_size
    left, top = (centre_x - view / 2 + MARGIN) * unit, (centre_y - view / 2 + MARGIN) * unit
    crop = canvas.transform(
        (image_size, image_size), Image.Transform.AFFINE, (step, 0, left, 0, step, top), Image.Resampling.BILINEAR
    )
    image = np.asarray(crop, np.float32).copy()
    x, y = to_frame(scene, *main_centre(scene, t), t)
    tint = OBJECT_TINT[scene.time]
    stamp(
        image,
        field_of(OUTLINES[scene.shape]),
        centre_px=(float(x) * image_size, float(y) * image_size),
        radius_px=RADIUS[scene.size] / view * image_size,
        fill=rgb(scene.colour, tint),
        edge=rgb((18, 16, 22)),
        edge_px=0.019 * image_size,
        angle=scene.angle,
    )
    paint_weather(image, scene, t)
    return np.asarray(np.clip(image + 0.5, 0, 255), dtype=np.uint8)


def render_frame(scene: Scene, t: float, image_size: int = 96) -> Frames:
    """One frame at time t in [0, 1], uint8 (image_size, image_size, 3)."""
    return _paint_frame(Image.fromarray(draw_canvas(scene, image_size)), scene, t, image_size)


def render_clip(scene: Scene, *, num_frames: int = 8, image_size: int = 96) -> Frames:
    """The clip at num_frames equal times from 0 to 1, uint8 (num_frames, image_size, image_size, 3)."""
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: want at least 1")
    canvas = Image.fromarray(draw_canvas(scene, image_size))
    return np.stack([_paint_frame(canvas, scene, t, image_size) for t in frame_times(num_frames)])


def frame_times(num_frames: int) -> list[float]:
    """Times of the frames of a clip: equal steps from 0 to 1; a lone frame is at 0."""
    return [float(t) for t in np.linspace(0.0, 1.0, num_frames)]


def frame_masks(scene: Scene, t: float, image_size: int = 96, patch_size: int = 8) -> NDArray[np.uint8]:
    """What each sixteenth of each patch shows, an index into `MASK_CLASSES`, uint8 (patches, 16).

    Patches run row by row, as in the vision tower; so do the 4 x 4 cells of a patch. Nearer things hide farther ones.

    Raises:
        ValueError: if patch_size does not divide image_size.
    """
    if image_size % patch_size:
        raise ValueError(f"image_size={image_size}, patch_size={patch_size}: want a multiple")
    grid = image_size // patch_size
    cells = grid * MASK_CELLS
    axis = (np.arange(cells) + 0.5) / cells
    frame_x, frame_y = np.meshgrid(axis, axis)
    centre_x, centre_y, view = view_at(scene.camera, t)
    x, y = (frame_x - 0.5) * view + centre_x, (frame_y - 0.5) * view + centre_y
    mask = np.zeros((cells, cells), np.uint8)
    half = LANDMARK_HEIGHT / 2
    landmark = sample_field(
        landmark_field(scene.background), (x - scene.landmark_x) / half, (y - LANDMARK_BASE + half) / half
    )
    mask[(landmark < 0) | (np.hypot(x - scene.sky_x, y - scene.sky_y) < SKY_RADIUS)] = 3
    for tiny_x, tiny_y in tiny_centres(scene):
        u, v = (x - tiny_x) / TINY_RADIUS, (y - tiny_y) / TINY_RADIUS
        tiny = sample_field(field_of(OUTLINES[scene.tiny_shape]), u, v)
        mask[tiny < 0] = 2
    main_x, main_y = main_centre(scene, t)
    u, v = (x - main_x) / RADIUS[scene.size], (y - main_y) / RADIUS[scene.size]
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    mask[sample_field(field_of(OUTLINES[scene.shape]), cos * u + sin * v, -sin * u + cos * v) < 0] = 1
    split = mask.reshape(grid, MASK_CELLS, grid, MASK_CELLS).transpose(0, 2, 1, 3)  # (rows, columns, 4, 4)
    return np.ascontiguousarray(split.reshape(grid * grid, MASK_CELLS**2))


def encode_h264(frames: Frames, target: str | BinaryIO, *, fps: int = 4, crf: int = 20) -> None:
    """Encode frames (F, H, W, 3) as H.264 in an mp4 container; the same frames give the same bytes.

    Args:
        frames: uint8 RGB; height and width must be even.
        target: File name or seekable stream.
        fps: Frames per second.
        crf: x264 quality, 0 (lossless) to 51.

    Raises:
        ValueError: if frames do not have this form.
    """
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames {frames.dtype} {frames.shape}: want uint8 (frames, height, width, 3)")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames of {frames.shape[1]} x {frames.shape[2]} pixels: want even sides for H.264")
    # x264 165's macroblock tree gives different bytes from run to run on frames this small.
    options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_mp4(frames: Frames, path: str | Path, fps: int = 4, crf: int = 20) -> None:
    """Write frames (F, H, W, 3), uint8 RGB, as an H.264 mp4, beside the target and then renamed.

    Args:
        frames: See `encode_h264`.
        path: Target file; its folder must exist.
        fps: Frames per second.
        crf: x264 quality, 0 (lossless) to 51.

    Raises:
        ValueError: if frames do not have this form.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        encode_h264(frames, str(beside), fps=fps, crf=crf)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
