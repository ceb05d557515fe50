"""Where the numbers of a run go: a JSON line each, a live line on a terminal, TensorBoard and wandb where asked for."""

import importlib.util
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from aurora.runtime import process_bytes

CURVE_FILE = "curve.jsonl"
"""Records of a stage: losses, rates and scores, one JSON object a line."""
WORK = ("tokens", "visual_tokens", "flops")
"""Numbers that a step adds up over micro-batches and ranks; they are logged per second."""
_UNITS = {
    "tokens_per_s": "{:.0f} tokens/s",
    "visual_tokens_per_s": "{:.0f} visual",
    "tflops_per_s": "{:.3g} TFLOP/s",
    "memory_gib": "{:.2f} GiB",
    "mfu": "MFU {:.1%}",
    "steps_per_s": "{:.3g} steps/s",
}
"""How some numbers are printed."""
_LIVE = ("loss", "tokens_per_s", "visual_tokens_per_s", "memory_gib", "mfu", "tflops_per_s")
"""What a live line shows, as far as the terminal is wide enough."""
_ETA_WIDTH, _BAR_WIDTH = 7, 8


@dataclass(kw_only=True, slots=True)
class LoggerConfig:
    """Where the numbers of a run go, beside `curve.jsonl`, which is always written."""

    tensorboard: bool = False
    """Also write TensorBoard events into the stage's folder."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    wandb_project: str = "aurora"
    """Project there."""
    progress: bool = True
    """On a terminal, one live line with bar, loss, rates, memory and remaining time."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for the model-FLOPs utilisation; null measures a matrix product on a GPU, and on a
    CPU leaves utilisation out."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"logger.peak_tflops={self.peak_tflops}: want a positive number, or null")


class Sink(Protocol):
    """Another place for numbers and texts."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a finished step."""

    def text(self, step: int, name: str, lines: Sequence[str]) -> None:
        """Take some text."""

    def close(self) -> None:
        """Write what is pending."""


