"""Checkpoints of a running training: written beside, synced, renamed; read back to the same next step, bit for bit.

A checkpoint is a folder `step_0000100/` with `model.safetensors`, `optimizer.safetensors` (moments by parameter
name, and the torch generator's state) and `state.json` (step, configuration). A folder of that name is always complete:
what is being written is called `.writing-*` until the rename.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from aurora.checkpoint.store import sync

_STEP_NAME = re.compile(r"step_(\d{7,})")
_RNG_KEY = "rng.torch"


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _STEP_NAME.fullmatch(entry.name)))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` stands."""
    return folder / f"step_{step:07d}"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, *, info: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of `step` (the number of finished steps) and drop all but the newest `keep`.

    Raises:
        ValueError: if `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: want at least 1 checkpoint")
    target = checkpoint_path(folder, step)
    writing = folder / f".writing-{target.name}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, writing / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), writing / "optimizer.safetensors")
    (writing / "state.json").write_text(json.dumps({"step": step, **info}, indent=1, sort_keys=True) + "\n")
    for file in writing.iterdir():
        sync(file)
    if target.exists():
        shutil.rmtree(target)
    writing.replace(target)
    sync(folder)
    for old in checkpoint_steps(folder)[:-keep]:
        shutil.rmtree(checkpoint_path(folder, old))
    return target


def read_state(path: Path) -> dict[str, Any]:
    """Return `state.json` of the checkpoint at `path`."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the model's tensors of the checkpoint at `path`."""
    return load_file(path / "model.safetensors")


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore model, optimizer and torch's generator from `path`; return the number of finished steps.

    Raises:
        ValueError: if the optimizer state does not belong to the trainable parameters.
    """
    model.load_state_dict(load_weights(path))
    tensors = load_file(path / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop(_RNG_KEY))
    names = _trainable_names(model)
    per_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        per_parameter.setdefault(name, {})[field] = tensor
    if set(per_parameter) != set(names.values()):
        differing = sorted(set(per_parameter) ^ set(names.values()))
        raise ValueError(f"{path}: optimizer state and trainable parameters differ in {differing[:4]}: want equal sets")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = per_parameter[names[id(parameter)]]
    return int(read_state(path)["step"])


def _trainable_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = _trainable_names(model)
    tensors = {_RNG_KEY: torch.get_rng_state()}
    for parameter, state in optimizer.state.items():
        for field, value in state.items():
            tensors[f"{names[id(parameter)]}/{field}"] = value
    return tensors
