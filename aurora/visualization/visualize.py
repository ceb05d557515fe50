"""The verb `visualize`: draw which patches of an image or a clip merged, for several kept ratios and layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import hydra
import torch
from omegaconf import MISSING, DictConfig
from torch import Tensor

from aurora.config import load_config, register_schema
from aurora.model.captioner import AuroraModel
from aurora.model.merge import MergeConfig
from aurora.processing.image import AspectRatio, AuroraImageProcessor
from aurora.processing.video import SampledVideo, load_visual
from aurora.runtime import RuntimeConfig
from aurora.visualization.figure import picture_grid, save_picture
from aurora.visualization.merge_map import (
    FrameTrace,
    Picture,
    enlarge,
    group_map,
    merge_map,
    to_pictures,
    trace_frames,
)

_IMAGE_PX, _FRAME_PX = 384, 168
"""About how wide a picture is drawn: of an image, and of a frame in a film strip."""


@dataclass(kw_only=True, slots=True)
class VisualizeConfig(RuntimeConfig):
    """Draw which patches of an image or a video merged."""

    visual_input: str = MISSING
    """An image or a video."""
    output: str = "outputs/merge_map.png"
    """PNG file to write."""
    token_kept_ratio: list[float] = field(default_factory=lambda: [0.4, 0.2, 0.1])
    """Shares of visual tokens to keep, each in (0, 1], such as [0.4,0.1]."""
    layer: list[int] = field(default_factory=lambda: [-1])
    """Layers to draw, counted from 0 or from the end; -1 is what the language model reads."""
    model_path: str | None = None
    """Checkpoint folder or hub id; null is the bundled aurora-tiny."""
    num_frm: int = 8
    """Frames sampled from a video, evenly over its length; an image is one frame."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """How visual tokens are merged; its ratio is taken from token_kept_ratio."""
    image_aspect_ratio: AspectRatio | None = None
    """How frames become square: pad, crop or squash; null is the checkpoint's choice."""
    borders: bool = True
    """Outline the groups."""

    def __post_init__(self) -> None:
        """Check ranges."""
        RuntimeConfig.__post_init__(self)
        for ratio in self.token_kept_ratio:
            if not 0 < ratio <= 1:
                raise ValueError(f"token_kept_ratio={self.token_kept_ratio}: want numbers in (0, 1]")
        for key in ("token_kept_ratio", "layer"):
            if not getattr(self, key):
                raise ValueError(f"{key}=[]: want at least one")
        if self.num_frm < 1:
            raise ValueError(f"num_frm={self.num_frm}: want at least 1 frame")
        if Path(self.output).suffix.lower() != ".png":
            raise ValueError(f"output={self.output}: want a name that ends in .png")


register_schema("visualize_schema", VisualizeConfig)


class TracedRun(NamedTuple):
    """One encoder run over the frames of a clip."""

    name: str
    """What to call it, such as `kept ratio 0.2`."""
    traces: Sequence[FrameTrace]
    """One for each frame."""

    def labels(self, frame: int, layer: int = -1) -> str:
        """Say how many visual tokens a frame has after a layer, two lines."""
        trace, row = self.traces[frame]
        kept, total = int(group_map(trace, layer=layer, row=row).max()) + 1, trace.grid[0] * trace.grid[1]
        return f"{self.name}\n{kept} of {total} tokens"


def image_figure(
    picture: Picture, runs: Sequence[TracedRun], *, layers: Sequence[int] = (-1,), borders: bool = True
) -> Picture:
    """Draw an image beside its merge maps, one row for each layer.

    Args:
        picture: What the tower saw, (H, W, 3) uint8, from `seen_pictures`.
        runs: Encoder runs over this one frame.
        layers: See `group_map`.
        borders: Outline the groups.

    Returns:
        The figure.
    """
    scale = max(1, round(_IMAGE_PX / picture.shape[1]))
    rows, labels = [], []
    for layer in layers:
        maps = [_map_of(picture, run.traces[0], layer, scale, borders=borders) for run in runs]
        rows.append([enlarge(picture, scale), *maps])
        labels.append(["original", *(run.labels(0, layer) for run in runs)])
    row_labels = [_layer_name(layer, runs[0].traces[0]) for layer in layers] if len(layers) > 1 else []
    return picture_grid(rows, labels=labels, row_labels=row_labels)


