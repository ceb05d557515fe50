"""suite=training: what merging saves in a training step, and our loop against transformers on the same data.

First a captioner whose tower has most of the arithmetic, at several kept ratios: time of a step, sides in turn in one
process, and memory, each side in a process of its own. Then a tiny LLaVA, trained from the same weights on the same
batches by transformers and by our loop with and without merging: time of a step, and the loss on held-out clips.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from rich.console import Console

from aurora.benchmark.config import BenchmarkConfig
from aurora.benchmark.harness import Row, WrongResultError, compare, is_met, percentiles
from aurora.benchmark.training_case import (
    CASES,
    FIRST_CLIP,
    PEER,
    Ours,
    Trainer,
    batches,
    build_model,
    merge_of,
    schedule_of,
)
from aurora.benchmark.training_worker import build_trainer, peak_bytes
from aurora.data.collate import Batch
from aurora.model.merge import MergeConfig, plan_merge
from aurora.model.vision import num_active_layers
from aurora.runtime import num_cores, resolve_device, resolve_dtype
from aurora.training.config import Precision
from aurora.training.optim import OptimConfig, set_learning_rate

UNMERGED = "1.0 constant"
MERGED = "0.2 constant"
"""The side that has to be faster than transformers and learn as well."""
SIDES = (UNMERGED, "0.2 constant", "0.1 constant", "0.2 linear", "0.1 linear")
LEARNING_SIDES = (PEER, UNMERGED, MERGED, "0.1 constant")
NUM_SEEDS = 3
_PRECISIONS = {torch.float32: Precision.fp32, torch.bfloat16: Precision.bf16}
Tell = Callable[[str], None]


class _Seconds(NamedTuple):
    """What each step of a side took."""

    wall: list[float]
    cpu: list[float]
    """Processor time of all threads, which a busy machine changes less."""


def run(config: BenchmarkConfig) -> Iterator[Row]:
    """Measure training.

    Args:
        config: quick takes a tiny model and few steps; dtype is float32 or bfloat16 (products under autocast).

    Yields:
        A row per side; `wanted` is what we want of it, `met` whether it is so.

    Raises:
        ValueError: for another dtype.
        WrongResultError: if our unmerged loss is not that of transformers.
    """
    device = resolve_device(config.device)
    precision = _PRECISIONS.get(resolve_dtype(config.dtype, device))
    if precision is None:
        raise ValueError(f"dtype={config.dtype.value}: want float32 or bfloat16 for suite=training")
    console = Console(stderr=True)
    threads = config.threads or (1 if config.quick else num_cores())

    def tell(line: str) -> None:
        console.print(f"  {line}", highlight=False)

    console.print("kept ratios", highlight=False)
    yield from measure_ratios(device, precision, quick=config.quick, threads=threads, tell=tell)
    console.print("learning", highlight=False)
    yield from measure_learning(device, precision, quick=config.quick, threads=threads, seed=config.seed, tell=tell)


def measure_ratios(
    device: torch.device, precision: Precision, *, quick: bool, threads: int, tell: Tell = lambda line: None
) -> list[Row]:
    """Time steps of one model at several kept ratios, and measure their memory.

    Args:
        device: Where.
        precision: fp32 or bf16.
        quick: A tiny model.
        threads: CPU threads of all sides.
        tell: Told what happens.

    Returns:
        A row per side, with its speed and memory relative to no merging.
    """
    name = "quick" if quick else "encoder"
    rows = _time_ratios(name, device, precision, repeats=2 if quick else 7, threads=threads, tell=tell)
    peaks = {}
    for side in SIDES:
        tell(f"memory of {side}")
        peaks[side] = peak_bytes(name, side, precision, device)
    for row in rows:
        own, whole = peaks[row["side"]], peaks[UNMERGED]
        row |= {"op": "training step, the tower dominates", "precision": precision.value}
        row |= {"visual_tokens": _visual_tokens(name, row["side"]), "peak_mib": own and own / 2**20}
        row["peak_share"] = own / whole if own and whole else None
        if row["side"] != UNMERGED:
            row["wanted"] = "ratio > 1, peak_share < 1"
            row["met"] = is_met(row)
    return rows


def _time_ratios(
    name: str, device: torch.device, precision: Precision, *, repeats: int, threads: int, tell: Tell
) -> list[Row]:
    # One model for all sides: what is timed does not depend on the weights, whose moments would fill the memory.
    model = build_model(CASES[name], 0, device)
    trainer = Ours(model, MergeConfig(), CASES[name].lr, precision)
    batch = next(batches(CASES[name], "train", device))

    def step_of(side: str) -> Callable[[], float]:
        def step() -> float:
            trainer.merge_by(merge_of(side))
            return trainer.step(batch)

        return step

    return compare(
        {side: step_of(side) for side in SIDES},
        repeats=repeats,
        warmup=1,
        threads_per_side=(threads,),
        baseline=UNMERGED,
        device=device,
        progress=tell,
    )


def measure_learning(
    device: torch.device,
    precision: Precision,
    *,
    quick: bool,
    threads: int,
    seed: int = 0,
    tell: Tell = lambda line: None,
) -> list[Row]:
    """Train one LLaVA with transformers and with our loop, several seeds each.

    All start from aurora-tiny, which has learned both with and without merging; a seed settles what is new, and
    batches. Every step is taken by each side in turn. The rate counts the tokens of the text alone, which all sides
    have in common.

    Args:
        device: Where.
        precision: fp32 or bf16.
        quick: A tiny model, few steps.
        threads: CPU threads of all sides.
        seed: First seed.
        tell: Told what happens.

    Returns:
        A row per side: rate and loss on held-out clips after the last step, each also relative to transformers.

    Raises:
        WrongResultError: if our unmerged loss before the first step is not that of transformers.
    """
    name, num_steps, num_held_out = ("quick", 3, 1) if quick else ("llava", 120, 12)
    has_peer = importlib.util.find_spec("transformers") is not None
    sides = LEARNING_SIDES if has_peer else LEARNING_SIDES[1:]
    held_out = list(islice(batches(CASES[name], "val", device), num_held_out))
    samples = {side: _Seconds([], []) for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    tokens: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number in range(seed, seed + NUM_SEEDS):
            trainers = {side: build_trainer(name, side, number, precision, device) for side in sides}
            _check_start(trainers, held_out[0], precision)
            first = FIRST_CLIP + number * num_steps * CASES[name].num_rows
            data = islice(batches(CASES[name], "train", device, first=first), num_steps)
            tokens += _take_steps(trainers, data, num_steps, schedule_of(CASES[name].lr), samples, device)
            for side, trainer in trainers.items():
                losses[side].append(statistics.fmean(trainer.loss(batch) for batch in held_out))
            tell(f"seed {number}: " + ", ".join(f"{side} {losses[side][-1]:.4f}" for side in sides))
    finally:
        torch.set_num_threads(before)
    return [_learning_row(name, side, sides[0], samples, losses, tokens, precision, device) for side in sides]


def _take_steps(
    trainers: Mapping[str, Trainer],
    data: Iterator[Batch],
    num_steps: int,
    schedule: OptimConfig,
    samples: Mapping[str, _Seconds],
    device: torch.device,
) -> list[int]:
    """Train all sides, adding each step's seconds to `samples`; returns the text tokens of each batch."""
    tokens = []
    turns = cycle(range(len(trainers)))
    for number, batch in enumerate(data):
        names = list(trainers)
        turn = next(turns)
        for side in names[turn:] + names[:turn]:
            set_learning_rate(trainers[side].optimizer, number, num_steps, schedule)
            start, cpu_start = time.perf_counter(), time.process_time()
            trainers[side].step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[side].wall.append(time.perf_counter() - start)
            samples[side].cpu.append(time.process_time() - cpu_start)
        tokens.append(int(batch.attention_mask.sum()))
    return tokens


