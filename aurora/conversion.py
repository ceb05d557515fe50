"""The verb `convert`: a checkpoint of any layout in, the same weights in another layout out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum

import hydra
import torch
from omegaconf import MISSING, DictConfig
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from aurora.checkpoint.convert import Conversion, convert
from aurora.checkpoint.layouts import ALL_LAYOUTS, get_layout
from aurora.checkpoint.quantization import Int8Config
from aurora.checkpoint.store import parse_size
from aurora.config import load_config, register_schema


class StoredDtype(Enum):
    """Floating-point type of the stored weights."""

    keep = "keep"
    """Each tensor's own."""
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Quantize(Enum):
    """Quantisation of the stored weights."""

    none = "none"
    """As they are in the source."""
    int8 = "int8"


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    """Turn a checkpoint of any layout into any other, or put a captioner together from its parts."""

    model_path: str = MISSING
    """Checkpoint to read: a folder or hub id of any layout, pickled weights included, or a .gguf language model."""
    output: str = MISSING
    """Folder to write; it appears whole or not at all."""
    layout: str = "aurora"
    """aurora, xtuner, llava_hf or llava; clip, siglip, open_clip or timm (vision tower alone); llama (text alone)."""
    vision_path: str | None = None
    """Take the vision tower from this checkpoint; with a language model as model_path this starts a new captioner."""
    dtype: StoredDtype = StoredDtype.keep
    """Type of the stored weights: keep, float32, float16, bfloat16."""
    max_shard_size: str = "5GB"
    """Split the weights into files of at most this size."""
    quantize: Quantize = Quantize.none
    """Store the language model's linear layers in int8, with one scale per row: none, int8."""
    overwrite: bool = False
    """Write into a folder that is not empty."""
    seed: int = 0
    """Seed of the projector of a new captioner."""

    def __post_init__(self) -> None:
        """Check names and sizes."""
        get_layout(self.layout, among=ALL_LAYOUTS)
        parse_size(self.max_shard_size)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: want 0 or a positive number")


register_schema("convert_schema", ConvertConfig)


def run_conversion(config: ConvertConfig) -> Conversion:
    """Convert what the settings name, behind a progress bar where somebody watches.

    Args:
        config: What to convert, and into what.

    Returns:
        What was done.

    Raises:
        ValueError: if it cannot be read or written.
    """
    dtypes = {StoredDtype.keep: None, **{kind: getattr(torch, kind.name) for kind in list(StoredDtype)[1:]}}
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("converting")
        return convert(
            config.model_path,
            config.output,
            layout=config.layout,
            vision_path=config.vision_path,
            dtype=dtypes[config.dtype],
            max_shard_size=config.max_shard_size,
            overwrite=config.overwrite,
            quantization=Int8Config() if config.quantize is Quantize.int8 else None,
            seed=config.seed,
            on_start=lambda num_bytes: progress.update(task, total=num_bytes),
            on_written=lambda num_bytes: progress.advance(task, num_bytes),
        )


def summary(done: Conversion, output: str) -> str:
    """Say what a conversion did."""
    lines = [f"{output}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.2f} GB, {done.source} to {done.target}"]
    if done.rows_added:
        lines.append(f"added {done.rows_added} rows to the vocabulary; they are recorded, and dropped on the way back")
    if done.new_projector:
        lines.append("the projector is new and random: it has to be trained")
    if done.left_out:
        shown = ", ".join(done.left_out[:3]) + (", ..." if len(done.left_out) > 3 else "")
        lines.append(f"left out {len(done.left_out)} tensors that {done.target} does not store: {shown}")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="convert")
def main(raw: DictConfig) -> None:
    """Convert what the command line names; called through `aurora.cli.run`."""
    config = load_config(raw, ConvertConfig)
    print(summary(run_conversion(config), config.output))
