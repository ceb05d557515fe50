"""Rendered clips on disk, memory-mapped: frames with the tower's targets, one row a clip, seed = row.

Every other clip has been through a real H.264 file, as every clip is at inference. A killed rendering goes on where it
stopped.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aurora.data.tinyworld.dataset import through_h264
from aurora.data.tinyworld.render import frame_masks, frame_times, render_clip
from aurora.data.tinyworld.scene import FRAME_TASKS, frame_targets, sample_scene

SUB_CELLS = 16
"""Cells of the coverage target in one patch, 4 x 4."""
NUM_COVERAGES = 4
"""Coverage classes: background, main object, tiny object, landmark."""
_CHUNK = 25


class ClipBank(NamedTuple):
    """Clips of one split; row i is the scene of seed i."""

    split: str
    frames: NDArray[np.uint8]
    """(clips, F, height, width, 3)."""
    targets: NDArray[np.uint8]
    """Class of each attribute in the order of `FRAME_TASKS`, (clips, F, tasks)."""
    masks: NDArray[np.uint8]
    """Coverage class of each sub-patch cell, (clips, F, patches, 16)."""


def open_bank(
    folder: Path, *, split: str, num_clips: int, num_frames: int, image_size: int, patch_size: int, workers: int = 1
) -> ClipBank:
    """Open the bank of `split`, rendering it first where it is missing or has too few clips.

    Args:
        folder: Where banks live; each has a folder named by split and sizes.
        split: Split of TinyWorld.
        num_clips: Clips wanted at least.
        num_frames: Frames of a clip, at equal times from 0 to 1.
        image_size: Frame side in pixels.
        patch_size: Patch side in pixels, of the coverage targets.
        workers: Processes that render.

    Returns:
        The bank, memory-mapped, with `num_clips` rows.
    """
    target = folder / f"{split}-{num_frames}x{image_size}-p{patch_size}"
    if not (target / "bank.json").exists() or json.loads((target / "bank.json").read_text())["num_clips"] < num_clips:
        _render_bank(target, split, num_clips, num_frames, image_size, patch_size, workers)
    frames, targets, masks = (np.load(target / f"{name}.npy", mmap_mode="r") for name in ("frames", "targets", "masks"))
    return ClipBank(split, frames[:num_clips], targets[:num_clips], masks[:num_clips])


def _render_bank(
    target: Path, split: str, num_clips: int, num_frames: int, size: int, patch: int, workers: int
) -> None:
    writing = target.with_name(f".writing-{target.name}")
    notes = writing / "rows.txt"
    shapes = {
        "frames": (num_clips, num_frames, size, size, 3),
        "targets": (num_clips, num_frames, len(FRAME_TASKS)),
        "masks": (num_clips, num_frames, (size // patch) ** 2, SUB_CELLS),
    }
    arrays = _unfinished(writing, shapes) if notes.exists() else None
    if arrays is None:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        arrays = {
            name: np.lib.format.open_memmap(writing / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape)
            for name, shape in shapes.items()
        }
        notes.touch()
    done = set(notes.read_text().splitlines())
    chunks = [range(start, min(start + _CHUNK, num_clips)) for start in range(0, num_clips, _CHUNK)]
    chunks = [rows for rows in chunks if str(rows.start) not in done]
    render = partial(_render_rows, split=split, num_frames=num_frames, size=size, patch=patch)
    with ExitStack() as stack:
        results: Iterator[dict[str, Any]]
        if workers == 1:
            results = map(render, chunks)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            results = pool.map(render, chunks)
        stream = stack.enter_context(notes.open("a"))
        for rows, rendered in zip(chunks, results, strict=True):
            for name, values in rendered.items():
                arrays[name][rows.start : rows.stop] = values
            print(rows.start, file=stream, flush=True)
    for array in arrays.values():
        array.flush()
    (writing / "bank.json").write_text(json.dumps({"num_clips": num_clips, "split": split}) + "\n")
    notes.unlink()
    shutil.rmtree(target, ignore_errors=True)
    writing.replace(target)


def _unfinished(writing: Path, shapes: dict[str, tuple[int, ...]]) -> "dict[str, np.memmap[Any, Any]] | None":
    """Arrays a killed run left, or None where they are missing, damaged or of other shapes."""
    arrays: dict[str, np.memmap[Any, Any]] = {}
    for name, shape in shapes.items():
        try:
            arrays[name] = np.lib.format.open_memmap(writing / f"{name}.npy", mode="r+")
        except (OSError, ValueError):
            return None
        if arrays[name].shape != shape:
            return None
    return arrays


def _render_rows(seeds: Sequence[int], split: str, num_frames: int, size: int, patch: int) -> dict[str, Any]:
    rows: dict[str, list[Any]] = {"frames": [], "targets": [], "masks": []}
    times = frame_times(num_frames)
    for seed in seeds:
        scene = sample_scene(seed, split)
        frames = render_clip(scene, num_frames=num_frames, image_size=size)
        rows["frames"].append(through_h264(frames) if seed % 2 else frames)
        rows["targets"].append([[frame_targets(scene, t)[task] for task in FRAME_TASKS] for t in times])
        rows["masks"].append([frame_masks(scene, t, size, patch) for t in times])
    return {name: np.asarray(values, dtype=np.uint8) for name, values in rows.items()}