def film_strip(
    pictures: Sequence[Picture],
    runs: Sequence[TracedRun],
    *,
    seconds: Sequence[float] = (),
    layers: Sequence[int] = (-1,),
    borders: bool = True,
) -> Picture:
    """Draw the frames of a clip above their merge maps, one row for each run and layer.

    Args:
        pictures: What the tower saw, (H, W, 3) uint8 each, from `seen_pictures`.
        runs: Encoder runs over these frames.
        seconds: When each frame is shown.
        layers: See `group_map`.
        borders: Outline the groups.

    Returns:
        The figure.
    """
    scale = max(1, round(_FRAME_PX / pictures[0].shape[1]))
    rows = [[enlarge(picture, scale) for picture in pictures]]
    row_labels = ["original"]
    for run in runs:
        for layer in layers:
            rows.append(
                [
                    _map_of(picture, trace, layer, scale, borders=borders)
                    for picture, trace in zip(pictures, run.traces, strict=True)
                ]
            )
            name = run.labels(len(pictures) - 1, layer)
            row_labels.append(name if len(layers) == 1 else f"{name}\n{_layer_name(layer, run.traces[0])}")
    times = [[f"{second:.1f} s" for second in seconds]] if seconds else [[""] * len(pictures)]
    return picture_grid(rows, labels=times + [[""] * len(pictures)] * (len(rows) - 1), row_labels=row_labels)


def seen_pictures(pixel_values: Tensor, image_processor: AuroraImageProcessor, patch_size: int) -> list[Picture]:
    """Turn the tower's input back into pictures, without the pixels that fill no patch.

    Args:
        pixel_values: Normalised frames, (F, 3, H, W).
        image_processor: What normalised them.
        patch_size: Patch side of the tower, pixels.

    Returns:
        One uint8 picture for each frame, its sides multiples of `patch_size`.
    """
    height, width = (side // patch_size * patch_size for side in pixel_values.shape[2:])
    config = image_processor.config
    return to_pictures(pixel_values[:, :, :height, :width], config.mean, config.std)


def visualize(
    model: AuroraModel, image_processor: AuroraImageProcessor, visual: SampledVideo, config: VisualizeConfig
) -> Picture:
    """Draw what `config` asks for.

    Args:
        model: Encodes the frames.
        image_processor: Makes the frames square, as for captioning.
        visual: The image or the frames.
        config: Ratios, layers and merging.

    Returns:
        The figure: an image beside its maps, or a film strip.

    Raises:
        ValueError: if a layer does not exist or the merging is impossible.
    """
    pixels = image_processor.preprocess_frames(visual.frames)
    pictures = seen_pictures(pixels, image_processor, model.config.vision.patch_size)
    runs = []
    for ratio in config.token_kept_ratio:
        merge = dataclasses.replace(config.merge, token_kept_ratio=ratio)
        runs.append(TracedRun(f"kept ratio {ratio:g}", trace_frames(model, pixels.to(model.device), merge)))
    if len(pictures) == 1:
        return image_figure(pictures[0], runs, layers=config.layer, borders=config.borders)
    return film_strip(pictures, runs, seconds=visual.seconds, layers=config.layer, borders=config.borders)


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="visualize")
def main(raw: DictConfig) -> None:
    """Draw what the command line names; called through `aurora.cli.run`."""
    # Here, so that drawing needs neither checkpoints nor generation.
    from aurora.captioning import BUNDLED_MODEL
    from aurora.modeling import AuroraForConditionalGeneration
    from aurora.processing.processor import AuroraProcessor
    from aurora.runtime import resolve_device, resolve_dtype, set_threads

    config = load_config(raw, VisualizeConfig)
    visual = load_visual(Path(config.visual_input).expanduser(), config.num_frm)
    device = resolve_device(config.device)
    set_threads(config.threads)
    path = config.model_path if config.model_path is not None else str(BUNDLED_MODEL)
    image_processor = AuroraProcessor.from_pretrained(path).image_processor
    if config.image_aspect_ratio is not None:
        image_processor.config = dataclasses.replace(image_processor.config, aspect_ratio=config.image_aspect_ratio)
    wrapped = AuroraForConditionalGeneration.from_pretrained(
        path, torch_dtype=resolve_dtype(config.dtype, device), device_map=str(device)
    )
    with torch.inference_mode():
        figure = visualize(wrapped.model, image_processor, visual, config)
    written = save_picture(figure, config.output)
    print(f"{written}: {figure.shape[1]}x{figure.shape[0]} pixels")


def _map_of(picture: Picture, frame: FrameTrace, layer: int, scale: int, *, borders: bool) -> Picture:
    labels = group_map(frame.trace, layer=layer, row=frame.row)
    return merge_map(picture, labels, scale=scale, borders=borders)


def _layer_name(layer: int, frame: FrameTrace) -> str:
    num_layers = len(frame.trace.sources)
    return f"after layer {layer % num_layers + 1}\nof {num_layers}"
