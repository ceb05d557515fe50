"""The verb `evaluate`: caption TinyWorld clips read from mp4 files at several kept ratios, and score the captions.

The captioner sees nothing but the files; a clip's facts meet its captions in `tinyvdc.score` only. Captions are kept as
JSON lines, so a stopped run continues, and a new run adds operating points or clips to what is there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from aurora.captioning import BUNDLED_MODEL
from aurora.checkpoint.pretrained import resolve_checkpoint
from aurora.config import load_config, register_schema
from aurora.data.tinyworld.dataset import DatasetConfig, write_dataset
from aurora.data.tinyworld.language import Category, caption_prompts
from aurora.evaluation import tinyvdc
from aurora.evaluation.report import Measured, Point, markdown, to_record
from aurora.evaluation.structured import StructuredCaptioner
from aurora.model.merge import Schedule
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import sample_frames
from aurora.records import JsonLines
from aurora.runtime import Dtype, RuntimeConfig, environment_report, resolve_device, resolve_dtype, set_threads

NOISE_MEAN, NOISE_DEVIATION = 108.0, 47.0
"""Of the pixels of a frame, over 100 training clips. Noise of more contrast than any picture has makes a captioner
leave facts out, which scores below chance."""
_IDENTITY_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(RuntimeConfig):
    """Caption TinyWorld clips in the five categories and count the facts that are right.

    On a CPU as many single-threaded processes run as `threads` says. `seed` is the seed of the first clip.
    """

    model_path: str | None = None
    """Checkpoint folder or hub id; null is the bundled aurora-tiny."""
    num_clips: int = 500
    """Clips to caption, with seeds seed, seed + 1, ..."""
    split: str = "test"
    """Of TinyWorld: train, val, test or heldout; training never draws from the last two."""
    ratios: list[float] = field(default_factory=lambda: [1.0])
    """Shares of visual tokens to keep, each in (0, 1]; the first is what the others are compared with."""
    schedules: list[Schedule] = field(default_factory=lambda: [Schedule.exact])
    """How the merges are spread over the layers: exact, constant, linear; each ratio below 1 runs with each."""
    noise: bool = False
    """Also caption noise instead of the clips, at the first ratio: what is right by chance."""
    batch_size: int = 4
    """Clips captioned together."""
    max_new_tokens: int = 160
    """At most so many tokens for a caption."""
    clip_frames: int = 8
    """Frames of a clip on disk; the model takes its own number of them, evenly."""
    clip_px: int = 96
    """Side of a frame on disk, pixels, even."""
    data_dir: str = "outputs/tinyvdc/clips"
    """Folder of the mp4 files, which are rendered where they are missing."""
    output: str = "outputs/tinyvdc"
    """Folder for captions.jsonl, report.json and report.md."""
    overwrite: bool = False
    """Caption anew what captions.jsonl holds."""

    def __post_init__(self) -> None:
        """Check ranges."""
        RuntimeConfig.__post_init__(self)
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise ValueError(f"ratios={self.ratios}: want numbers in (0, 1]")
        for key in ("ratios", "schedules"):
            if not getattr(self, key):
                raise ValueError(f"{key}=[]: want at least one")
        if Schedule.list in self.schedules:
            raise ValueError("schedules: got list, which needs r for each layer; want exact, constant or linear")
        for key in ("num_clips", "batch_size", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: want at least 1")
        _ = self.data  # checks the rest

    @property
    def data(self) -> DatasetConfig:
        """What is rendered."""
        return DatasetConfig(
            folder=self.data_dir,
            split=self.split,
            num_clips=self.num_clips,
            first_seed=self.seed,
            num_frames=self.clip_frames,
            image_size=self.clip_px,
        )

    @property
    def points(self) -> list[Point]:
        """The operating points, the one that the others are compared with first."""
        points = []
        for schedule in self.schedules:
            for ratio in self.ratios:
                point = Point(ratio=ratio, schedule="none" if ratio == 1.0 else schedule.value)
                if point not in points:
                    points.append(point)
        first = points[0]
        return [*points, Point(ratio=first.ratio, schedule=first.schedule, noise=True)] if self.noise else points


register_schema("evaluate_schema", EvaluateConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Clips that one process captions together; plain values, so that it travels."""

    point: Point
    videos: tuple[str, ...]
    seeds: tuple[int, ...]
    folder: str
    model_path: str
    device: str
    dtype: Dtype
    max_new_tokens: int


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Caption what is missing, score everything, print the tables and write the report.

    Args:
        config: What to measure.

    Returns:
        The content of report.json.

    Raises:
        ValueError: if the checkpoint, the clips or an earlier run's captions cannot be read.
    """
    model_path = resolve_checkpoint(config.model_path if config.model_path is not None else BUNDLED_MODEL)
    device = resolve_device(config.device)
    threads = set_threads(config.threads)
    workers = threads if device.type == "cpu" else 1
    scenes = _scenes(config)
    settings = {
        "model_sha256": checkpoint_digest(model_path),
        "clip_frames": config.clip_frames,
        "clip_px": config.clip_px,
        "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        "max_new_tokens": config.max_new_tokens,
    }
    measured = []
    with JsonLines(Path(config.output) / "captions.jsonl", overwrite=config.overwrite) as log, _pool(workers) as pool:
        for point in config.points:
            shared = {**point.columns, "settings": settings}
            done = {row["video"]: row for row in log.rows if all(row.get(key) == shared[key] for key in shared)}
            todo = [scene for scene in scenes if scene["video"] not in done]
            for row in _caption(config, point, todo, model_path, device, pool):
                done[row["video"]] = row | shared
                log.append(row | shared)
            measured.append(_measure(point, [done[scene["video"]] for scene in scenes], scenes))
            print(measured[-1].summary(), file=sys.stderr, flush=True)
    record = to_record(
        measured,
        model=model_path.name,
        clips=f"{config.num_clips} clips of the {config.split} split, seeds {config.seed} to "
        f"{config.seed + config.num_clips - 1}, {config.clip_px} px H.264",
        settings=settings,
        environment=environment_report() | {"device": str(device), "processes": str(workers)},
    )
    _write(Path(config.output) / "report.json", json.dumps(record, indent=1) + "\n")
    _write(Path(config.output) / "report.md", markdown(record))
    print(markdown(record), end="")
    return record


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="evaluate")
def main(raw: DictConfig) -> None:
    """Evaluate what the command line names; called through `aurora.cli.run`."""
    evaluate(load_config(raw, EvaluateConfig))


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over a checkpoint's weights, configuration and tokenizer: a caption is reused for these files only."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in _IDENTITY_SUFFIXES and file.is_file():
            with file.open("rb") as stream:
                digest.update(file.relative_to(folder).as_posix().encode())
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def noise_like(frames: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Gaussian noise in the shape of a clip, as bright and as rich in contrast as TinyWorld's frames."""
    noise = np.random.default_rng([41, seed]).normal(NOISE_MEAN, NOISE_DEVIATION, frames.shape)
    return np.clip(noise.round(), 0, 255).astype(np.uint8)


