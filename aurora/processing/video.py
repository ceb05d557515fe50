"""Videos to frames: uniform choice, exact decoding, upright RGB; and clips to normalised pixel tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from aurora.processing.decode import (
    MIN_SKIP_FRAMES,
    Decoded,
    InconsistentError,
    VideoError,
    check_file,
    decode_all,
    decode_seeking,
    frame_rate,
    open_video,
    read_packets,
    seeking_pays,
)
from aurora.processing.image import AuroraImageProcessor, ImageInput, load_image, to_rgb

__all__ = [
    "AuroraVideoProcessor",
    "SampledVideo",
    "VideoError",
    "VideoInfo",
    "frame_indices",
    "load_visual",
    "probe",
    "sample_frames",
    "split_clips",
]

_ANIMATED_IMAGES = ("WEBP", "PNG", "AVIF")  # Pillow decodes these animations; GIF goes through FFmpeg like any video


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What the packets of a video say."""

    num_frames: int
    """Packets that hold a frame."""
    width_px: int
    """As stored, before rotation."""
    height_px: int
    """As stored, before rotation."""
    fps: float | None
    """Average frame rate, unknown for some containers."""
    codec: str
    """FFmpeg's name of the codec."""


@dataclass(frozen=True, slots=True)
class SampledVideo:
    """The chosen frames of a clip, or the one frame of an image."""

    frames: NDArray[np.uint8]
    """(F, H, W, 3), RGB, upright."""
    indices: list[int]
    """Which frames of the clip these are, from 0."""
    total_frames: int
    """Frames the clip has."""
    fps: float | None
    """Average frame rate, unknown for some containers."""
    seconds: list[float]
    """When each chosen frame is shown, counted from the first frame of the clip."""
    is_image: bool = False
    """The file was a still image."""


VideoInput: TypeAlias = "NDArray[Any] | Tensor | SampledVideo | str | os.PathLike[str] | Sequence[ImageInput]"


def frame_indices(total: int, num_frames: int) -> list[int]:
    """Choose frames uniformly, first and last included, as the reference does; one frame is the middle one.

    The reference returns two frames when asked for one.

    Args:
        total: Frames the clip has.
        num_frames: Frames wanted; a shorter clip gives all it has.

    Returns:
        Ascending frame numbers from 0.

    Raises:
        ValueError: if either is below 1.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"num_frm={num_frames} of {total} frames: want both at least 1")
    if num_frames == 1:
        return [(total - 1) // 2]
    return [int(index) for index in np.linspace(0, total - 1, min(total, num_frames), dtype=int)]


def sample_frames(
    path: str | os.PathLike[str], num_frames: int, *, strict: bool = True, seek: bool | None = None
) -> SampledVideo:
    """Decode uniformly chosen frames of a video file.

    Args:
        path: Local file; its content decides, not its name.
        num_frames: Frames wanted.
        strict: Refuse a clip with fewer frames; otherwise all its frames are given.
        seek: `False` decodes from the start, `True` seeks wherever it can, `None` seeks where it pays.

    Returns:
        The frames with their numbers and times.

    Raises:
        VideoError: if the file is missing, empty, truncated, no video, damaged, or shorter than `num_frames`.
    """
    name = os.fspath(path)
    if num_frames < 1:
        raise VideoError(f"{name}: num_frm={num_frames}; want at least 1")
    with open_video(name) as (container, stream):
        index = read_packets(name, container, stream)
        fps = frame_rate(stream)
    total = index.num_frames
    if total < num_frames:
        total = decode_all(name, []).total  # before refusing a clip, count what really comes out
    indices = _choose(name, total, num_frames, strict=strict)
    min_skip = 1 if seek else MIN_SKIP_FRAMES
    if seek is not False and total == index.num_frames and seeking_pays(index, indices, min_skip):
        try:
            return _finish(decode_seeking(name, index, indices, min_skip), indices, total, fps)
        except InconsistentError:
            pass
    decoded = decode_all(name, indices)
    if decoded.total != total:
        total = decoded.total
        indices = _choose(name, total, num_frames, strict=strict)
        decoded = decode_all(name, indices)
    return _finish(decoded, indices, total, fps)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read a video's packets without decoding.

    Args:
        path: Local file.

    Raises:
        VideoError: as `sample_frames`.
    """
    name = os.fspath(path)
    with open_video(name) as (container, stream):
        codec = stream.codec_context
        index = read_packets(name, container, stream)
        return VideoInfo(index.num_frames, codec.width, codec.height, frame_rate(stream), codec.name)


def load_visual(path: str | os.PathLike[str], num_frames: int, *, strict: bool = True) -> SampledVideo:
    """Read an image or the chosen frames of a video or animation; the content decides, not the name.

    Args:
        path: Local file.
        num_frames: Frames wanted of a video; an image gives one.
        strict: Refuse a clip with fewer frames.

    Raises:
        ValueError: `VideoError` or an image's error; one line that names the file, what was found and what was wanted.
    """
    name = os.fspath(path)
    check_file(name)
    try:
        with Image.open(name) as image:
            kind, count = image.format, getattr(image, "n_frames", 1)
            if kind in _ANIMATED_IMAGES and count > 1:
                return _sample_animation(name, image, count, num_frames, strict=strict)
    except UnidentifiedImageError:
        kind, count = None, 0
    except (OSError, SyntaxError, Image.DecompressionBombError):
        kind, count = "broken", 1  # load_image says what is wrong
    if kind in (None, "MPEG") or (
        kind == "GIF" and count > 1
    ):  # Pillow knows the header of MPEG-1, but cannot decode it
        return sample_frames(name, num_frames, strict=strict)
    return SampledVideo(np.asarray(load_image(name))[None], [0], 1, None, [0.0], is_image=True)