def _learning_row(
    name: str,
    side: str,
    peer: str,
    samples: Mapping[str, _Seconds],
    losses: Mapping[str, list[float]],
    tokens: Sequence[int],
    precision: Precision,
    device: torch.device,
) -> Row:
    # Steps differ in length, so rates are of all steps together but for the first of a seed, which warm up.
    rate = {key: _rate(seconds.wall, tokens) for key, seconds in samples.items()}
    peak = peak_bytes(name, side, precision, device)
    p20, p50, p80 = percentiles([1e3 * seconds for seconds in samples[side].wall])
    row: Row = {"op": f"training of a tiny LLaVA, {len(tokens) // NUM_SEEDS} steps x {NUM_SEEDS} seeds", "side": side}
    row |= {"precision": precision.value, "visual_tokens": _visual_tokens(name, side)}
    row |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "text_tokens_s": rate[side], "ratio": rate[side] / rate[peer]}
    if device.type == "cpu":
        row["cpu_ms"] = percentiles([1e3 * seconds for seconds in samples[side].cpu])[1]
        row["cpu_ratio"] = _rate(samples[side].cpu, tokens) / _rate(samples[peer].cpu, tokens)
    row |= {
        "peak_mib": peak and peak / 2**20,
        "loss": statistics.fmean(losses[side]),
        "losses": [round(loss, 4) for loss in losses[side]],
    }
    row["standard_errors"] = standard_errors(losses[side], losses[peer]) if side != peer else None
    if side == MERGED and peer == PEER:
        row["wanted"] = "ratio >= 1.3, |standard_errors| < 2"
        row["met"] = is_met(row)
    return row


def _rate(seconds: Sequence[float], tokens: Sequence[int]) -> float:
    """Text tokens per second over all steps but the first of each seed."""
    per_seed = len(tokens) // NUM_SEEDS
    counted = [i for i in range(len(tokens)) if i % per_seed]
    return sum(tokens[i] for i in counted) / sum(seconds[i] for i in counted)


def standard_errors(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return how many pooled standard errors the mean of `losses` lies above that of `others`.

    Args:
        losses: Of one side, one for each seed, at least two.
        others: Of the other.
    """
    pooled = (statistics.variance(losses) / len(losses) + statistics.variance(others) / len(others)) ** 0.5
    difference = statistics.fmean(losses) - statistics.fmean(others)
    if pooled == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / pooled


def _check_start(trainers: Mapping[str, Trainer], batch: Batch, precision: Precision) -> None:
    """No speed from another model: before the first step the unmerged loss is that of transformers."""
    if PEER not in trainers:
        return
    got, want = (trainers[side].loss(batch) for side in (UNMERGED, PEER))
    bound = 1e-4 if precision is Precision.fp32 else 2e-2
    if not abs(got - want) <= bound * abs(want):
        raise WrongResultError(f"ours unmerged: loss {got:.6f} before the first step, {PEER} has {want:.6f}")


def _visual_tokens(case: str, side: str) -> int:
    """Visual tokens of one frame."""
    vision = CASES[case].vision
    if side == PEER:
        return vision.grid_size**2
    plan = plan_merge(
        merge_of(side),
        height_px=vision.image_size,
        width_px=vision.image_size,
        vision=vision,
        num_active_layers=num_active_layers(vision, CASES[case].config.feature_layer),
    )
    return plan.num_visual_tokens
