"""The verb `sweep`: the ablation of token merging on TinyWorld, as tables and figures.

A cell is one way to show clips (`aurora.evaluation.variants`) at one kept ratio with one seed: the same clips, each
with its five captions, for every cell of that seed. Finished cells are JSON lines, so a stopped sweep continues, and
several processes or machines can share one (`part`, `num_parts`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from aurora.captioning import BUNDLED_MODEL
from aurora.checkpoint.pretrained import resolve_checkpoint
from aurora.checkpoint.public_config import AuroraConfig
from aurora.config import load_config, register_schema
from aurora.data.tinyworld.dataset import through_h264
from aurora.data.tinyworld.language import Category, caption_prompts
from aurora.data.tinyworld.render import render_clip
from aurora.data.tinyworld.scene import SPLITS, sample_scene
from aurora.evaluation import tinyvdc
from aurora.evaluation.session import checkpoint_digest
from aurora.evaluation.sweep_report import markdown, to_record
from aurora.evaluation.variants import MEANINGS, REFERENCE, UNMERGED, encode_variant
from aurora.evaluation.workers import worker_pool
from aurora.model.merge import MergeConfig, Schedule, plan_clip
from aurora.model.vision import num_active_layers
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from aurora.processing.processor import AuroraProcessor
from aurora.records import JsonLines
from aurora.runtime import Dtype, RuntimeConfig, environment_report, resolve_device, resolve_dtype, set_threads

RATIOS = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.06, 0.04, 0.03, 0.02)
"""Twelve, denser where the quality of aurora-tiny bends: 144 down to 3 tokens a frame, the fewest it can reach."""


@dataclass(kw_only=True, slots=True)
class SweepConfig(RuntimeConfig):
    """Caption TinyWorld clips at many kept ratios, by merging and by its alternatives; tables and figures.

    On a CPU as many single-threaded processes run as `threads` says. `seed` is the first seed.
    """

    model_path: str | None = None
    """Checkpoint folder or hub id; null is the bundled aurora-tiny."""
    ratios: list[float] = field(default_factory=lambda: list(RATIOS))
    """Shares of visual tokens to keep by merging (schedule exact), each in (0, 1]; 1 is needed for comparison."""
    variants: list[str] = field(default_factory=lambda: [name for name in MEANINGS if name != REFERENCE])
    """What to compare merging with: constant, linear, size_bias, text_size_bias, raster_order, original_positions,
    average_pooling, random_drop, uniform_drop, class_attention, mean_attention, merging_after_encoder."""
    variant_ratios: list[float] = field(default_factory=lambda: [0.4, 0.2, 0.1, 0.06, 0.03])
    """At which of the ratios."""
    num_seeds: int = 3
    """Seeds; each has clips and random choices of its own."""
    num_clips: int = 50
    """Clips of each seed."""
    split: str = "test"
    """Of TinyWorld: train, val, test or heldout; training never draws from the last two."""
    clip_px: int = 96
    """Side of a rendered frame, pixels, even."""
    batch_size: int = 5
    """Clips captioned together."""
    max_new_tokens: int = 160
    """At most so many tokens for a caption."""
    output: str = "outputs/sweep"
    """Folder for cells.jsonl, report.json, report.md and the figures."""
    figures: bool = True
    """Draw the figures, which needs matplotlib."""
    part: int = 0
    """Which part of the cells this process does, from 0; see num_parts."""
    num_parts: int = 1
    """Into how many parts the cells are shared out, such as `-m part=0,1 num_parts=2 hydra/launcher=joblib`."""

    def __post_init__(self) -> None:
        """Check ranges."""
        RuntimeConfig.__post_init__(self)
        for key in ("num_seeds", "num_clips", "batch_size", "max_new_tokens", "num_parts"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: want at least 1")
        if not 0 <= self.part < self.num_parts:
            raise ValueError(f"part={self.part}: want 0 to {self.num_parts - 1}, as num_parts={self.num_parts}")
        if any(not 0 < ratio <= 1 for ratio in self.ratios) or UNMERGED not in self.ratios:
            raise ValueError(f"ratios={self.ratios}: want numbers in (0, 1], and 1.0 among them")
        if not set(self.variant_ratios) <= set(self.ratios):
            raise ValueError(f"variant_ratios={self.variant_ratios}: want some of ratios={self.ratios}")
        for variant in self.variants:
            if variant not in MEANINGS or variant == REFERENCE:
                names = ", ".join(name for name in MEANINGS if name != REFERENCE)
                raise ValueError(f"variants: got {variant}, want some of {names}")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}: want one of {', '.join(SPLITS)}")
        if self.clip_px < 16 or self.clip_px % 2:
            raise ValueError(f"clip_px={self.clip_px}: want an even number of at least 16")

    @property
    def cells(self) -> list[Cell]:
        """All cells of the sweep, seed by seed."""
        points = [(REFERENCE, ratio) for ratio in dict.fromkeys(self.ratios)]
        points += [
            (name, ratio) for name in dict.fromkeys(self.variants) for ratio in dict.fromkeys(self.variant_ratios)
        ]
        return [
            Cell(variant, ratio, seed)
            for seed in range(self.seed, self.seed + self.num_seeds)
            for variant, ratio in points
        ]


register_schema("sweep_schema", SweepConfig)


class Cell(NamedTuple):
    """One measurement."""

    variant: str
    """How clips are shown; a name of `MEANINGS`."""
    ratio: float
    """Share of visual tokens to keep."""
    seed: int
    """Which clips, and of random choices."""

    def __str__(self) -> str:
        return f"{self.variant} {self.ratio:g}, seed {self.seed}"


class CaptionJob(NamedTuple):
    """A cell with all that a process needs to measure it; plain values, so that it travels."""

    cell: Cell
    num_clips: int
    split: str
    clip_px: int
    batch_size: int
    model_path: str
    device: str
    dtype: Dtype
    max_new_tokens: int


def sweep(config: SweepConfig) -> dict[str, Any] | None:
    """Measure the cells that are missing; once all are there, print the tables and write report and figures.

    Args:
        config: What to measure.

    Returns:
        The content of report.json, or None while another part's cells are missing.

    Raises:
        ValueError: if the checkpoint or an earlier run's cells cannot be read, the model cannot reach a ratio, or
            matplotlib is missing.
    """
    if config.figures and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures=true: needs matplotlib; want `pip install matplotlib`, or figures=false")
    model_path = resolve_checkpoint(config.model_path if config.model_path is not None else BUNDLED_MODEL)
    check_reachable(config, AuroraConfig.from_pretrained(model_path))
    device = resolve_device(config.device)
    threads = set_threads(config.threads)
    workers = threads if device.type == "cpu" else 1
    settings = {
        "model_sha256": checkpoint_digest(model_path),
        "num_clips": config.num_clips,
        "split": config.split,
        "clip_px": config.clip_px,
        "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        "max_new_tokens": config.max_new_tokens,
    }
    environment = environment_report() | {"device": str(device), "processes": str(workers)}
    folder = Path(config.output).expanduser()
    name = "cells.jsonl" if config.num_parts == 1 else f"cells-{config.part}-of-{config.num_parts}.jsonl"
    with JsonLines(folder / name) as log, worker_pool(workers) as pool:
        found = _finished(folder, settings)
        todo = [cell for cell in config.cells[config.part :: config.num_parts] if cell not in found]
        jobs = [_job(config, cell, str(model_path), str(device)) for cell in todo]
        for row in _with_progress(_measure(jobs, pool), [job.cell for job in jobs]):
            log.append(row | {"settings": settings, "environment": environment})
    found = _finished(folder, settings)
    missing = [cell for cell in config.cells if cell not in found]
    if missing:
        print(
            f"{len(missing)} of {len(config.cells)} cells are other parts' and missing; the last one writes the report"
        )
        return None
    record = to_record([found[cell] for cell in config.cells], model=model_path.name, settings=settings)
    _write(folder / "report.json", json.dumps(record, indent=1) + "\n")
    _write(folder / "report.md", markdown(record))
    print(markdown(record), end="")
    if config.figures:
        from aurora.visualization.curves import draw_sweep

        print("\n" + "\n".join(str(path) for path in draw_sweep(record, folder)))
    return record


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="sweep")
def main(raw: DictConfig) -> None:
    """Sweep what the command line names; called through `aurora.cli.run`."""
    sweep(load_config(raw, SweepConfig))


def check_reachable(config: SweepConfig, model: AuroraConfig) -> None:
    """Refuse ratios that halving the tokens in every layer of this model cannot reach, before anything runs."""
    side = model.vision.image_size
    for ratio in config.ratios:
        plan_clip(
            MergeConfig(token_kept_ratio=ratio, schedule=Schedule.exact),
            num_frames=1,
            height_px=side,
            width_px=side,
            vision=model.vision,
            num_active_layers=num_active_layers(model.vision, model.feature_layer),
        )


def measure_cell(job: CaptionJob) -> dict[str, Any]:
    """Caption the clips of one cell in the five categories, and score the captions.

    Args:
        job: The cell.

    Returns:
        A row of cells.jsonl: scores in [0, 1] for each clip and category, visual tokens, and per clip the seconds of
        each phase and the MiB of keys and values; peak_mib is what CUDA allocated at most, wall_s the whole cell with
        rendering its clips.
    """
    began = time.perf_counter()
    model, processor = _load(job.model_path, job.device, job.dtype)
    variant, ratio, seed = job.cell
    questions = {category.value: caption_prompts(category)[0] for category in Category}
    clips = range(seed * job.num_clips, (seed + 1) * job.num_clips)
    num_frames = processor.video_processor.num_frames
    scores: list[list[float]] = []
    tokens: list[int] = []
    seconds = dict.fromkeys(("encode", "prefill", "decode"), 0.0)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    for start in range(0, len(clips), job.batch_size):
        batch = clips[start : start + job.batch_size]
        frames = [_frames(clip, job.split, num_frames, job.clip_px) for clip in batch]
        pixels = [processor.image_processor.preprocess_frames(clip).to(model.device, model.dtype) for clip in frames]
        prompts = [processor.build_prompt(question, num_frames) for _ in batch for question in questions.values()]
        inputs = processor(text=prompts).to(model.device)
        prefix = encode_variant(model, variant, ratio, pixels, batch)
        made = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            prefix=prefix,
            max_new_tokens=job.max_new_tokens,
            return_dict=True,
        )
        assert isinstance(made, GenerateOutput)
        tokens += [sum(counts) for counts in prefix.features.counts]
        for phase in seconds:
            seconds[phase] += made.seconds[phase]
        texts = iter(
            processor.decode(ids[:length], skip_special_tokens=True)
            for ids, length in zip(made.sequences, made.num_generated, strict=True)
        )
        for clip in batch:
            facts = sample_scene(clip, job.split).to_dict()
            scores.append([round(share_right(category, next(texts), facts), 4) for category in questions])
    return {
        **job.cell._asdict(),
        "categories": list(questions),
        "scores": scores,
        "visual_tokens": sum(tokens) / len(tokens),
        "num_frames": num_frames,
        "num_patches": (model.config.vision.image_size // model.config.vision.patch_size) ** 2,
        "seconds": {phase: round(spent / len(clips), 5) for phase, spent in seconds.items()},
        "kv_mib": round(_kv_bytes(model) * sum(tokens) / len(tokens) / 2**20, 4),
        "peak_mib": _peak_mib(model.device),
        "wall_s": round(time.perf_counter() - began, 2),
    }


def share_right(category: str, caption: str, facts: dict[str, Any]) -> float:
    """Share of a category's facts that a caption states rightly, as `tinyvdc.score` counts them."""
    stated = tinyvdc.parse(category, caption)
    return float(np.mean([stated.get(slot) == facts[slot] for slot in tinyvdc.REQUIRED[category]]))