class RunLog:
    """Progress and loss curve of a stage; the curve is cut back to the checkpoint when a run resumes."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        num_steps: int,
        start: int,
        enabled: bool,
        config: LoggerConfig | None = None,
        peak_flops: float | None = None,
    ) -> None:
        """Open the log of stage `name` at finished step `start`.

        Args:
            folder: Of the stage.
            name: Stage.
            num_steps: Steps of the whole stage.
            start: Finished steps.
            enabled: False writes nothing: another rank does.
            config: Where to.
            peak_flops: Peak FLOP/s of all devices of the run, for the utilisation; None leaves it out.

        Raises:
            ValueError: if a logger is asked for whose package is missing.
        """
        config = config or LoggerConfig()
        self._path, self._name, self._num_steps, self._enabled = folder / CURVE_FILE, name, num_steps, enabled
        self._peak_flops = peak_flops
        self._started, self._first, self._step = time.monotonic(), start, start
        self._window, self._paused_s, self._window_paused_s = self._started, 0.0, 0.0
        self._values: dict[str, list[float]] = {}
        self._losses: list[float] = []  # of the first and the newest record
        self._sinks = open_sinks(config, folder, name, start) if enabled else []
        self._live = _live_line(name, num_steps, start) if enabled and config.progress else None
        if enabled and self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= start]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(self._path)

    def add(self, values: Mapping[str, float]) -> None:
        """Take one finished step's numbers into the means (of `WORK`, the sums) of the next record."""
        self._step += 1
        for key, value in values.items():
            self._values.setdefault(key, []).append(value)
        if self._live is not None:
            means = self._means()
            count = f"{self._step}/{self._num_steps}"
            room = self._live.console.width - len(f"{self._name} {'-' * _BAR_WIDTH} {count} ") - _ETA_WIDTH - 1
            numbers = _as_text({key: means[key] for key in _LIVE if key in means}, room)
            self._live.update(self._live.task_ids[0], completed=self._step, count=count, numbers=numbers)

    def write(self, step: int, **extra: float) -> None:
        """Record the means since the last record, at finished step `step`, and print them."""
        means = self._means()
        if "loss" in means:
            self._losses = [*self._losses[:1], means["loss"]]
        self._values = {}
        self._window, self._window_paused_s = time.monotonic(), 0.0
        rate = (step - self._first) / max(1e-9, self._window - self._started - self._paused_s)
        eta_s = (self._num_steps - step) / max(rate, 1e-9)
        self.record(step, {**means, **extra, "steps_per_s": rate, "eta_s": eta_s})

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record and print it as one line."""
        if not self._enabled:
            return
        rounded = {key: float(f"{value:.8g}") for key, value in values.items()}
        self._append({"stage": self._name, "step": step, **rounded})
        for sink in self._sinks:
            sink.numbers(step, rounded)
        if self._live is None or any(key.startswith("val/") for key in rounded):
            self._print(f"{self._name} {step}/{self._num_steps}  {_as_text(rounded)}")

    def text(self, step: int, name: str, lines: Sequence[str]) -> None:
        """Append texts, such as captions, and print them."""
        if not self._enabled or not lines:
            return
        self._append({"stage": self._name, "step": step, name: list(lines)})
        for sink in self._sinks:
            sink.text(step, name, lines)
        for line in lines:
            self._print(f"  {name}: {line}")

    def say(self, line: str) -> None:
        """Print a line about the run; it is in no file."""
        if self._enabled:
            self._print(line)

    def summary(self) -> str:
        """Say what the steps since the log was opened have done: how many, how long, first and last loss recorded."""
        took = timedelta(seconds=round(time.monotonic() - self._started))
        losses = f", loss {self._losses[0]:.4g} -> {self._losses[-1]:.4g}" if self._losses else ""
        return f"{self._step - self._first} steps in {took}{losses}"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens in a `with` out of the rates: validation, checkpoints."""
        before = time.monotonic()
        yield
        took = time.monotonic() - before
        self._paused_s += took
        self._window_paused_s += took

    def close(self) -> None:
        """End the live line and write what loggers hold back."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def _means(self) -> dict[str, float]:
        """Return the means since the last record, and the rates of the work done since."""
        means = {key: sum(values) / len(values) for key, values in self._values.items() if key not in WORK}
        elapsed = max(1e-9, time.monotonic() - self._window - self._window_paused_s)
        rates = {key: sum(self._values[key]) / elapsed for key in WORK if key in self._values}
        if not rates:
            return means
        flops = rates.pop("flops", 0.0)
        means |= {f"{key}_per_s": rate for key, rate in rates.items()}
        means |= {"tflops_per_s": flops / 1e12, "memory_gib": peak_memory_gib()}
        return means | ({"mfu": flops / self._peak_flops} if self._peak_flops else {})

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a write's own message has no name
            raise OSError(f"{self._path}: cannot write ({error.strerror}); the checkpoints stay") from None

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def peak_memory_gib() -> float:
    """Return the most memory this process has held: of the GPU where there is one in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = process_bytes("VmHWM")
    if peak is None:  # macOS, where it is in bytes, and a new program starts anew
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s of a large matrix product on a GPU, the best of a few; None on any other device."""
    if device.type != "cuda":
        return None
    size = 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ a
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1e3)
    return float(2 * size**3 / min(times))


def open_sinks(config: LoggerConfig, folder: Path, name: str, start: int) -> list[Sink]:
    """Open what a configuration asks for beside the curve.

    Raises:
        ValueError: if a package is missing, with the command that installs it.
    """
    sinks: list[Sink] = []
    for wanted, package, make in (
        (config.tensorboard, "tensorboard", lambda: _TensorBoard(folder, start)),
        (config.wandb, "wandb", lambda: _Wandb(config.wandb_project, folder, name)),
    ):
        if wanted:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"logger.{package}=true: {package} is not installed: pip install {package}")
            sinks.append(make())
    return sinks


class _TensorBoard:
    """Events for TensorBoard."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def text(self, step: int, name: str, lines: Sequence[str]) -> None:
        self._writer.add_text(name, "\n\n".join(lines), step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run at Weights & Biases; the stage's folder remembers which, so that a resumed run goes on there."""

    def __init__(self, project: str, folder: Path, name: str) -> None:
        import wandb  # type: ignore[import-not-found]

        note = folder / "wandb_id.txt"
        known = note.read_text().strip() if note.exists() else None
        self._run: Any = wandb.init(project=project, name=name, dir=str(folder), id=known, resume="allow")
        note.write_text(f"{self._run.id}\n")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, lines: Sequence[str]) -> None:
        self._run.log({name: "\n\n".join(lines)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _live_line(name: str, num_steps: int, start: int) -> Any:
    """Start a live line, or return None: not a terminal, or a process among several that print."""
    if not sys.stdout.isatty() or multiprocessing.parent_process() is not None:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    line = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_BAR_WIDTH),
        TextColumn("{task.fields[count]}", markup=False),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=_ETA_WIDTH)),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=Console(),
        refresh_per_second=4,
    )
    line.add_task(name, total=num_steps, completed=start, count=f"{start}/{num_steps}", numbers="")
    line.start()
    return line


def _as_text(values: Mapping[str, float], room: int | None = None) -> str:
    """Write numbers in a row; of those that do not fit into `room` characters the last ones are left out."""
    parts = []
    for key, value in values.items():
        if key == "eta_s":
            parts.append(f"{timedelta(seconds=round(value))} left")
        else:
            parts.append(_UNITS[key].format(value) if key in _UNITS else f"{key} {value:.5g}")
    while room is not None and parts and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)


def _step_of(line: str) -> float:
    """Return the step of a record; a line cut off by a kill has none and goes."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
