"""Open a checkpoint of any layout: its tensors under our names, described and not yet read.

Reading is strict: a tensor that is missing, misshapen or of no use here is refused, with a table of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aurora.checkpoint.hf_config import write_vision
from aurora.checkpoint.keys import VOCABULARY_KEYS, Layout
from aurora.checkpoint.layouts import config_files, recognise
from aurora.checkpoint.lazy import LazyTensor
from aurora.checkpoint.lora import ADAPTER_FOLDERS, base_of, merge_adapter, pair_factors
from aurora.checkpoint.pickles import PICKLE_SUFFIXES, PickleFiles, find_pickles, split_training_state
from aurora.checkpoint.public_config import public_config
from aurora.checkpoint.quantization import QuantizationConfig, stored_quantization
from aurora.checkpoint.quantize import quantized_linears, source_of, stored_tensors
from aurora.checkpoint.store import (
    CheckpointError,
    JsonDict,
    WeightFiles,
    finish_interrupted_save,
    read_json,
    refuse_pickle,
)
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.vision import VisionConfig

_MAX_ROWS = 20
# These alone have dimensions of size 1 in front in some layouts.
_FLAT = ("vision_tower.cls_token", "vision_tower.pos_embed")


class TensorFiles(Protocol):
    """Weight files of one folder; safetensors or, for conversion, pickles."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""

    def file_of(self, key: str) -> Path:
        """Path of the file that holds `key`."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of `key`."""

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of `key`."""

    def read(self, key: str) -> Tensor:
        """The tensor."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a checkpoint's parts are."""

    root: Path
    folders: Mapping[str, Path]
    """Folder of a part, as the layout names it -> actual folder; only those that are elsewhere (bases of adapters)."""
    adapters: Mapping[str, Path]
    """Folder of a part -> folder of its LoRA adapter."""

    def of(self, folder: str) -> Path:
        """Actual folder of a part."""
        return self.folders.get(folder, self.root / folder)


@dataclass(kw_only=True)
class Checkpoint:
    """An opened checkpoint."""

    root: Path
    layout: Layout
    config: AuroraConfig
    configs: Mapping[str, JsonDict]
    """Parsed config files, by `Part.config_key`."""
    tensors: dict[str, LazyTensor]
    """Our name -> tensor; all that the layout stores, and nothing else."""
    left_out: list[str] = field(default_factory=list)
    """Foreign names of tensors that a captioner has no use for."""
    quantization: QuantizationConfig | None = None
    """How the language model's weights are stored; None where they are not quantised."""

    @property
    def uncast(self) -> frozenset[str]:
        """Our names of tensors that keep their dtype: those of quantised layers."""
        return frozenset(stored_tensors(self.config.text, self.quantization))


def find_parts(root: Path) -> Places:
    """Find the folders of a checkpoint, those of adapters' bases included.

    Args:
        root: Checkpoint folder.

    Returns:
        The places.

    Raises:
        CheckpointError: if an adapter's base cannot be found.
    """
    from aurora.checkpoint.pretrained import resolve_checkpoint

    folders: dict[str, Path] = {}
    adapters: dict[str, Path] = {}
    for name, part in ADAPTER_FOLDERS.items():
        if not (root / name).is_dir():
            continue
        adapters[part] = root / name
        if not (root / part / "config.json").is_file():
            base = base_of(root / name)
            # Relative to the checkpoint first, as such folders are moved together.
            beside = root / base
            folders[part] = beside if beside.is_dir() else resolve_checkpoint(base)
    return Places(root=root, folders=folders, adapters=adapters)


def read_configs(places: Places) -> dict[str, JsonDict]:
    """Read every config file a layout may have, by `Part.config_key`."""
    configs: dict[str, JsonDict] = {}
    for key, (folder, name) in config_files().items():
        file = places.of(folder) / name
        if file.is_file():
            configs[key] = read_json(file)
    return configs


def recognise_folder(
    root: Path, *, other_tower: VisionConfig | None = None
) -> tuple[Layout, AuroraConfig, dict[str, JsonDict], Places]:
    """Recognise a checkpoint and read its configuration, without its weights.

    Args:
        root: Checkpoint folder.
        other_tower: What to take for the vision tower's configuration where the checkpoint does not hold it.

    Returns:
        Layout, configuration, parsed config files, and where the parts are.

    Raises:
        CheckpointError: if the layout is unknown or a value unusable.
    """
    finish_interrupted_save(root)
    places = find_parts(root)
    configs = read_configs(places)
    layout = recognise(configs, where=str(root), hints=_hints(root))
    if other_tower is not None and "mm_vision_tower" in configs.get("", {}):
        # The official LLaVA layout may only name its tower.
        configs[""].setdefault("vision_config", write_vision(other_tower))
    try:
        return layout, public_config(layout.read_config(configs)), configs, places
    except CheckpointError as error:
        raise CheckpointError(f"{root}/{error}") from error


