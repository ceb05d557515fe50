"""Load a whole model from a checkpoint folder, whatever its layout, and save one.

Loading builds the model without memory (meta device) and assigns one tensor after the other, mapped from the file,
cast or quantised on the way, so the peak is one model, as it will be, plus one tensor. It is strict: every difference
is listed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aurora.checkpoint.bnb import check_installed
from aurora.checkpoint.gguf import load_llama
from aurora.checkpoint.keys import Layout
from aurora.checkpoint.layouts import config_folders, get_layout
from aurora.checkpoint.lazy import LazyTensor, lazy
from aurora.checkpoint.quantization import (
    BitsAndBytesConfig,
    QuantizationConfig,
    agree,
    as_quantization,
    computing_in,
)
from aurora.checkpoint.quantize import (
    PREFIX,
    build_linear,
    check_skipped,
    find_quantization,
    quantize_model,
    quantize_weight,
    quantized_linears,
    replace_linear,
    source_of,
    storable,
    stored_form,
)
from aurora.checkpoint.reading import Checkpoint, open_checkpoint, recognise_folder
from aurora.checkpoint.store import (
    DEFAULT_SHARD_SIZE,
    CheckpointError,
    JsonDict,
    atomic_folder,
    parse_size,
    refuse_pickle,
)
from aurora.checkpoint.writing import check_storable, write_checkpoint
from aurora.model.attention_backends import check_backend
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import Llama
from aurora.model.vision import VisionTower
from aurora.runtime import release_free_memory

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
    quantization: object | None = None,
) -> Loaded:
    """Load a checkpoint and what it says about itself.

    Args:
        path: Checkpoint folder or hub id.
        dtype: Of the floating tensors; "auto" is the recorded or stored one. None is float32, and for a quantised
            model "auto".
        device: Where to put them.
        attn_implementation: One of `BACKENDS`; whether it can run is checked before the weights are read.
        quantization: Quantise the language model on the way in: whatever `as_quantization` understands. A checkpoint
            that is stored quantised needs none.

    Returns:
        Model in evaluation mode, and its layout.

    Raises:
        CheckpointError: if files are missing, unreadable, or do not hold exactly this model.
        ValueError: if it cannot be quantised so, a package is missing, or the attention backend cannot run.
    """
    wanted = as_quantization(quantization)
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
        settled = agree(wanted, found.quantization)
        check_installed(settled)
        _check_attention(found.config, torch.device(device), _target_dtype(found, dtype, settled))
        _fill(model, found, dtype, device, quantization=settled)
    aspect = found.configs[""].get("image_aspect_ratio")
    return Loaded(model.eval(), found.layout.name, aspect if isinstance(aspect, str) else None)


def _check_attention(config: AuroraConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an attention backend that will not run, before the weights are read."""
    # A model that is loaded on the CPU may be on its way to a GPU.
    place = torch.device("cuda") if device.type == "cpu" and torch.cuda.is_available() else device
    for head_dim in {config.text.head_dim, config.vision.head_dim}:
        check_backend(config.attn_implementation, device=place, dtype=dtype, head_dim=head_dim)


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
        _fill(tower, found, dtype, device, "vision_tower.")
    return tower.eval()


def load_language_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    quantization: object | None = None,
) -> Llama:
    """Load the language model of any checkpoint that holds one: a captioner, a Llama alone, or a GGUF file.

    Args:
        path: Checkpoint folder, hub id, or `.gguf` file.
        dtype: Of the floating tensors; "auto" is the stored one. None is float32, and for a quantised model "auto".
        device: Where to put them.
        quantization: Quantise it on the way in: whatever `as_quantization` understands.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: if there is no language model, or it cannot be read.
        ValueError: if it cannot be quantised so, or a package is missing.
    """
    wanted = as_quantization(quantization)
    if Path(path).suffix == ".gguf":
        llama = load_llama(path, dtype=dtype, device=device)
        if wanted is not None:
            quantize_model(llama, wanted)
        return llama
    with open_checkpoint(resolve_checkpoint(path)) as found:
        with torch.device("meta"):
            model = Llama(found.config.text)
        _fill(model, found, dtype, device, PREFIX, agree(wanted, found.quantization))
    return model.eval()


