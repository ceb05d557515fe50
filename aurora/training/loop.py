"""The one training loop: every stage of every recipe is a `Task` that this loop drives, saves and resumes."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aurora.training.config import Precision, StageConfig
from aurora.training.distributed import World, stop_if_orphaned
from aurora.training.optim import build_optimizer, set_learning_rate
from aurora.training.state import checkpoint_path, checkpoint_steps, load_checkpoint, read_state, save_checkpoint

CURVE_FILE = "curve.jsonl"
"""Records of a stage: losses, rates and scores, one JSON object a line."""
_FIXED_ON_RESUME = ("objective", "batch_size", "precision", "trainable", "token_kept_ratios", "num_captions")


class Task(Protocol):
    """What a stage learns: a module, and a loss that is a function of the step alone."""

    @property
    def module(self) -> nn.Module:
        """Everything the checkpoint holds; its parameters with `requires_grad` learn."""
        ...

    def loss(self, step: int, world: World) -> tuple[Tensor, dict[str, float]]:
        """Return this rank's share of the loss of `step` (the ranks' mean is the step's loss) and numbers to log."""
        ...

    def validate(self) -> dict[str, float]:
        """Return scores on held-out data; called on the main rank without gradients."""
        ...


def scaled_steps(stage: StageConfig, scale: float) -> int:
    """Return the steps of `stage` in a recipe scaled by `scale`, at least 2."""
    return max(2, round(stage.num_steps * scale))


def is_finished(folder: Path, num_steps: int) -> bool:
    """Return whether the stage in `folder` has the checkpoint of its last step."""
    return num_steps in checkpoint_steps(folder)


def freeze(module: nn.Module, trainable: list[str]) -> None:
    """Let only the parameters whose names start with a prefix in `trainable` learn, of those that learn now.

    Raises:
        ValueError: if a prefix matches no parameter.
    """
    names = [name for name, _ in module.named_parameters()]
    for prefix in trainable:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"stage.trainable: {prefix!r} matches no parameter; want prefixes such as {names[0]!r}")
    for name, parameter in module.named_parameters():
        if not name.startswith(tuple(trainable)):
            parameter.requires_grad_(False)


class Curve:
    """Progress line and loss curve: one JSON object a line, cut back to the checkpoint when a run resumes."""

    def __init__(self, path: Path, *, name: str, num_steps: int, start: int, enabled: bool) -> None:
        """Open the curve of stage `name` at finished step `start`."""
        self._path, self._name, self._num_steps, self._enabled = path, name, num_steps, enabled
        self._started, self._first = time.monotonic(), start
        self._values: dict[str, list[float]] = {}
        if enabled and path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= start]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(path)

    def add(self, values: Mapping[str, float]) -> None:
        """Take one step's numbers into the means of the next record."""
        for key, value in values.items():
            self._values.setdefault(key, []).append(value)

    def write(self, step: int, **extra: float) -> None:
        """Record the mean since the last record, at finished step `step`, and print it."""
        means = {key: sum(values) / len(values) for key, values in self._values.items()}
        self._values = {}
        rate = (step - self._first) / max(1e-9, time.monotonic() - self._started)
        eta_s = (self._num_steps - step) / max(rate, 1e-9)
        self.record(step, {**means, **extra, "steps_per_s": rate, "eta_s": eta_s})

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record and print it as one line."""
        if not self._enabled:
            return
        rounded = {key: float(f"{value:.5g}") for key, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self._name, "step": step, **rounded}) + "\n")
        line = "  ".join(f"{key} {value:g}" for key, value in rounded.items())
        print(f"{self._name} {step}/{self._num_steps}  {line}", flush=True)


def run_stage(
    task: Task,
    stage: StageConfig,
    *,
    name: str,
    folder: Path,
    num_steps: int,
    world: World,
    keep: int = 2,
    stop_after: int | None = None,
) -> None:
    """Train `task` to `num_steps` finished steps, from the newest complete checkpoint in `folder` if there is one.

    Args:
        task: What is learned; its initial weights count only for a fresh start.
        stage: Batch, optimizer and cadence.
        name: Stage name in the curve.
        folder: Checkpoints and `curve.jsonl`.
        num_steps: Steps of the whole stage; the schedule depends on it.
        world: This process among those that share the stage.
        keep: Newest checkpoints kept.
        stop_after: Leave, with a checkpoint, once this many steps are finished.

    Raises:
        ValueError: if the checkpoint was written under a configuration that would make the continuation another run.
        FloatingPointError: if a loss or gradient is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    freeze(task.module, stage.trainable)
    optimizer = build_optimizer(task.module, stage.optim)
    info = {"stage": name, "num_steps": num_steps, "config": plain(asdict(stage))}
    steps = checkpoint_steps(folder)
    done = world.agree(steps[-1] if steps else 0)
    if done:
        _check_resumable(read_state(checkpoint_path(folder, done)), info, folder)
        load_checkpoint(checkpoint_path(folder, done), task.module, optimizer)
    curve = Curve(folder / CURVE_FILE, name=name, num_steps=num_steps, start=done, enabled=world.is_main)
    parameters = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    parent, end = os.getppid(), min(num_steps, stop_after or num_steps)
    for step in range(done, end):
        stop_if_orphaned(parent)
        lr = set_learning_rate(optimizer, step, num_steps, stage.optim)
        numbers = train_step(task, optimizer, parameters, stage, step=step, world=world)
        finished = step + 1
        curve.add(numbers)
        if finished % stage.log_every == 0 or finished == end:
            curve.write(finished, lr=lr)
        if (finished % stage.validate_every == 0 or finished == num_steps) and world.is_main:
            curve.record(finished, {f"val/{key}": value for key, value in _validate(task, stage).items()})
        if finished % stage.checkpoint_every == 0 or finished == end:
            if world.is_main:
                save_checkpoint(folder, finished, task.module, optimizer, info=info, keep=keep)
            world.barrier()


def train_step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    stage: StageConfig,
    *,
    step: int,
    world: World,
) -> dict[str, float]:
    """Do one optimizer step and return its numbers (`loss`, `grad_norm` and the task's own).

    Raises:
        FloatingPointError: if the loss or the gradient is not finite.
    """
    task.module.train()
    with autocast(stage.precision):
        loss, numbers = task.loss(step, world)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    world.average([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = nn.utils.clip_grad_norm_(parameters, stage.optim.clip_norm)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise FloatingPointError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}: want finite numbers")
    optimizer.step()
    return {"loss": loss.item(), "grad_norm": norm.item(), **numbers}


def autocast(precision: Precision) -> Any:
    """Return the context in which a forward pass computes in `precision` on the CPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision is Precision.bf16 else nullcontext()


def _validate(task: Task, stage: StageConfig) -> dict[str, float]:
    task.module.eval()
    with torch.no_grad(), autocast(stage.precision):
        return task.validate()


def plain(value: Any) -> Any:
    """Return a configuration value as JSON holds it: enums by value, tuples as lists."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_resumable(state: Mapping[str, Any], info: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a run as another one; a changed cadence or learning rate is allowed."""
    if state["stage"] != info["stage"]:
        raise ValueError(f"{folder}: holds stage {state['stage']!r}, want {info['stage']!r}")
    differing = {
        key: (state["config"].get(key), info["config"][key])
        for key in _FIXED_ON_RESUME
        if state["config"].get(key) != info["config"][key]
    }
    if differing:
        table = "; ".join(f"{key}={new!r}, the checkpoint has {old!r}" for key, (old, new) in differing.items())
        raise ValueError(f"{folder}: cannot resume with {table}: want the same values or another run_dir")