@contextmanager
def open_checkpoint(
    root: Path, *, pickles: bool = False, other_tower: VisionConfig | None = None
) -> Iterator[Checkpoint]:
    """Open a checkpoint of any layout, with adapters merged and added vocabulary rows dropped.

    Args:
        root: Checkpoint folder.
        pickles: Also read `.bin` and `.pth`.
        other_tower: The vision tower comes from elsewhere and has this configuration; one in here is left out.

    Yields:
        The checkpoint; its tensors can be read until the context ends.

    Raises:
        CheckpointError: if files are missing, unreadable, or do not hold exactly what the configuration says.
    """
    layout, config, configs, places = recognise_folder(root, other_tower=other_tower)
    quantization = _stored_quantization(root, configs)
    with ExitStack() as stack:
        weights = _open_parts(stack, layout, places, pickles=pickles)
        rows = layout.rows_added(configs)
        elsewhere = "" if other_tower is None else "vision_tower."
        wanted = _wanted(config, layout, rows, quantization)
        tensors, left_out = _match(root, layout, weights, wanted, config, elsewhere)
        for folder, adapter_folder in places.adapters.items():
            if quantization is not None:
                raise CheckpointError(f"{adapter_folder}: its base is stored as {quantization.kind}, want a plain one")
            part = next((part for part in layout.parts if part.folder == folder), None)
            if part is None:
                raise CheckpointError(f"{adapter_folder}: layout {layout.name} has no part that it belongs to")
            files = _open_part(stack, root, adapter_folder, "adapter_model", pickles=pickles)
            factors = {key: _describe(files, key) for key in files.names}
            tensors = merge_adapter(pair_factors(adapter_folder, factors), tensors, part.keys.to_ours)
        for key in VOCABULARY_KEYS:
            if rows and key in tensors:
                tensors[key] = tensors[key].rows(0, config.text.vocab_size)
        yield Checkpoint(
            root=root,
            layout=layout,
            config=config,
            configs=configs,
            tensors=tensors,
            left_out=sorted(left_out),
            quantization=quantization,
        )


def _stored_quantization(root: Path, configs: Mapping[str, JsonDict]) -> QuantizationConfig | None:
    try:
        return stored_quantization(configs.get("", {}))
    except CheckpointError as error:
        raise CheckpointError(f"{root}/{error}") from error


def _open_parts(stack: ExitStack, layout: Layout, places: Places, *, pickles: bool) -> dict[str, TensorFiles]:
    """Weight files by folder of the part."""
    opened: dict[str, TensorFiles] = {}
    for part in layout.parts:
        if part.folder in opened:
            continue
        files = _open_part(stack, places.root, places.of(part.folder), part.weights_stem, pickles=pickles)
        opened[part.folder] = files
        if layout.name == "xtuner" and part.folder == "" and isinstance(files, PickleFiles):
            opened |= split_training_state(files) or {}
    return opened


def _open_part(stack: ExitStack, root: Path, folder: Path, stem: str, *, pickles: bool) -> TensorFiles:
    if not any(folder.glob("*.safetensors*")) and (files := find_pickles(folder, stem)):
        if not pickles:
            raise refuse_pickle(files[0], root)
        return PickleFiles(folder, files)
    return stack.enter_context(WeightFiles(folder, stem=stem))


def _describe(files: TensorFiles, key: str) -> LazyTensor:
    view = functools.partial(files.load, key) if isinstance(files, WeightFiles) else None
    return LazyTensor(
        shape=files.shape(key),
        dtype=files.dtype(key),
        read=functools.partial(files.read, key),
        view=view,
        file=files.file_of(key),
        key=key,
    )


class _Want(NamedTuple):
    shape: tuple[int, ...]
    """-1 where any length will do."""
    dtype: torch.dtype | None = None
    """None: any floating one."""

    def problem(self, found: LazyTensor) -> tuple[str, str] | None:
        """What is wrong with a tensor, and what was found and wanted."""
        if len(found.shape) != len(self.shape) or any(
            want not in (-1, size) for size, want in zip(found.shape, self.shape, strict=True)
        ):
            return "misshapen", f"got {_shape(found.shape)}, want {_shape(self.shape)}"
        if self.dtype is None and not found.dtype.is_floating_point:
            return "wrong dtype", f"got {found.dtype}, want a floating one"
        if self.dtype is not None and found.dtype != self.dtype:
            return "wrong dtype", f"got {found.dtype}, want {self.dtype}"
        return None