def _fill(
    model: nn.Module,
    found: Checkpoint,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    prefix: str = "",
    quantization: QuantizationConfig | None = None,
) -> None:
    """Give a model without memory the tensors below a prefix, in place."""
    chosen = {name: tensor for name, tensor in found.tensors.items() if name.startswith(prefix)}
    if not chosen:
        raise CheckpointError(f"{found.root}: layout {found.layout.name} holds no {prefix.rstrip('.')}")
    target = _target_dtype(found, dtype, quantization, chosen)
    if quantization is not None:
        chosen = _fill_linears(model, found, chosen, target, device, quantization)
    state = {name.removeprefix(prefix): _load(tensor.cast(target), device) for name, tensor in chosen.items()}
    missing, unexpected = model.load_state_dict(state, assign=True, strict=quantization is None)
    replaced = tuple(name.removeprefix(prefix) for name in quantized_linears(found.config.text, quantization))
    assert not unexpected, unexpected
    assert all(key.startswith(replaced) for key in missing), missing


def _fill_linears(
    model: nn.Module,
    found: Checkpoint,
    tensors: dict[str, LazyTensor],
    target: torch.dtype,
    device: torch.device | str,
    quantization: QuantizationConfig,
) -> dict[str, LazyTensor]:
    """Put quantised layers into a model, one weight in full at a time; returns the tensors that are left to load."""
    llama = model if isinstance(model, Llama) else model.get_submodule(PREFIX.rstrip("."))
    assert isinstance(llama, Llama)
    text, used = found.config.text, set()
    quantization = computing_in(quantization, target)
    if found.quantization is None:
        check_skipped(text, quantization)
    for name, shape in quantized_linears(text, quantization).items():
        if found.quantization is not None:
            keys = [f"{name}.{key}" for key in stored_form(quantization, shape)]
            stored = {key.removeprefix(f"{name}."): _load(tensors[key], device) for key in keys}
            used.update(keys)
        else:
            weight = tensors[source_of(name, text)]
            # bitsandbytes computes in the dtype it is given; ours rounds what the file holds.
            in_full = weight.cast(target) if isinstance(quantization, BitsAndBytesConfig) else weight
            stored = quantize_weight(quantization, in_full.read().to(device))
            used.add(f"{name}.weight")
        replace_linear(llama, name, build_linear(quantization, shape, stored))
        if found.quantization is None and torch.device(device).type == "cpu":
            release_free_memory()  # else weights in full would be freed, and held all the same
    return {name: tensor for name, tensor in tensors.items() if name not in used}


def _load(tensor: LazyTensor, device: torch.device | str) -> Tensor:
    """A private map of the tensor's file, unless it is cast, moved or merged."""
    return tensor.mapped().to(device).contiguous()


def _target_dtype(
    found: Checkpoint,
    dtype: torch.dtype | str | None,
    quantization: QuantizationConfig | None,
    tensors: Mapping[str, LazyTensor] | None = None,
) -> torch.dtype:
    """Dtype of the tensors that are not quantised."""
    uncast = found.uncast
    plain = [tensor.dtype for name, tensor in (tensors or found.tensors).items() if name not in uncast]
    # Who quantises wants a small model: the rest is not to be widened.
    asked = "auto" if dtype is None and quantization is not None else dtype
    return _resolve_dtype(asked, found.configs.get("", {}), next(iter(plain)))


def load_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    quantization: object | None = None,
) -> AuroraModel:
    """Load the model of a checkpoint folder or hub id; see `load_pretrained`."""
    return load_pretrained(path, dtype=dtype, device=device, quantization=quantization).model


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
        CheckpointError: if the layout cannot store quantised weights and these are, or the disk refuses.
    """
    kind = get_layout(layout)
    parse_size(max_shard_size)
    quantization = find_quantization(model)
    check_storable(kind, quantization)
    tensors = {
        name: lazy(tensor, file=Path(path), key=name) for name, tensor in model.state_dict().items() if storable(name)
    }
    with atomic_folder(Path(path), owned=config_folders()) as stage:
        write_checkpoint(
            stage,
            kind,
            model.config,
            tensors,
            max_shard_size=max_shard_size,
            image_aspect_ratio=image_aspect_ratio,
            quantization=quantization,
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
