"""Captions of clips read from files: in this process or several, batch by batch, as rows that a later run continues."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from aurora.evaluation.report import Point
from aurora.evaluation.structured import StructuredCaptioner
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import load_visual, sample_frames
from aurora.records import JsonLines
from aurora.runtime import Dtype, resolve_dtype

T = TypeVar("T")

NOISE_MEAN, NOISE_DEVIATION = 108.0, 47.0
"""Of the pixels of a frame, over 100 training clips. Noise of more contrast than any picture has makes a captioner
leave facts out, which scores below chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A file, and what to ask about it."""

    video: str
    """Name in rows and reports."""
    path: str
    prompts: Mapping[str, str]
    """Category -> prompt."""
    seed: int = 0
    """Of the noise that may stand in its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioning:
    """How clips are captioned; plain values, so that it travels to other processes."""

    model_path: str
    device: str
    dtype: Dtype
    max_new_tokens: int
    batch_size: int
    num_frames: int | None = None
    """Frames of a clip, evenly over its length; None takes the model's number and refuses shorter clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Clips that one process captions together."""

    point: Point
    clips: tuple[Clip, ...]
    captioning: Captioning


def caption_clips(
    clips: Sequence[Clip],
    point: Point,
    captioning: Captioning,
    log: JsonLines,
    *,
    settings: Mapping[str, Any],
    pool: ProcessPoolExecutor | None,
) -> list[dict[str, Any]]:
    """Caption what the log does not hold yet, and log it.

    Args:
        clips: The files.
        point: How they are shown to the model.
        captioning: With what.
        log: Rows of this and earlier runs.
        settings: What a caption depends on apart from its clip, prompts and operating point.
        pool: Processes that share the work; None does it here.

    Returns:
        A row for each clip, in order: `video`, `prompts`, `captions`, `visual_tokens_per_frame` and `seconds`, or
        `video` and `error` for a file that cannot be read. Rows with an error are not logged.
    """
    shared = {**point.columns, "settings": dict(settings)}
    prompts = {clip.video: dict(clip.prompts) for clip in clips}
    done = {
        row["video"]: row
        for row in log.rows
        if all(row.get(key) == value for key, value in shared.items())
        and row.get("prompts") == prompts.get(row.get("video", ""))
    }
    todo = [clip for clip in clips if clip.video not in done]
    for row in _caption_all(todo, point, captioning, pool):
        done[row["video"]] = row | shared
        if "error" not in row:
            log.append(row | shared)
    return [done[clip.video] for clip in clips]


def noise_like(frames: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Gaussian noise in the shape of a clip, as bright and as rich in contrast as TinyWorld's frames."""
    noise = np.random.default_rng([41, seed]).normal(NOISE_MEAN, NOISE_DEVIATION, frames.shape)
    return np.clip(noise.round(), 0, 255).astype(np.uint8)


def with_progress(results: Iterator[T], total: int, title: str) -> Iterator[T]:
    """Go through results behind a bar, where somebody watches."""
    if not sys.stderr.isatty() or not total:
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, description=title, total=total, console=Console(stderr=True), transient=True)


def _caption_all(
    clips: Sequence[Clip], point: Point, captioning: Captioning, pool: ProcessPoolExecutor | None
) -> Iterator[dict[str, Any]]:
    """Rows as they are ready."""
    size = captioning.batch_size
    batches = [
        _Batch(point=point, clips=tuple(clips[start : start + size]), captioning=captioning)
        for start in range(0, len(clips), size)
    ]
    results = (
        map(_caption_batch, batches)
        if pool is None
        else (future.result() for future in as_completed([pool.submit(_caption_batch, batch) for batch in batches]))
    )
    for rows in with_progress(results, len(batches), point.name):
        yield from rows


def _caption_batch(batch: _Batch) -> list[dict[str, Any]]:
    """Read, caption and describe the clips of one batch."""
    captioner = _captioner(batch.captioning)
    started = time.perf_counter()
    clips: list[Clip] = []
    frames: list[NDArray[np.uint8]] = []
    rows: list[dict[str, Any]] = []
    for clip in batch.clips:
        try:
            frames.append(_read(clip, batch, captioner.processor.video_processor.num_frames))
            clips.append(clip)
        except (ValueError, OSError) as error:
            rows.append({"video": clip.video, "error": str(error)})
    if not clips:
        return rows
    written = captioner.caption(frames, [clip.prompts for clip in clips], **batch.point.merging)
    seconds = round((time.perf_counter() - started) / len(clips), 4)
    return rows + [
        {
            "video": clip.video,
            "prompts": dict(clip.prompts),
            "captions": made.captions,
            "visual_tokens_per_frame": made.visual_tokens,
            "seconds": seconds,
        }
        for clip, made in zip(clips, written, strict=True)
    ]


def _read(clip: Clip, batch: _Batch, num_frames: int) -> NDArray[np.uint8]:
    if batch.captioning.num_frames is None:
        frames = sample_frames(clip.path, num_frames).frames
    else:
        frames = load_visual(clip.path, batch.captioning.num_frames, strict=False).frames
    return noise_like(frames, clip.seed) if batch.point.noise else frames


@functools.lru_cache(maxsize=1)
def _captioner(captioning: Captioning) -> StructuredCaptioner:
    """The captioner of this process."""
    where = torch.device(captioning.device)
    model = AuroraForConditionalGeneration.from_pretrained(
        captioning.model_path, torch_dtype=resolve_dtype(captioning.dtype, where), device_map=where
    )
    processor = AuroraProcessor.from_pretrained(captioning.model_path)
    return StructuredCaptioner(model, processor, {}, max_new_tokens=captioning.max_new_tokens)
