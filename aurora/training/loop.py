"""The one training loop: every stage of every recipe is a `Task` that this loop drives, saves and resumes."""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aurora.training.config import Parallel, StageConfig
from aurora.training.distributed import World, stop_if_orphaned
from aurora.training.ema import WeightAverage
from aurora.training.logger import WORK, LoggerConfig, RunLog, measured_peak_flops
from aurora.training.optim import build_optimizer, set_learning_rate
from aurora.training.scaler import LossScaler, autocast, compute_dtype
from aurora.training.state import checkpoint_path, checkpoint_steps, load_checkpoint, read_state, save_checkpoint

_FIXED_ON_RESUME = (
    "objective",
    "batch_size",
    "precision",
    "trainable",
    "lora",
    "merge",
    "ema_decay",
    "token_kept_ratios",
    "num_captions",
)


_DIGESTS = ("data", "files")


class Task(Protocol):
    """What a stage learns: a module, and losses that are a function of the step alone."""

    @property
    def module(self) -> nn.Module:
        """Everything the checkpoint holds; its parameters with `requires_grad` learn."""
        ...

    def losses(self, step: int, world: World) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """Yield this rank's micro-batches of `step`: a loss and numbers to log for each.

        The step's loss is the sum of them, averaged over the ranks. The backward pass runs between two of them.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Return scores on held-out data; called without gradients on the main rank, or on all that share a model."""
        ...

    def samples(self) -> list[str]:
        """Return some of what the model writes about held-out data, after `validate`."""
        ...


class WholeBatch:
    """A task whose rank has one loss a step, `loss(step, world)`, and shows no samples."""

    def loss(self, step: int, world: World) -> tuple[Tensor, dict[str, float]]:
        """Return this rank's share of the loss of `step` (the ranks' mean is the step's loss) and numbers to log."""
        raise NotImplementedError

    def losses(self, step: int, world: World) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """Yield the one loss."""
        yield self.loss(step, world)

    def samples(self) -> list[str]:
        """Return nothing."""
        return []


class Learning(NamedTuple):
    """What a stage's steps change."""

    task: Task
    optimizer: torch.optim.AdamW
    scaler: LossScaler
    average: WeightAverage | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        return [parameter for parameter in self.task.module.parameters() if parameter.requires_grad]


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


def start_learning(task: Task, stage: StageConfig) -> Learning:
    """Freeze what does not learn, and build optimizer, loss scale and averaged weights."""
    freeze(task.module, stage.trainable)
    average = WeightAverage(task.module, stage.ema_decay) if stage.ema_decay is not None else None
    return Learning(task, build_optimizer(task.module, stage.optim), LossScaler(stage.precision), average)


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
    logger: LoggerConfig | None = None,
    identity: Mapping[str, str | int] | None = None,
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
        logger: Where numbers go beside the curve.
        identity: What else makes the run the one it is: `seed`, `data` (a digest of samples and order), `files`, ...;
            kept in checkpoints, and one in which any but `files` differs is not continued.

    Raises:
        ValueError: if the checkpoint was written under a configuration that would make the continuation another run.
        FloatingPointError: if a loss or gradient is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    learning = start_learning(task, stage)
    info = {"stage": name, "num_steps": num_steps, "config": plain(asdict(stage)), **(identity or {})}
    steps = checkpoint_steps(folder)
    done = world.agree(steps[-1] if steps else 0)
    if done:
        state = read_state(checkpoint_path(folder, done))
        _check_resumable(state, info, folder, identity or {})
        load_checkpoint(checkpoint_path(folder, done), task.module, learning.optimizer, learning.average)
        learning.scaler.load_state_dict(state.get("scaler", learning.scaler.state_dict()))
    log = _open_log(
        stage, folder, name=name, num_steps=num_steps, start=done, world=world, config=logger or LoggerConfig()
    )
    log.say(f"{name}: {_in_short(learning, stage, num_steps, world)}" + (f", from step {done} on" if done else ""))
    shares_model = stage.parallel is Parallel.fsdp
    parent = os.getppid() if multiprocessing.parent_process() is not None else None
    end = min(num_steps, stop_after or num_steps)
    try:
        for step in range(done, end):
            if parent is not None:
                stop_if_orphaned(parent)
            lr = set_learning_rate(learning.optimizer, step, num_steps, stage.optim)
            log.add(train_step(learning, stage, step=step, world=world))
            finished = step + 1
            if finished % stage.log_every == 0 or finished == end:
                log.write(finished, lr=lr)
            if (finished % stage.validate_every == 0 or finished == num_steps) and (world.is_main or shares_model):
                with log.paused():
                    _validate(learning, stage, log, finished, world)
            if finished % stage.checkpoint_every == 0 or finished == end:
                with log.paused():
                    if world.is_main or shares_model:
                        saved = {**info, "scaler": learning.scaler.state_dict()}
                        module, average = task.module, learning.average
                        save_checkpoint(
                            folder, finished, module, learning.optimizer, info=saved, keep=keep, average=average,
                            world=world,
                        )  # fmt: skip
                    world.barrier()
    finally:
        log.close()
    if end > done:
        log.say(f"{name}: {log.summary()}, {checkpoint_path(folder, end)}")


