"""Write tensors under our names as a checkpoint of any layout, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from aurora.checkpoint.keys import VOCABULARY_KEYS, Layout
from aurora.checkpoint.lazy import LazyTensor, stack, write_lazy
from aurora.checkpoint.quantization import QuantizationConfig, quantization_json
from aurora.checkpoint.store import CheckpointError, JsonDict, write_json
from aurora.model.captioner import AuroraConfig

QUANTIZED_LAYOUTS = ("aurora", "xtuner")
"""Layouts that store quantised weights; the others are for readers that know nothing of them."""


def arrange(
    layout: Layout, config: AuroraConfig, tensors: Mapping[str, LazyTensor]
) -> dict[str, dict[str, LazyTensor]]:
    """Name tensors as a layout does: fused where it fuses, with the vocabulary rows it adds.

    Args:
        layout: Target.
        config: The model.
        tensors: Our name -> tensor; what the layout does not store is passed over.

    Returns:
        Folder of a part -> foreign name -> tensor.

    Raises:
        CheckpointError: if the layout has no place for a tensor it should store.
    """
    rows = layout.rows_to_add(config)
    placed: dict[str, dict[str, LazyTensor]] = {part.folder: {} for part in layout.parts}
    for name, tensor in tensors.items():
        if not name.startswith(layout.holds):
            continue
        part, foreign = layout.place(name)
        if foreign in placed[part.folder]:
            continue  # a fused tensor, made when its first piece came
        pieces = part.keys.pieces(foreign)
        if pieces is not None:
            tensor = stack([tensors[piece] for piece in pieces])
        elif name in VOCABULARY_KEYS:
            tensor = tensor.with_mean_rows(rows)
        unit_dims = part.keys.unit_dims.get(name, 0)
        placed[part.folder][foreign] = tensor.reshape((1,) * unit_dims + tensor.shape)
    return placed


def check_storable(layout: Layout, quantization: QuantizationConfig | None) -> None:
    """Refuse to store quantised weights in a layout whose readers expect something else.

    Raises:
        CheckpointError: naming the layouts that can.
    """
    if quantization is not None and layout.name not in QUANTIZED_LAYOUTS:
        raise CheckpointError(
            f"layout {layout.name}: cannot store {quantization.kind} weights, want {' or '.join(QUANTIZED_LAYOUTS)}"
        )


def _main_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    """Dtype of the first tensor that is not quantised."""
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point]
    return str(dtypes[0] if dtypes else torch.float32).removeprefix("torch.")


def write_checkpoint(
    stage: Path,
    layout: Layout,
    config: AuroraConfig,
    tensors: Mapping[str, LazyTensor],
    *,
    max_shard_size: int | str,
    image_aspect_ratio: str | None = None,
    quantization: QuantizationConfig | None = None,
    on_written: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write config files and weights of a checkpoint into a (staging) folder.

    Args:
        stage: Existing folder.
        layout: Target.
        config: The model.
        tensors: Our name -> tensor, read one at a time.
        max_shard_size: Bytes, or a text such as `"5GB"`.
        image_aspect_ratio: pad, crop or squash, to be recorded; None records nothing.
        quantization: How the language model's tensors are quantised, to be recorded.
        on_written: Called with the bytes of each tensor once it is written.

    Raises:
        CheckpointError: if the layout cannot store this model, or the disk refuses.
    """
    check_storable(layout, quantization)
    contents = layout.write_config(config, image_aspect_ratio)
    placed = arrange(layout, config, tensors)
    for part in layout.parts:
        folder = stage / part.folder
        folder.mkdir(exist_ok=True)
        if not placed[part.folder]:
            raise CheckpointError(f"layout {layout.name}: nothing to store in {part.folder or 'its root'}")
        content: JsonDict = contents[part.config_key]
        if "model_type" in content:
            content = {**content, "torch_dtype": _main_dtype(placed[part.folder])}
        if quantization is not None and part.config_key == "":
            content = {**content, "quantization_config": quantization_json(quantization)}
        write_json(stage / part.config_file, content)
        write_lazy(
            folder,
            placed[part.folder],
            max_shard_size=max_shard_size,
            stem=part.weights_stem,
            on_written=on_written,
        )