class AuroraVideoProcessor:
    """Turns clips into the tower's normalised squares."""

    def __init__(self, image_processor: AuroraImageProcessor | None = None, num_frames: int = 8) -> None:
        """Combine the preprocessing of one frame with the number of frames taken from a file."""
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: want at least 1")
        self.image_processor = image_processor or AuroraImageProcessor()
        self.num_frames = num_frames

    def __call__(self, videos: VideoInput | Sequence[VideoInput]) -> Tensor:
        """Normalise one clip or several.

        Args:
            videos: A clip is an array (F, H, W, 3), a list of frames, a `SampledVideo`, or a path, of which
                `num_frames` uniformly chosen frames are taken.

        Returns:
            (B, F, 3, S, S) float32.

        Raises:
            ValueError: if there is no clip, clips differ in their number of frames, or one is malformed.
        """
        clips = self.clips(videos)
        counts = [len(clip) for clip in clips]
        if not counts or len(set(counts)) != 1:
            raise ValueError(
                f"videos: got clips of {counts} frames, want at least one clip and the same number for all"
            )
        return torch.stack(clips)

    def clips(self, videos: VideoInput | Sequence[VideoInput]) -> list[Tensor]:
        """Normalise one clip or several that may differ in length.

        Args:
            videos: As for `__call__`.

        Returns:
            (F, 3, S, S) float32 for each clip.

        Raises:
            ValueError: if one is malformed.
        """
        return [self._clip(video) for video in split_clips(videos)]

    def _clip(self, video: VideoInput) -> Tensor:
        """Return (F, 3, S, S)."""
        if isinstance(video, str | os.PathLike):
            video = sample_frames(video, self.num_frames)
        return self.image_processor(video.frames if isinstance(video, SampledVideo) else video)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], num_frames: int = 8) -> AuroraVideoProcessor:
        """Read the preprocessing of a checkpoint folder, see `AuroraImageProcessor.from_pretrained`."""
        return cls(AuroraImageProcessor.from_pretrained(path), num_frames=num_frames)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json` into the folder `path`."""
        self.image_processor.save_pretrained(path)


def split_clips(videos: VideoInput | Sequence[VideoInput]) -> list[VideoInput]:
    """Return the clips of one clip, of a (B, F, H, W, 3) array or of a list of clips; a list of frames is one clip."""
    if isinstance(videos, np.ndarray | Tensor):
        return list(videos) if videos.ndim == 5 else [videos]
    if isinstance(videos, str | os.PathLike | SampledVideo):
        return [videos]
    if not isinstance(videos, Sequence):
        raise ValueError(
            f"videos: got {type(videos).__name__}, want clips: arrays (F, H, W, 3), lists of frames or paths"
        )
    frames = [
        isinstance(item, Image.Image) or (isinstance(item, np.ndarray | Tensor) and item.ndim <= 3) for item in videos
    ]
    if any(frames) and not all(frames):
        raise ValueError("videos: got a list that mixes frames and clips, want either")
    return [videos] if any(frames) else list(videos)  # type: ignore[list-item, arg-type]


def _choose(name: str, total: int, num_frames: int, *, strict: bool) -> list[int]:
    """Return the frame numbers, or refuse a clip that is too short."""
    if strict and num_frames > total:
        raise VideoError(f"{name}: num_frm={num_frames}, but the clip has {total} frames; want 1 to {total}")
    return frame_indices(total, num_frames)


def _finish(decoded: Decoded, indices: list[int], total: int, fps: float | None) -> SampledVideo:
    """Put the pieces together; a frame without a time gets one from its number."""
    assert decoded.frames.pixels is not None
    assert decoded.frames.found == len(indices)
    seconds = [
        max(0.0, time - decoded.start_time) if time is not None else index / (fps or 1.0)
        for index, time in zip(indices, decoded.frames.times)
    ]
    return SampledVideo(decoded.frames.pixels, indices, total, fps, seconds)


def _sample_animation(name: str, image: Image.Image, total: int, num_frames: int, *, strict: bool) -> SampledVideo:
    """Choose frames of an animated WebP, PNG or AVIF."""
    indices = _choose(name, total, num_frames, strict=strict)
    frames, seconds, time_ms = [], [], 0.0
    for index in range(indices[-1] + 1):
        image.seek(index)
        if index in indices:
            frames.append(np.asarray(to_rgb(image)))
            seconds.append(time_ms / 1000)
        time_ms += float(image.info.get("duration", 0) or 0)
    fps = 1000 * (indices[-1] + 1) / time_ms if time_ms else None
    return SampledVideo(np.stack(frames), indices, total, fps, seconds)
