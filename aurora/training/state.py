"""Checkpoints of a running training: written beside, synced, renamed; read back to the same next step, bit for bit.

A checkpoint is a folder `step_0000100/` with `state.json` (step, configuration, loss scale) and the tensors: weights,
moments by parameter name, averaged weights and the state of torch's generator. One process writes them as
`model.safetensors`, `optimizer.safetensors` and `average.safetensors`; ranks that shard the model each write their own
part into `shards/` (torch.distributed.checkpoint). Either is read by any number of ranks, sharded or not. A folder of
that name is always complete: what is being written is called `.writing-*` until the rename.
"""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException as _ShardError
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from aurora.checkpoint.store import sync
from aurora.records import lock_file
from aurora.training.distributed import World
from aurora.training.ema import WeightAverage

LOCK_FILE = ".lock"
"""Held by the run that writes in a folder."""
_STEP_NAME = re.compile(r"step_(\d{7,})")
_RNG_KEY = "rng.torch"
_SHARDS = "shards"
_FILES = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "average": "average.safetensors"}


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _STEP_NAME.fullmatch(entry.name)))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` stands."""
    return folder / f"step_{step:07d}"


def latest_checkpoint(folder: Path) -> Path:
    """Return the newest complete checkpoint of the stage whose folder this is.

    Raises:
        ValueError: if there is none.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        raise ValueError(
            f"{folder}: no checkpoint of stage {folder.name!r}; want it to run first, parts=[{folder.name},...]"
        )
    return checkpoint_path(folder, steps[-1])


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    info: Mapping[str, Any],
    keep: int = 2,
    average: WeightAverage | None = None,
    world: World | None = None,
) -> Path:
    """Write the checkpoint of `step` (the number of finished steps) and drop all but the newest `keep`.

    Args:
        folder: Of the stage.
        step: Finished steps.
        model: Sharded or whole; if sharded, every rank calls this, else the main one alone.
        optimizer: Its optimizer.
        info: What else `state.json` holds.
        keep: Newest checkpoints kept.
        average: Averaged weights, if there are any.
        world: The ranks that share a sharded model.

    Returns:
        The checkpoint.

    Raises:
        ValueError: if `keep` is below 1.
        OSError: if the disk refuses; earlier checkpoints stay.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: want at least 1 checkpoint")
    world = world or World()
    target = checkpoint_path(folder, step)
    writing = folder / f".writing-{target.name}"
    if world.is_main:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    _add_moments(optimizer)
    tensors = _state_tensors(model, optimizer, average)
    with _disk_errors(target, writing):
        if _is_sharded(model):
            _save_shards(tensors, writing / _SHARDS, world)
        else:
            for kind, name in _FILES.items():
                if part := _part(tensors, kind):
                    save_file({key: value.contiguous() for key, value in part.items()}, writing / name)
        if world.is_main:
            state = {"step": step, **info}
            (writing / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
            _commit(writing, target)
    if world.is_main:
        for old in checkpoint_steps(folder)[:-keep]:
            shutil.rmtree(checkpoint_path(folder, old))
    return target


def lock_folder(folder: Path) -> IO[str]:
    """Keep other runs out of `folder` until the file returned is closed, or this process ends in any way.

    Raises:
        ValueError: if another run holds it.
    """
    return lock_file(folder / LOCK_FILE, f"run_dir={folder}")


def read_state(path: Path) -> dict[str, Any]:
    """Return `state.json` of the checkpoint at `path`.

    Raises:
        ValueError: if it is damaged.
    """
    with _damage_named(path):
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def load_weights(path: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Return the model's tensors of the checkpoint at `path`.

    Args:
        path: Of one process or of sharding ranks.
        averaged: Take the averaged weights where the run kept any.

    Raises:
        ValueError: if the checkpoint is damaged.
    """
    with _damage_named(path):
        return _read_weights(path, ("model", "average") if averaged else ("model",))


def _read_weights(path: Path, kinds: Sequence[str]) -> dict[str, Tensor]:
    if not (path / _SHARDS).is_dir():
        parts = [load_file(path / _FILES[kind]) for kind in kinds if (path / _FILES[kind]).exists()]
        return {name: tensor for part in parts for name, tensor in part.items()}
    stored = _stored_shards(path / _SHARDS)
    tensors = {
        key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype)
        for key in stored
        if key.partition("/")[0] in kinds
    }
    _load_shards(tensors, path / _SHARDS, alone=True)
    return {name: tensor for kind in kinds for name, tensor in _part(tensors, kind).items()}


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, average: WeightAverage | None = None) -> int:
    """Restore model, optimizer, averaged weights and torch's generator from `path`; return the finished steps.

    Args:
        path: Written by any number of ranks.
        model: Whole or sharded, with memory; if sharded, every rank calls this.
        optimizer: Of its trainable parameters.
        average: Of the same; None where none is kept.

    Raises:
        ValueError: if the tensors are not those of this model and its trainable parameters, or files are damaged.
    """
    _add_moments(optimizer)
    tensors = _state_tensors(model, optimizer, average)
    sharded = (path / _SHARDS).is_dir()
    with _damage_named(path):
        stored = set(_stored_shards(path / _SHARDS)) if sharded else _stored_files(path)
    differing = sorted(key for key in stored ^ set(tensors) if not key.startswith("average/") or average is not None)
    if differing:
        what = "optimizer state and trainable parameters" if differing[0][0] == "o" else "its tensors and the model's"
        names = [key.partition("/")[2] for key in differing[:4]]
        raise ValueError(f"{path}: {what} differ in {names}: want equal sets")
    with torch.no_grad(), _damage_named(path):
        if sharded:
            _load_shards(tensors, path / _SHARDS, alone=not dist.is_initialized())
        else:
            _load_files(tensors, path)
    torch.set_rng_state(tensors[f"optimizer/{_RNG_KEY}"])
    return int(read_state(path)["step"])


def _state_tensors(model: nn.Module, optimizer: Optimizer, average: WeightAverage | None) -> dict[str, Tensor]:
    """Return `kind/name` -> tensor of everything a checkpoint holds; the tensors themselves, to be read or filled."""
    tensors = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors[f"optimizer/{_RNG_KEY}"] = torch.get_rng_state()
    for parameter, state in optimizer.state.items():
        for field, value in state.items():
            tensors[f"optimizer/{names[id(parameter)]}/{field}"] = value
    if average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in average.tensors.items()}
    return tensors


def _add_moments(optimizer: Optimizer) -> None:
    """Give a parameter that has had no gradient yet the state that AdamW's first step would give it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _part(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{kind}/")}


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _stored_files(path: Path) -> set[str]:
    found: set[str] = set()
    for kind, name in _FILES.items():
        if kind != "average" or (path / name).exists():
            with safe_open(path / name, framework="pt") as file:
                found.update(f"{kind}/{key}" for key in file.keys())  # noqa: SIM118 - not a dictionary
    return found


def _load_files(tensors: Mapping[str, Tensor], path: Path) -> None:
    for kind, name in _FILES.items():
        if not (wanted := _part(tensors, kind)):
            continue
        with safe_open(path / name, framework="pt") as file:
            for key, tensor in wanted.items():
                whole = file.get_tensor(key)
                if isinstance(tensor, DTensor):  # each rank cuts its own part out of the file
                    part = distribute_tensor(
                        whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
                    )
                    tensor.to_local().copy_(part.to_local())
                else:
                    tensor.copy_(whole)


def _save_shards(tensors: dict[str, Tensor], folder: Path, world: World) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    world.barrier()  # the folder is there
    save(tensors, checkpoint_id=str(folder))


def _load_shards(tensors: dict[str, Tensor], folder: Path, *, alone: bool) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads: as meant
        load(tensors, checkpoint_id=str(folder), no_dist=alone)


def _stored_shards(folder: Path) -> dict[str, Any]:
    """Return key -> shape and dtype of the tensors in `folder`."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return dict(FileSystemReader(str(folder)).read_metadata().state_dict_metadata)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Say which checkpoint cannot be read, and what to do about it."""
    try:
        yield
    except (SafetensorError, OSError, EOFError, pickle.UnpicklingError, json.JSONDecodeError, _ShardError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: damaged ({reason}); want its files as they were, or remove it to go on from the one before"
        ) from None


@contextmanager
def _disk_errors(target: Path, writing: Path) -> Iterator[None]:
    """Say what a disk refused, and leave nothing half-written."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError | RuntimeError):
            raise
        shutil.rmtree(writing, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise OSError(f"{target}: cannot save ({reason}); the earlier checkpoints stay") from error


def _commit(writing: Path, target: Path) -> None:
    """Make a written folder durable and give it its name."""
    for file in [*writing.rglob("*"), writing]:
        sync(file)
    if target.exists():
        shutil.rmtree(target)
    writing.replace(target)
    sync(target.parent)
