"""Load a whole model from a checkpoint folder, whatever its layout, and save one.

Loading builds the model without memory (meta device) and assigns one tensor after the other, mapped from the file or
cast on the way, so the peak is one model plus one tensor. It is strict: every difference is listed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aurora.checkpoint.layouts import Layout, config_folders, get_layout, recognise
from aurora.checkpoint.store import (
    DEFAULT_SHARD_SIZE,
    CheckpointError,
    JsonDict,
    WeightFiles,
    atomic_folder,
    finish_interrupted_save,
    parse_size,
    read_json,
    refuse_pickle,
    write_json,
    write_weights,
)
from aurora.model.captioner import AuroraConfig, AuroraModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_ROWS = 20


class Loaded(NamedTuple):
    """A model with what its checkpoint says beyond the weights."""

    model: AuroraModel
    layout: str
    """Name of the layout it was stored in."""
    image_aspect_ratio: str | None
    """pad, crop or squash, where recorded: how frames were prepared in training."""


class _Source(NamedTuple):
    """Where one of our tensors comes from."""

    weights: WeightFiles
    key: str


def resolve_checkpoint(path: str | Path) -> Path:
    """Turn a path or a hub id into a local folder; only an `owner/name` that is no local path is downloaded.

    Args:
        path: Folder, or `owner/name` on the Hugging Face hub.

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
        return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: no such folder, and not to be had from the hub ({reason})") from error


def read_config(path: str | Path) -> tuple[Layout, AuroraConfig, Mapping[str, JsonDict]]:
    """Recognise a checkpoint and read its configuration, without its weights.

    Args:
        path: Checkpoint folder.

    Returns:
        Layout, configuration, and the config.json contents by folder.

    Raises:
        CheckpointError: if the layout is unknown or a value unusable.
    """
    root = Path(path)
    finish_interrupted_save(root)
    files = {folder: root / folder / "config.json" for folder in config_folders()}
    configs = {folder: read_json(file) for folder, file in files.items() if file.is_file()}
    layout = recognise(configs, where=str(root), hints=_hints(root))
    try:
        return layout, layout.read_config(configs), configs
    except CheckpointError as error:
        raise CheckpointError(f"{root}/{error}") from error


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
    root = resolve_checkpoint(path)
    layout, config, configs = read_config(root)
    config.attn_implementation = attn_implementation
    with torch.device("meta"):
        model = AuroraModel(config)
    with ExitStack() as stack:
        weights = {part.folder: stack.enter_context(WeightFiles(root / part.folder)) for part in layout.parts}
        wanted = model.state_dict()
        sources = _match_keys(root, layout, weights, wanted, tied=config.text.tie_word_embeddings)
        target = _resolve_dtype(dtype, configs[""], weights[""])
        state = {name: source.weights.load(source.key, dtype=target, device=device) for name, source in sources.items()}
    model.load_state_dict(state, assign=True)
    aspect = configs[""].get("image_aspect_ratio")
    return Loaded(model.eval(), layout.name, aspect if isinstance(aspect, str) else None)


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
    state = model.state_dict()
    tensors: dict[str, dict[str, Tensor]] = {part.folder: {} for part in kind.parts}
    for name, tensor in state.items():
        part, foreign = kind.place(name)
        tensors[part.folder][foreign] = tensor
    contents = kind.write_config(model.config, image_aspect_ratio)
    with atomic_folder(Path(path), owned=config_folders()) as stage:
        for part in kind.parts:
            folder = stage / part.folder
            folder.mkdir(exist_ok=True)
            stored = str(next(iter(tensors[part.folder].values())).dtype).removeprefix("torch.")
            write_json(folder / "config.json", {**contents[part.folder], "torch_dtype": stored})
            write_weights(folder, tensors[part.folder], max_shard_size=max_shard_size)


def _hints(root: Path) -> list[str]:
    hints = []
    adapters = [name for name in ("llm_adapter", "visual_encoder_adapter") if (root / name).is_dir()]
    if adapters:
        hints.append(f"{', '.join(adapters)} hold LoRA weights, which have to be merged into a full model first")
    pickles = sorted(file.name for file in root.glob("*") if file.suffix in (".bin", ".pth", ".pt"))
    if pickles:
        hints.append(f"{pickles[0]} is pickled, and pickled weights are not read")
    return hints


def _match_keys(
    root: Path, layout: Layout, weights: Mapping[str, WeightFiles], wanted: Mapping[str, Tensor], *, tied: bool
) -> dict[str, _Source]:
    """Find the source of every wanted tensor; refuse missing, unexpected and misshapen ones with a table."""
    candidates: dict[str, list[_Source]] = {}
    rows: list[tuple[str, str, str, str]] = []  # (problem, file, key, got and want)
    for part in layout.parts:
        files = weights[part.folder]
        # With tied embeddings some files hold the output head a second time.
        twin = part.keys.to_foreign("language_model.lm_head.weight") if tied else None
        for key in files.names:
            proper, alias = part.keys.to_ours(key), part.keys.alias_of(key)
            if proper in wanted:
                candidates.setdefault(str(proper), []).insert(0, _Source(files, key))
            elif alias in wanted:
                candidates.setdefault(str(alias), []).append(_Source(files, key))
            elif not part.keys.is_ignored(key) and key != twin:
                rows.append(("unexpected", _short(files.file_of(key), root), key, f"got {_shape(files.shape(key))}"))
    chosen: dict[str, _Source] = {}
    for name, tensor in wanted.items():
        shape = tuple(tensor.shape)
        options = candidates.get(name)
        if not options:
            part, key = layout.place(name)
            rows.append(("missing", _short(root / part.folder, root), key, f"want {_shape(shape)}"))
            continue
        fitting = [option for option in options if option.weights.shape(option.key) == shape]
        chosen[name] = (fitting or options)[0]
        files, key = chosen[name]
        if not fitting:
            problem, detail = "misshapen", f"got {_shape(files.shape(key))}, want {_shape(shape)}"
            rows.append((problem, _short(files.file_of(key), root), key, detail))
        elif not files.dtype(key).is_floating_point:
            detail = f"got {files.dtype(key)}, want a floating one"
            rows.append(("wrong dtype", _short(files.file_of(key), root), key, detail))
    if rows:
        raise CheckpointError(_table(root, layout, rows))
    return chosen


def _table(root: Path, layout: Layout, rows: list[tuple[str, str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows[:_MAX_ROWS]) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows[:_MAX_ROWS]
    ]
    more = [f"... and {len(rows) - _MAX_ROWS} more"] if len(rows) > _MAX_ROWS else []
    count = f"{len(rows)} tensor{'s' * (len(rows) != 1)}"
    return "\n  ".join([f"{root}: {count} of layout {layout.name} do not fit the config:", *lines, *more])


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _resolve_dtype(dtype: torch.dtype | str | None, config: JsonDict, weights: WeightFiles) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if dtype is None:
        return torch.float32
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        stored = weights.dtype(next(key for key in weights.names if weights.dtype(key).is_floating_point))
        name = str(config.get("dtype") or config.get("torch_dtype") or stored).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"torch_dtype={dtype!r}: want auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
