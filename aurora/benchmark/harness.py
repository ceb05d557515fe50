"""Timing that can be trusted: the sides take turns in one process, are checked first, and report their spread.

A machine drifts (clocks, neighbours, caches), so no side is measured in one block: each round runs every side once,
in an order that turns round by round. Warm-up, which includes compiling, is timed apart. On a CPU each side runs with
the number of threads that suits it best; on CUDA events time the device, after a write that empties its L2 cache.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import operator
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aurora.runtime import environment_report, num_cores

Row = dict[str, Any]
"""One line of a table: plain values, ready for JSON."""

_resource = importlib.import_module("resource") if importlib.util.find_spec("resource") else None  # not on Windows
_FLUSH_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU we know (H200: 50 MiB)."""

_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}

_TUNING = r"MALLOC_|(OMP_NUM_THREADS|AURORA_KERNELS|TRITON_INTERPRET)$"
"""Environment variables that change a measurement; `MALLOC_TRIM_THRESHOLD_` has glibc keep memory that is freed."""


class WrongResultError(RuntimeError):
    """A side computes something else than the baseline, so its speed means nothing."""


def compare(
    sides: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 2,
    settle: int = 0,
    threads_per_side: Mapping[str, int] | Sequence[int] | None = None,
    baseline: str | None = None,
    check: Callable[[str, Any, Any], None] | None = None,
    device: torch.device | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Time callables alternately in this process.

    Args:
        sides: Name to callable without arguments; each call is one sample.
        repeats: Rounds; each runs every side once.
        warmup: Calls of each side before the rounds; the first one compiles.
        settle: Calls of a side that go before each of its samples and do not count: it then finds the caches and the
            heap as its own last call left them. Without, a side pays for memory that another returned to the system.
        threads_per_side: CPU threads by name; or the counts to try on every side, the quickest of which it then keeps;
            None tries 1 and all cores. Not used on CUDA.
        baseline: Side that ratios refer to; None is the first.
        check: Called before any timing as check(name, its result, result of the baseline); raises if they differ.
        device: Where the sides run; None is the CPU.
        progress: Told what happens, one short line at a time.

    Returns:
        A row for each side: side, threads, warmup_ms (the first call), repeats, p20_ms, p50_ms, p80_ms, and ratio, the
        baseline's p50 over this one: above 1 is faster than the baseline. On a CPU also the medians of cpu_ms, the
        processor time of all threads, which a busy machine changes less, and of page_faults, the pages of memory that
        the system had to hand over: often most of an allocation's cost.

    Raises:
        ValueError: if there is no side, or the baseline is none of them.
        WrongResultError: from `check`.
    """
    names = list(sides)
    baseline = baseline if baseline is not None else next(iter(names), "")
    if baseline not in sides:
        raise ValueError(f"baseline={baseline}: want one of {', '.join(names) or 'at least one side'}")
    device = device or torch.device("cpu")
    tell = progress or (lambda line: None)
    before = torch.get_num_threads()
    try:
        first_ms = _first_calls(sides, baseline, check, device, tell)
        threads = {}
        for name in names:
            tell(f"warming up {name}")
            threads[name] = _best_threads(sides[name], warmup, _threads_to_try(name, threads_per_side, device), device)
        samples: dict[str, list[_Sample]] = {name: [] for name in names}
        for round_number in range(repeats):
            turn = round_number % len(names)
            for name in names[turn:] + names[:turn]:
                use_threads(threads[name])
                for _ in range(settle):
                    time_once(sides[name], device)
                samples[name].append(_sample(sides[name], device))
            tell(f"round {round_number + 1} of {repeats}")
    finally:
        use_threads(before)
    base = statistics.median(sample.ms for sample in samples[baseline])
    rows = []
    for name in names:
        p20, p50, p80 = percentiles([sample.ms for sample in samples[name]])
        rows.append(
            {"side": name, "threads": threads[name], "warmup_ms": first_ms[name], "repeats": repeats}
            | {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "ratio": base / p50}
        )
        if device.type == "cpu":
            rows[-1]["cpu_ms"] = statistics.median(sample.cpu_ms for sample in samples[name])
            rows[-1]["page_faults"] = int(statistics.median(sample.page_faults for sample in samples[name]))
    return rows


def use_threads(count: int) -> None:
    """Set PyTorch's threads if they are not so many already: setting them empties oneDNN's store of made products."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def time_once(run: Callable[[], object], device: torch.device) -> float:
    """Run once and return the milliseconds it took: wall clock on a CPU, events on CUDA after emptying the L2 cache."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The write also keeps the device busy while the host queues the launches that are to be timed.
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize(device)
    return float(start_event.elapsed_time(end_event))


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile, interpolated; of one sample it is that sample thrice.

    Raises:
        ValueError: if there is no sample.
    """
    if not samples:
        raise ValueError("repeats=0: want at least 1")
    values = torch.tensor(samples, dtype=torch.float64)
    low, middle, high = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return low, middle, high


def is_met(row: Row) -> bool | None:
    """Whether a row holds what it says is wanted; None where that was not measured.

    Args:
        row: With `wanted`, such as `ratio > 1, |standard_errors| < 2`: names of columns, bars for the magnitude.

    Raises:
        KeyError: for a sign that is not one of < <= > >=.
    """
    met: bool | None = True
    for clause in str(row["wanted"]).split(", "):
        name, sign, bound = clause.split()
        value = row.get(name.strip("|"))
        if value is None:
            met = None if met else met
        elif not _SIGNS[sign](abs(value) if name.startswith("|") else value, float(bound)):
            met = False
    return met


def expect_close(*, atol: float, rtol: float = 0.0) -> Callable[[str, Any, Any], None]:
    """Make a check for `compare`: tensors (or tuples of them) agree with the baseline's.

    Args:
        atol: Largest absolute difference, in units of the largest magnitude of the baseline's tensor.
        rtol: Relative difference allowed on top, elementwise.

    Returns:
        The check; it raises `WrongResultError` naming the side, the difference and the bound.
    """

    def check(name: str, got: Any, want: Any) -> None:
        gots, wants = (list(_tensors(result)) for result in (got, want))
        if [tuple(tensor.shape) for tensor in gots] != [tuple(tensor.shape) for tensor in wants]:
            raise WrongResultError(
                f"{name}: got shapes {[tuple(t.shape) for t in gots]}, want {[tuple(t.shape) for t in wants]}"
            )
        for mine, theirs in zip(gots, wants, strict=True):
            mine, theirs = mine.double(), theirs.double()
            bound = atol * theirs.abs().max().item() if theirs.numel() else 0.0
            worst = ((mine - theirs).abs() - rtol * theirs.abs()).max().item() if theirs.numel() else 0.0
            if not worst <= bound:  # also where it is NaN
                raise WrongResultError(f"{name}: differs from the baseline by {worst:.3g}, want at most {bound:.3g}")

    return check


def header(*, command: Sequence[str] | None = None) -> Row:
    """Say what a measurement was made with.

    Args:
        command: Words of the command line; None takes this process's own.

    Returns:
        device, cpu, cores, load, versions, commit, dirty, command, environment, time; on CUDA the driver and its
        clocks. `claim` says whether speeds may be quoted, `busy` on a CPU whether other work disturbed the run.
    """
    report: Row = dict(environment_report())
    commit = str(report["commit"])
    report["commit"], report["dirty"] = commit.removesuffix("-dirty"), commit.endswith("-dirty")
    report["cpu"], report["cores"] = cpu_model(), num_cores()
    report["load_1min"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    words = command if command is not None else ["python", *sys.argv]
    report["command"] = shlex.join(word for word in words if not word.startswith("hydra"))  # those the cli adds
    tuned = {name: value for name, value in sorted(os.environ.items()) if re.match(_TUNING, name)}
    if tuned:
        report["environment"] = " ".join(f"{name}={value}" for name, value in tuned.items())
    report["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if torch.cuda.is_available():
        report |= _gpu_state()
    else:
        report["claim"] = "CPU run: no claim about the speed of a GPU"
        # The average lags behind, so this is for work that was there before, not for the measurement itself.
        report["busy"] = report["load_1min"] is not None and report["load_1min"] > 0.5 * report["cores"]
    return report


def device_slug() -> str:
    """Name this machine's device for a file name: `nvidia-h200`, or `cpu-amd-epyc`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {cpu_model()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_model() -> str:
    """Name the processor as the operating system does."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def print_header(report: Mapping[str, Any]) -> None:
    """Print a header, a few facts to a line."""
    parts = [f"{key} {value}" for key, value in report.items() if key not in ("command", "claim", "platform")]
    print("  ".join(parts))
    print(f"command: {report['command']}")
    if "claim" in report:
        print(report["claim"])


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print rows as tables, one for each `op`; numbers have three digits.

    Columns are the keys in order of appearance. What all rows of an op share stands above its table instead.

    Args:
        title: What stands above them.
        rows: Lines; a key that a row lacks is left blank.
    """
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width; a table that is cut there would lose its numbers.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(title, style="bold", highlight=False)
    for op in dict.fromkeys(row.get("op") for row in rows):
        group = [{key: value for key, value in row.items() if key != "op"} for row in rows if row.get("op") == op]
        columns = list(dict.fromkeys(key for row in group for key in row))
        shared = {
            column: group[0][column]
            for column in columns
            if len(group) > 1 and all(column in row and row[column] == group[0][column] for row in group)
        }
        words = [_shown(op), *(f"{key} {_shown(value)}" for key, value in shared.items() if value is not None)]
        table = Table(title=", ".join(filter(None, words)), title_justify="left", title_style="")
        numeric = {c for c in columns if all(isinstance(row.get(c), int | float | None) for row in group)}
        columns = [column for column in columns if column not in shared]
        for column in columns:
            table.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
        for row in group:
            table.add_row(*(_shown(row.get(column)) for column in columns))
        console.print(table)


def write_report(suite: str, report: Mapping[str, Any], rows: Sequence[Row], output: str | None = None) -> Path:
    """Write header and rows as JSON, and print the same as the last line of stdout.

    Args:
        suite: Its name, for the file.
        report: From `header`, plus what the suite adds.
        rows: All rows.
        output: File; None is `outputs/bench/<suite>-<device>.json`.

    Returns:
        The file.
    """
    path = Path(output).expanduser() if output is not None else Path("outputs/bench") / f"{suite}-{device_slug()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"suite": suite, "header": dict(report), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    print(json.dumps(content))
    return path


def _first_calls(
    sides: Mapping[str, Callable[[], object]],
    baseline: str,
    check: Callable[[str, Any, Any], None] | None,
    device: torch.device,
    tell: Callable[[str], None],
) -> dict[str, float]:
    """Call every side once, baseline first, and check what it returns; the milliseconds include compiling."""
    took: dict[str, float] = {}
    wanted: object = None
    for name in sorted(sides, key=lambda side: side != baseline):
        tell(f"first call of {name}")
        results: list[object] = []
        took[name] = time_once(lambda run=sides[name], keep=results: keep.append(run()), device)  # type: ignore[misc]
        wanted = results[0] if name == baseline else wanted
        if check is not None:
            check(name, results[0], wanted)
    return took


def _threads_to_try(
    name: str, threads: Mapping[str, int] | Sequence[int] | None, device: torch.device
) -> Sequence[int]:
    if device.type == "cuda":
        return (torch.get_num_threads(),)
    if isinstance(threads, Mapping):
        return (threads[name],)
    return sorted(set(threads or (1, num_cores())), reverse=True)


def _best_threads(run: Callable[[], object], warmup: int, counts: Sequence[int], device: torch.device) -> int:
    """Warm a side up with each number of threads and return the one that its quickest call had."""
    best: dict[int, float] = {}
    for count in counts:
        use_threads(count)
        # One count needs no choice: then the first call was a warm-up already.
        for _ in range(max(1, warmup) if len(counts) > 1 else max(0, warmup - 1)):
            took = time_once(run, device)
            best[count] = min(took, best.get(count, took))
    return min(best, key=best.__getitem__) if best else counts[0]


class _Sample(NamedTuple):
    ms: float
    cpu_ms: float
    page_faults: int


def _sample(run: Callable[[], object], device: torch.device) -> _Sample:
    faults, cpu = _page_faults(), time.process_time()
    took = time_once(run, device)
    return _Sample(took, (time.process_time() - cpu) * 1e3, _page_faults() - faults)


def _page_faults() -> int:
    return 0 if _resource is None else int(_resource.getrusage(_resource.RUSAGE_SELF).ru_minflt)


def _tensors(result: Any) -> Any:
    """Yield the floating-point tensors of a result: a tensor, or a tuple or list of results."""
    if isinstance(result, Tensor):
        yield result.detach()
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


def _gpu_state() -> Row:
    """Ask the driver for its version and the clocks, in MHz."""
    keys = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {"driver": "unknown"}
    if done.returncode != 0:
        return {"driver": "unknown"}
    return dict(zip(keys, (value.strip() for value in done.stdout.split(",")), strict=False))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