def _wanted(
    config: AuroraConfig, layout: Layout, rows: int, quantization: QuantizationConfig | None
) -> dict[str, _Want]:
    """Our name -> what the layout stores, added vocabulary rows included."""
    with torch.device("meta"):
        state = AuroraModel(config).state_dict()
    wanted = {name: _Want(tuple(tensor.shape)) for name, tensor in state.items() if name.startswith(layout.holds)}
    for key in VOCABULARY_KEYS:
        if key in wanted:
            wanted[key] = _Want((wanted[key].shape[0] + rows, *wanted[key].shape[1:]))
    if "language_model." in layout.holds:
        for name in quantized_linears(config.text, quantization):
            if source_of(name, config.text) == f"{name}.weight":
                del wanted[f"{name}.weight"]
        stored = stored_tensors(config.text, quantization)
        wanted |= {name: _Want(tensor.shape, tensor.dtype) for name, tensor in stored.items()}
    return wanted


_Row = tuple[str, str, str, str]
"""Problem, file, key, what was found and wanted."""


def _match(
    root: Path,
    layout: Layout,
    weights: Mapping[str, TensorFiles],
    wanted: Mapping[str, _Want],
    config: AuroraConfig,
    elsewhere: str,
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Find the source of every wanted tensor; refuse missing, unexpected and misshapen ones with a table.

    Tensors whose names begin with `elsewhere` are left out.
    """
    wanted = {name: want for name, want in wanted.items() if not (elsewhere and name.startswith(elsewhere))}
    candidates: dict[str, list[LazyTensor]] = {}
    aliases: dict[str, list[LazyTensor]] = {}
    rows: list[_Row] = []
    left_out: list[str] = []
    for part in layout.parts:
        files = weights[part.folder]
        for key in files.names:
            tensor = _describe(files, key)
            names = part.keys.pieces(key) or (part.keys.to_ours(key),)
            alias = part.keys.alias_of(key)
            if names[0] in wanted:
                for name, piece in _pieces(tensor, names, wanted):
                    candidates.setdefault(name, []).append(piece)
            elif alias in wanted:
                aliases.setdefault(str(alias), []).append(tensor)
            elif part.keys.is_ignored(key) or (elsewhere and str(names[0]).startswith(elsewhere)):
                left_out.append(key)
            # With tied embeddings some files hold the output head a second time.
            elif names != ("language_model.lm_head.weight",) or not config.text.tie_word_embeddings:
                rows.append(("unexpected", _short(tensor.file, root), key, f"got {_shape(tensor.shape)}"))
    chosen: dict[str, LazyTensor] = {}
    for name, want in wanted.items():
        proper = candidates.get(name, [])
        rows += [("twice", _short(more.file, root), more.key, f"as {proper[0].key}, too") for more in proper[1:]]
        found = _choose(proper + aliases.get(name, []), want.shape)
        if found is None:
            part, key = layout.place(name)
            rows.append(("missing", part.folder or ".", key, f"want {_shape(want.shape)}"))
            continue
        chosen[name] = found
        if (problem := want.problem(found)) is not None:
            rows.append((problem[0], _short(found.file, root), found.key, problem[1]))
    if rows:
        raise CheckpointError(_table(root, layout, list(dict.fromkeys(rows))))
    return chosen, left_out


def _pieces(
    tensor: LazyTensor, names: tuple[str | None, ...], wanted: Mapping[str, _Want]
) -> Iterator[tuple[str, LazyTensor]]:
    """One of our tensors, or the several that a fused one holds."""
    shape = wanted[str(names[0])].shape
    padding = len(tensor.shape) - len(shape)
    if names[0] in _FLAT and padding > 0 and tensor.shape == (1,) * padding + shape:
        tensor = tensor.reshape(shape)
    if len(names) == 1:
        yield str(names[0]), tensor
        return
    size = tensor.shape[0] // len(names) if tensor.shape else 0
    whole = bool(tensor.shape) and size * len(names) == tensor.shape[0]
    for number, name in enumerate(names):
        # One that does not split evenly is handed on whole, and found misshapen.
        yield str(name), tensor.rows(number * size, (number + 1) * size) if whole else tensor


def _choose(options: list[LazyTensor], shape: tuple[int, ...]) -> LazyTensor | None:
    return next((option for option in options if option.shape == shape), options[0] if options else None)


def _table(root: Path, layout: Layout, rows: list[_Row]) -> str:
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
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _hints(root: Path) -> list[str]:
    pickles = sorted(file.name for file in root.glob("*") if file.suffix in PICKLE_SUFFIXES)
    return [f"{pickles[0]} is pickled, and pickled weights are not read"] if pickles else []
