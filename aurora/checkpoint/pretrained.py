"""Load a whole model from a checkpoint folder, whatever its layout, and save one.

Loading builds the model without memory (meta device) and assigns one tensor after the other, mapped from the file or
cast on the way, so the peak is one model plus one tensor. It is strict: every difference is listed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aurora.checkpoint.gguf import load_llama
from aurora.checkpoint.keys import Layout
from aurora.checkpoint.layouts import config_folders, get_layout
from aurora.checkpoint.lazy import lazy
from aurora.checkpoint.reading import Checkpoint, open_checkpoint, recognise_folder
from aurora.checkpoint.store import (
    DEFAULT_SHARD_SIZE,
    CheckpointError,
    JsonDict,
    atomic_folder,
    parse_size,
    refuse_pickle,
)
from aurora.checkpoint.writing import write_checkpoint
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import Llama
from aurora.model.vision import VisionTower

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Loaded(NamedTuple):
    """A model with what its checkpoint says beyond the weights."""

    model: AuroraModel
    layout: str
    """Name of the layout it was stored in."""
    image_aspect_ratio: str | None
    """pad, crop or squash, where recorded: how frames were prepared in training."""


def resolve_checkpoint(path: str | Path, *, pickles: bool = False) -> Path:
    """Turn a path or a hub id into a local folder; only an `owner/name` that is no local path is downloaded.

    Args:
        path: Folder, or `owner/name` on the Hugging Face hub.
        pickles: Download pickled weights, too, for a conversion.

    Returns:
        The folder.

    Raises:
        CheckpointError: if there is no such folder, it is a single file, or the download fails.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        if folder.suffix in (".bin", ".pth", ".pt"):
            raise refuse_pickle(folder)
        raise CheckpointError(f"{folder}: got a file, want the checkpoint folder it is in")
    if not _HUB_ID.fullmatch(str(path)) or folder.parent.exists():
        raise CheckpointError(f"{folder}: no such folder, want a checkpoint folder or a hub id owner/name")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(f"{path}: no such folder; to download it as a hub id: pip install huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES + ["*.bin"] * pickles))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: no such folder, and not to be had from the hub ({reason})") from error


def read_config(path: str | Path) -> tuple[Layout, AuroraConfig, Mapping[str, JsonDict]]:
    """Recognise a checkpoint and read its configuration, without its weights.

    Args:
        path: Checkpoint folder.

    Returns:
        Layout, configuration (of a layout that holds one part, the other parts are defaults), and the parsed config
        files by `Part.config_key`.

    Raises:
        CheckpointError: if the layout is unknown or a value unusable.
    """
    layout, config, configs, _ = recognise_folder(Path(path))
    return layout, config, configs


def load_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str = "auto",
) -> Loaded:
    """Load a checkpoint and what it says about itself.

    Args:
        path: Checkpoint folder or hub id.
        dtype: Of the floating tensors; "auto" is the recorded or stored one, None is float32.
        device: Where to put them.
        attn_implementation: auto, eager or sdpa.

    Returns:
        Model in evaluation mode, and its layout.

    Raises:
        CheckpointError: if files are missing, unreadable, or do not hold exactly this model.
    """
    with open_checkpoint(resolve_checkpoint(path)) as found:
        if not found.layout.is_whole:
            held = " and ".join(prefix.rstrip(".") for prefix in found.layout.holds)
            raise CheckpointError(
                f"{found.root}: holds a {held} alone (layout {found.layout.name}), want a whole captioner; put one "
                "together: python scripts/convert.py model_path=<language model> vision_path=<tower> output=<folder>"
            )
        found.config.attn_implementation = attn_implementation
        with torch.device("meta"):
            model = AuroraModel(found.config)
        state = _read_state(found, dtype, device)
    model.load_state_dict(state, assign=True)
    aspect = found.configs[""].get("image_aspect_ratio")
    return Loaded(model.eval(), found.layout.name, aspect if isinstance(aspect, str) else None)


def load_vision_tower(
    path: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> VisionTower:
    """Load the vision tower of any checkpoint that holds one: a captioner, or a tower alone.

    Args:
        path: Checkpoint folder or hub id; Hugging Face CLIP or SigLIP, open_clip, timm, or a whole captioner.
        dtype: Of the floating tensors; "auto" is the stored one, None is float32.
        device: Where to put them.

    Returns:
        The tower in evaluation mode.

    Raises:
        CheckpointError: if there is no tower, or it cannot be read.
    """
    with open_checkpoint(resolve_checkpoint(path)) as found:
        with torch.device("meta"):
            tower = VisionTower(found.config.vision)
        state = _read_state(found, dtype, device, "vision_tower.")
    tower.load_state_dict(state, assign=True)
    return tower.eval()


def load_language_model(
    path: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> Llama:
    """Load the language model of any checkpoint that holds one: a captioner, a Llama alone, or a GGUF file.

    Args:
        path: Checkpoint folder, hub id, or `.gguf` file.
        dtype: Of the floating tensors; "auto" is the stored one, None is float32.
        device: Where to put them.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: if there is no language model, or it cannot be read.
    """
    if Path(path).suffix == ".gguf":
        return load_llama(path, dtype=dtype, device=device)
    with open_checkpoint(resolve_checkpoint(path)) as found:
        with torch.device("meta"):
            model = Llama(found.config.text)
        state = _read_state(found, dtype, device, "language_model.")
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read_state(
    found: Checkpoint, dtype: torch.dtype | str | None, device: torch.device | str, prefix: str = ""
) -> dict[str, Tensor]:
    """Read the tensors below a prefix; each is a private map of its file unless it is cast, moved or merged."""
    chosen = {name: tensor for name, tensor in found.tensors.items() if name.startswith(prefix)}
    if not chosen:
        raise CheckpointError(f"{found.root}: layout {found.layout.name} holds no {prefix.rstrip('.')}")
    target = _resolve_dtype(dtype, found.configs.get("", {}), next(iter(chosen.values())).dtype)
    return {
        name.removeprefix(prefix): tensor.cast(target).mapped().to(device).contiguous()
        for name, tensor in chosen.items()
    }


def load_model(
    path: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> AuroraModel:
    """Load the model of a checkpoint folder or hub id; see `load_pretrained`."""
    return load_pretrained(path, dtype=dtype, device=device).model


def save_model(
    model: AuroraModel,
    path: str | Path,
    layout: str = "aurora",
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    image_aspect_ratio: str | None = None,
) -> None:
    """Save a model; the files appear all together or not at all, and other files in the folder stay.

    Args:
        model: Model on any device; tensors are stored in their own dtype.
        path: Folder, made when missing.
        layout: A name of `LAYOUTS`.
        max_shard_size: Split weights beyond this, bytes or a text such as "5GB".
        image_aspect_ratio: pad, crop or squash, to be recorded; None records nothing.

    Raises:
        ValueError: for an unknown layout or size.
        CheckpointError: if the disk refuses.
    """
    kind = get_layout(layout)
    parse_size(max_shard_size)
    tensors = {name: lazy(tensor, file=Path(path), key=name) for name, tensor in model.state_dict().items()}
    with atomic_folder(Path(path), owned=config_folders()) as stage:
        write_checkpoint(
            stage,
            kind,
            model.config,
            tensors,
            max_shard_size=max_shard_size,
            image_aspect_ratio=image_aspect_ratio,
        )


def _resolve_dtype(dtype: torch.dtype | str | None, config: JsonDict, stored: torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if dtype is None:
        return torch.float32
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = str(config.get("dtype") or config.get("torch_dtype") or stored).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"torch_dtype={dtype!r}: want auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