def _job(config: SweepConfig, cell: Cell, model_path: str, device: str) -> CaptionJob:
    return CaptionJob(
        cell=cell,
        num_clips=config.num_clips,
        split=config.split,
        clip_px=config.clip_px,
        batch_size=config.batch_size,
        model_path=model_path,
        device=device,
        dtype=config.dtype,
        max_new_tokens=config.max_new_tokens,
    )


def _measure(jobs: Sequence[CaptionJob], pool: ProcessPoolExecutor | None) -> Iterator[dict[str, Any]]:
    """Rows as they are ready, from this process or the pool's."""
    if pool is None:
        yield from map(measure_cell, jobs)
        return
    for future in as_completed([pool.submit(measure_cell, job) for job in jobs]):
        yield future.result()


def _finished(folder: Path, settings: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    """Cells that this or another process has measured with these settings; a line cut in half does not count.

    Raises:
        ValueError: if a file holds something else.
    """
    found = {}
    for file in sorted(folder.glob("cells*.jsonl")):
        for line in file.read_bytes().split(b"\n")[:-1]:
            try:
                row = json.loads(line)
                if row["settings"] == settings:
                    found[Cell(row["variant"], row["ratio"], row["seed"])] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}: got {line[:40]!r}, want the cells of a sweep; want another output="
                ) from error
    return found


