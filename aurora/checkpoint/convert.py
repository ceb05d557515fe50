"""Convert a checkpoint of any layout into any other, or put a captioner together from its parts.

Tensors go from file to file one at a time, so a 7B model needs as much memory as its largest matrix. Pickled weights
are read here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aurora.checkpoint.gguf import GGUFFile, load_llama, read_token_ids
from aurora.checkpoint.keys import Layout
from aurora.checkpoint.layouts import ALL_LAYOUTS, config_folders, get_layout
from aurora.checkpoint.lazy import LazyTensor, lazy, total_bytes
from aurora.checkpoint.pretrained import resolve_checkpoint
from aurora.checkpoint.quantization import Int8Config, QuantizationConfig, agree
from aurora.checkpoint.quantize import check_skipped, quantize_lazily, stored_tensors
from aurora.checkpoint.reading import Checkpoint, open_checkpoint
from aurora.checkpoint.side_files import add_tokens, copy_text_files, remove_tokens, write_preprocessor
from aurora.checkpoint.store import DEFAULT_SHARD_SIZE, CheckpointError, JsonDict, atomic_folder, parse_size
from aurora.checkpoint.writing import check_storable, write_checkpoint
from aurora.model.captioner import AuroraConfig
from aurora.model.projector import Projector

_WORDS = {"vision_tower.": "vision tower", "projector.": "projector", "language_model.": "language model"}
_SPARE_BYTES = 2**24  # tokenizer and config files


class Conversion(NamedTuple):
    """What a conversion did."""

    source: str
    """Layout it was read in."""
    target: str
    """Layout it was written in."""
    num_tensors: int
    num_bytes: int
    """Of the tensors written, before vocabulary rows are added."""
    left_out: list[str]
    """Tensors of the source that the target does not store, or that a captioner has no use for."""
    rows_added: int
    """Rows added to the vocabulary."""
    new_projector: bool
    """Whether the projector was drawn at random, because there was none."""


class _Source(NamedTuple):
    """Everything a target is written from."""

    layout: str
    config: AuroraConfig
    tensors: dict[str, LazyTensor]
    left_out: list[str]
    text_folder: Path
    gguf: Path | None
    """The file that holds language model and tokenizer, if it is one."""
    vision_folder: Path
    vision_configs: dict[str, JsonDict]
    rows_dropped: int
    new_projector: bool
    quantization: QuantizationConfig | None
    """How the language model is stored."""
    uncast: frozenset[str]
    """Tensors of quantised layers."""


def convert(
    model_path: str | Path,
    output: str | Path,
    *,
    layout: str,
    vision_path: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    quantization: Int8Config | None = None,
    seed: int = 0,
    on_start: Callable[[int], None] = lambda num_bytes: None,
    on_written: Callable[[int], None] = lambda num_bytes: None,
) -> Conversion:
    """Convert a checkpoint; the new files appear all together or not at all.

    Args:
        model_path: Folder or hub id of any layout, or a `.gguf` language model.
        output: Folder to write; made when missing.
        layout: A name of `ALL_LAYOUTS`; one that stores a part takes that part.
        vision_path: Take the vision tower from here. With a language model alone this makes a captioner; its projector
            is then drawn at random.
        dtype: Of the weights; None keeps the dtype of each tensor.
        max_shard_size: Split weights beyond this, bytes or a text such as "5GB".
        overwrite: Write into a folder that is not empty.
        quantization: Store the language model's linear layers in int8; None stores them as they are. A source that is
            stored quantised stays so.
        seed: Of a new projector.
        on_start: Called with the bytes to write.
        on_written: Called with the bytes of each tensor once it is written.

    Returns:
        What was done.

    Raises:
        ValueError: for an unknown layout or size, or if the source is stored in another kind of quantisation.
        CheckpointError: if the source cannot be read, lacks a part, or the target cannot be written.
    """
    target = get_layout(layout, among=ALL_LAYOUTS)
    parse_size(max_shard_size)
    folder = Path(output).expanduser()
    with ExitStack() as stack:
        source = _open_source(stack, model_path, vision_path, target, seed)
        _check_output(folder, [source.text_folder, source.vision_folder], overwrite=overwrite)
        settled = agree(quantization, source.quantization) if "language_model." in target.holds else None
        check_storable(target, settled)
        tensors = _tensors_to_write(source, target, dtype, quantization)
        dropped = [name for name in source.tensors if not name.startswith(target.holds)]
        num_bytes = total_bytes(tensors.values())
        _check_space(folder, num_bytes)
        on_start(num_bytes)
        with atomic_folder(folder, owned=config_folders()) as stage:
            aspect = _aspect_ratio(source.vision_configs)
            write_checkpoint(
                stage, target, source.config, tensors, quantization=settled,
                max_shard_size=max_shard_size, image_aspect_ratio=aspect, on_written=on_written,
            )  # fmt: skip
            _write_side_files(stage, source, target)
    rows = target.rows_to_add(source.config) if "language_model." in target.holds else 0
    left_out = source.left_out + dropped
    return Conversion(source.layout, target.name, len(tensors), num_bytes, left_out, rows, source.new_projector)


def _open_source(
    stack: ExitStack, model_path: str | Path, vision_path: str | Path | None, target: Layout, seed: int
) -> _Source:
    tower = None if vision_path is None else _open(stack, vision_path)
    if tower is not None and not any(name.startswith("vision_tower.") for name in tower.tensors):
        raise CheckpointError(f"vision_path={vision_path}: layout {tower.layout.name} holds no vision tower")
    is_gguf = Path(model_path).suffix == ".gguf"
    main = _open_gguf(Path(model_path)) if is_gguf else _open(stack, model_path, tower)
    config, tensors, left_out = main.config, dict(main.tensors), list(main.left_out)
    vision = main if tower is None else tower
    if tower is not None:
        config = dataclasses.replace(config, vision=tower.config.vision)
        tensors |= {name: tensor for name, tensor in tower.tensors.items() if name.startswith("vision_tower.")}
        left_out += tower.left_out
    needs = [prefix for prefix in target.holds if not any(name.startswith(prefix) for name in tensors)]
    new_projector = needs == ["projector."]
    if new_projector:
        tensors |= _new_projector(config, seed, tensors["language_model.embed_tokens.weight"].dtype)
    elif needs:
        words = ", ".join(_WORDS[prefix] for prefix in needs)
        hint = "" if vision_path or "language_model." in needs else "; give vision_path="
        raise CheckpointError(f"{model_path}: layout {target.name} wants a {words}, which is not there{hint}")
    return _Source(
        layout=main.layout.name,
        config=config,
        tensors=tensors,
        left_out=left_out,
        text_folder=main.root,
        gguf=Path(model_path) if is_gguf else None,
        vision_folder=vision.root,
        vision_configs=dict(vision.configs),
        rows_dropped=main.layout.rows_added(main.configs),
        new_projector=new_projector,
        quantization=main.quantization,
        uncast=main.uncast,
    )


def _tensors_to_write(
    source: _Source, target: Layout, dtype: torch.dtype | None, quantization: Int8Config | None
) -> dict[str, LazyTensor]:
    """What the target holds, cast and quantised as asked; a weight is quantised from what the file holds."""
    text = source.config.text
    if quantization is not None and source.quantization is None and "language_model." in target.holds:
        check_skipped(text, quantization)
        plain = {name: tensor.cast(dtype) for name, tensor in source.tensors.items()}
        replaced = quantize_lazily(source.tensors, text, quantization)
        new = stored_tensors(text, quantization)
        cast = {name: tensor if name in new else plain[name] for name, tensor in replaced.items()}
    else:
        cast = {
            name: tensor if name in source.uncast else tensor.cast(dtype) for name, tensor in source.tensors.items()
        }
    return {name: tensor for name, tensor in cast.items() if name.startswith(target.holds)}


def _open(stack: ExitStack, path: str | Path, tower: Checkpoint | None = None) -> Checkpoint:
    root = resolve_checkpoint(path, pickles=True)
    replaced = None if tower is None else tower.config.vision
    return stack.enter_context(open_checkpoint(root, pickles=True, other_tower=replaced))


def _open_gguf(path: Path) -> Checkpoint:
    with GGUFFile(path) as file:
        ids: dict[str, Any] = read_token_ids(file)
    model = load_llama(path, dtype="auto")
    names = {f"language_model.{name}": tensor for name, tensor in model.state_dict().items()}
    return Checkpoint(
        root=path.parent,
        layout=dataclasses.replace(ALL_LAYOUTS["llama"], name="gguf"),
        config=AuroraConfig(text=model.config, **ids),
        configs={"": {}},
        tensors={name: lazy(tensor, file=path, key=name) for name, tensor in names.items()},
    )


def _new_projector(config: AuroraConfig, seed: int, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Draw a projector, uniform within 1 / sqrt(inputs), as linear layers start in PyTorch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = Projector(config.vision.hidden_size, config.text.hidden_size, config.projector).state_dict()
    inputs = {"linear_1": config.vision.hidden_size, "linear_2": config.text.hidden_size}
    drawn = {}
    for name, shape in shapes.items():
        bound = 1 / math.sqrt(inputs[name.partition(".")[0]])
        tensor = torch.empty(shape.shape).uniform_(-bound, bound, generator=generator).to(dtype)
        drawn[f"projector.{name}"] = lazy(tensor, file=Path("new projector"), key=name)
    return drawn


def _check_output(folder: Path, sources: list[Path], *, overwrite: bool) -> None:
    if any(folder.resolve() == source.resolve() for source in sources):
        raise CheckpointError(f"output={folder}: is the checkpoint that is read, want another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(f"output={folder}: is not empty, want a new folder or overwrite=true")


def _check_space(folder: Path, num_bytes: int) -> None:
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes + _SPARE_BYTES:
        raise CheckpointError(f"output={folder}: {free / 1e6:,.1f} MB free on its disk, want {num_bytes / 1e6:,.1f} MB")


def _aspect_ratio(configs: dict[str, JsonDict]) -> str | None:
    aspect = configs.get("", {}).get("image_aspect_ratio")
    return aspect if isinstance(aspect, str) else None


def _write_side_files(stage: Path, source: _Source, target: Layout) -> None:
    if "language_model." in target.holds:
        if source.gguf is None:
            copy_text_files(source.text_folder, stage)
        else:
            from aurora.processing.gguf_tokenizer import load_gguf_tokenizer  # of the same layer, and only needed here

            load_gguf_tokenizer(source.gguf).save_pretrained(stage)
        if source.rows_dropped:
            remove_tokens(stage, source.config)
        add_tokens(stage, source.config, target)
    if "vision_tower." in target.holds:
        place = stage / target.preprocessor_folder
        write_preprocessor(source.vision_folder, source.vision_configs, place, source.config)