def _scenes(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Write the clips that are missing; return the facts of all, with `video`, the file's name."""
    write_dataset(config.data, progress=sys.stderr.isatty())
    lines = (Path(config.data_dir) / "scenes.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _caption(
    config: EvaluateConfig,
    point: Point,
    scenes: Sequence[dict[str, Any]],
    model_path: Path,
    device: torch.device,
    pool: ProcessPoolExecutor | None,
) -> Iterator[dict[str, Any]]:
    """Caption clips, in this process or in the pool's; rows come as they are ready."""
    batches = [
        _Batch(
            point=point,
            videos=tuple(scene["video"] for scene in scenes[start : start + config.batch_size]),
            seeds=tuple(scene["seed"] for scene in scenes[start : start + config.batch_size]),
            folder=config.data_dir,
            model_path=str(model_path),
            device=str(device),
            dtype=config.dtype,
            max_new_tokens=config.max_new_tokens,
        )
        for start in range(0, len(scenes), config.batch_size)
    ]
    results = (
        map(_caption_batch, batches)
        if pool is None
        else (future.result() for future in as_completed([pool.submit(_caption_batch, batch) for batch in batches]))
    )
    for rows in _with_progress(results, len(batches), point.name):
        yield from rows


def _caption_batch(batch: _Batch) -> list[dict[str, Any]]:
    """Read, caption and describe the clips of one batch."""
    captioner = _captioner(batch.model_path, batch.device, batch.dtype, batch.max_new_tokens)
    started = time.perf_counter()
    num_frames = captioner.processor.video_processor.num_frames
    clips = [sample_frames(Path(batch.folder) / video, num_frames).frames for video in batch.videos]
    if batch.point.noise:
        clips = [noise_like(frames, seed) for frames, seed in zip(clips, batch.seeds, strict=True)]
    written = captioner.caption(clips, **batch.point.merging)
    seconds = round((time.perf_counter() - started) / len(clips), 4)
    return [
        {"video": video, "captions": made.captions, "visual_tokens_per_frame": made.visual_tokens, "seconds": seconds}
        for video, made in zip(batch.videos, written, strict=True)
    ]


@functools.lru_cache(maxsize=1)
def _captioner(model_path: str, device: str, dtype: Dtype, max_new_tokens: int) -> StructuredCaptioner:
    """The captioner of this process."""
    where = torch.device(device)
    model = AuroraForConditionalGeneration.from_pretrained(
        model_path, torch_dtype=resolve_dtype(dtype, where), device_map=where
    )
    questions = {category.value: caption_prompts(category)[0] for category in Category}
    processor = AuroraProcessor.from_pretrained(model_path)
    return StructuredCaptioner(model, processor, questions, max_new_tokens=max_new_tokens)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Single-threaded processes, or None where this one does the work."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a forked process may inherit a lock of one of torch's threads
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ValueError(
            "a captioning process was killed, perhaps for memory; want threads=1 or a smaller batch_size. "
            "What is captioned is kept: the same command continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Compute with one thread, go silently at Ctrl-C, and do not outlive the parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_leave_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _leave_with(parent: BaseProcess | None) -> None:
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure(point: Point, rows: Sequence[dict[str, Any]], scenes: Sequence[dict[str, Any]]) -> Measured:
    captions = [row["captions"] for row in rows]
    return Measured(
        point=point,
        scores=tinyvdc.score(captions, scenes),
        other_clip=tinyvdc.score([*captions[1:], captions[0]], scenes).mean if len(scenes) > 1 else None,
        visual_tokens=[sum(row["visual_tokens_per_frame"]) for row in rows],
        num_frames=len(rows[0]["visual_tokens_per_frame"]),
        seconds=[row["seconds"] for row in rows],
    )


def _with_progress(results: Iterator[Any], total: int, title: str) -> Iterator[Any]:
    """Go through results behind a bar, where somebody watches."""
    if not sys.stderr.isatty() or not total:
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, description=title, total=total, console=Console(stderr=True), transient=True)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