@functools.lru_cache(maxsize=1)
def _load(model_path: str, device: str, dtype: Dtype) -> tuple[AuroraForConditionalGeneration, AuroraProcessor]:
    where = torch.device(device)
    model = AuroraForConditionalGeneration.from_pretrained(
        model_path, torch_dtype=resolve_dtype(dtype, where), device_map=where
    )
    return model, AuroraProcessor.from_pretrained(model_path)


@functools.lru_cache(maxsize=4096)
def _frames(clip: int, split: str, num_frames: int, side: int) -> NDArray[np.uint8]:
    """Frames of a clip, (F, H, W, 3), as a decoder of its H.264 file gives them; rendered once in each process."""
    scene = sample_scene(clip, split)
    return through_h264(render_clip(scene, num_frames=num_frames, image_size=side))


def _kv_bytes(model: AuroraForConditionalGeneration) -> int:
    """Keys and values of one token in the language model."""
    text = model.config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * (torch.finfo(model.dtype).bits // 8)


def _peak_mib(device: torch.device) -> float | None:
    """Most memory allocated since the last reset; None on a CPU, where a process keeps what it once had."""
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if device.type == "cuda" else None


def _with_progress(rows: Iterator[dict[str, Any]], cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Pass rows on, and say after each what it found and how long the rest will take."""

    def cost(ratio: float) -> float:
        return 0.35 + ratio  # seconds a clip of aurora-tiny are about in proportion

    started, spent, total = time.monotonic(), 0.0, sum(cost(cell.ratio) for cell in cells)
    for done, row in enumerate(rows, start=1):
        yield row
        spent += cost(row["ratio"])
        left_s = (time.monotonic() - started) * (total - spent) / spent
        cell = Cell(row["variant"], row["ratio"], row["seed"])
        print(
            f"[{done}/{len(cells)}] {cell}: {100 * float(np.mean(row['scores'])):.1f} % right, "
            f"{row['visual_tokens'] / row['num_frames']:g} tokens a frame, "
            f"{sum(row['seconds'].values()):.2f} s a clip; {math.ceil(left_s / 60)} min left",
            file=sys.stderr,
            flush=True,
        )


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