def train_step(learning: Learning, stage: StageConfig, *, step: int, world: World) -> dict[str, float]:
    """Do one optimizer step and return its numbers (`loss`, `grad_norm` and the task's own).

    Raises:
        FloatingPointError: if the loss or the gradient is not finite, and a smaller loss scale would not help.
    """
    task, optimizer, scaler, average = learning
    task.module.train()
    optimizer.zero_grad(set_to_none=True)
    loss, numbers = _backward(task, stage, scaler, step, world)
    parameters = learning.parameters
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if stage.parallel is not Parallel.fsdp:  # there the backward has averaged them
        world.average(gradients)
    scaler.unscale(gradients)
    norm = _clip(parameters, stage.optim.clip_norm)
    is_finite = torch.isfinite(torch.tensor([loss, norm])).all().item() is True
    if not is_finite and not scaler.may_skip:
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}: want finite numbers")
    if scaler.update(is_finite=is_finite):
        optimizer.step()
        if average is not None:
            average.update()
    extra = {"loss_scale": scaler.scale, "skipped_steps": float(scaler.skipped_steps)} if scaler.enabled else {}
    return {"loss": loss, "grad_norm": norm, **numbers, **extra} if is_finite else extra


def _backward(
    task: Task, stage: StageConfig, scaler: LossScaler, step: int, world: World
) -> tuple[float, dict[str, float]]:
    """Run the micro-batches of a step forward and backward; return the loss over all ranks, and numbers."""
    losses: list[Tensor] = []
    numbers: dict[str, float] = {}
    parts = task.losses(step, world)
    while True:
        with autocast(stage.precision, world.device.type):
            part = next(parts, None)
        if part is None:
            break
        if part[0].requires_grad:  # else nothing that learns took part: text alone, while only the projector learns
            (part[0] * scaler.scale if scaler.enabled else part[0]).backward()
        losses.append(part[0].detach())
        for key, value in part[1].items():
            numbers[key] = numbers.get(key, 0.0) + value if key in WORK else value
    work = {key: numbers[key] for key in WORK if key in numbers}
    total, *summed = world.sum([float(torch.stack(losses).sum()), *work.values()])
    return total / world.size, numbers | dict(zip(work, summed, strict=True))


def _clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale the gradient down to a norm of `max_norm` and return the norm it had."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _in_short(learning: Learning, stage: StageConfig, num_steps: int, world: World) -> str:
    """Say what a stage does: steps, what learns, arithmetic, processes."""
    learned = sum(parameter.numel() for parameter in learning.parameters)
    total = sum(parameter.numel() for parameter in learning.task.module.parameters())
    ranks = f"{world.size} ranks ({stage.parallel.value})" if world.size > 1 else world.device.type
    numbers = f"{learned / 1e6:,.2f} of {total / 1e6:,.2f} M parameters learn"
    return f"{num_steps} steps of {stage.batch_size}, {numbers}, {stage.precision.value} on {ranks}"


def _open_log(
    stage: StageConfig,
    folder: Path,
    *,
    name: str,
    num_steps: int,
    start: int,
    world: World,
    config: LoggerConfig,
) -> RunLog:
    peak = config.peak_tflops * 1e12 if config.peak_tflops is not None else None
    if peak is None and world.is_main:
        peak = measured_peak_flops(world.device, compute_dtype(stage.precision))
    return RunLog(
        folder,
        name=name,
        num_steps=num_steps,
        start=start,
        enabled=world.is_main,
        config=config,
        peak_flops=None if peak is None else peak * world.size,
    )


def _validate(learning: Learning, stage: StageConfig, log: RunLog, step: int, world: World) -> None:
    task, average = learning.task, learning.average
    task.module.eval()
    weights = average.in_place_of_weights() if average is not None else nullcontext()
    with torch.no_grad(), weights:
        with autocast(stage.precision, world.device.type):
            scores = task.validate()
        if scores:
            log.record(step, {f"val/{key}": value for key, value in scores.items()})
        # Not under autocast: generation computes in the dtype of the weights, and packs them.
        log.text(step, "captions", task.samples())


def plain(value: Any) -> Any:
    """Return a configuration value as JSON holds it: enums by value, tuples as lists."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_resumable(
    state: Mapping[str, Any], info: Mapping[str, Any], folder: Path, identity: Mapping[str, str | int]
) -> None:
    """Refuse to continue a run as another one; a changed cadence, learning rate or number of ranks is allowed."""
    if state["stage"] != info["stage"]:
        raise ValueError(f"{folder}: holds stage {state['stage']!r}, want {info['stage']!r}")
    before = plain(asdict(StageConfig())) | state["config"]  # a setting that is newer than the checkpoint
    found = [(key, before[key], info["config"][key]) for key in _FIXED_ON_RESUME]
    found += [(key, state[key], value) for key, value in identity.items() if key in state and key not in _DIGESTS]
    if differing := [f"{key}={new!r}, the checkpoint has {old!r}" for key, old, new in found if old != new]:
        table = "; ".join(differing)
        raise ValueError(f"{folder}: cannot resume with {table}: want the same values or another run_dir")
    if "data" in identity and state.get("data") != identity["data"]:
        raise ValueError(f"{folder}: its checkpoint was trained on other data; want the same, or another run_dir")
