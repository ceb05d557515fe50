"""The verb `visualize`: pictures, charts, animations and a page to explore of what merged in an image or a clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import hydra
import torch
from omegaconf import MISSING, DictConfig
from torch import Tensor

from aurora.config import load_config, register_schema
from aurora.model.captioner import AuroraModel
from aurora.model.merge import MergeConfig, Schedule
from aurora.model.vision import num_active_layers
from aurora.processing.image import AspectRatio, AuroraImageProcessor
from aurora.processing.video import SampledVideo, load_visual
from aurora.runtime import RuntimeConfig
from aurora.visualization.animation import MAX_FPS, gif_bytes, mp4_bytes
from aurora.visualization.charts import budget_chart, chart_bytes, similarity_chart, sizes_chart
from aurora.visualization.explorer import explorer_page
from aurora.visualization.figure import draw_sheet, png_bytes, save_bytes
from aurora.visualization.film import (
    TracedRun,
    animation_sheets,
    film_sheet,
    film_strip,
    image_figure,
    image_sheet,
    seen_pictures,
)
from aurora.visualization.merge_map import Picture, trace_frames
from aurora.visualization.svg import sheet_svg
from aurora.visualization.theme import DARK, LIGHT

__all__ = ["TracedRun", "VisualizeConfig", "film_strip", "image_figure", "main", "seen_pictures", "visualize"]

_FORMS = (".png", ".svg", ".gif", ".mp4", ".html")
_RATIOS = (0.4, 0.2, 0.1)
_EXPLORER_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


class FigureKind(Enum):
    """What a PNG or SVG shows."""

    maps = "maps"
    """The image beside its merge maps, or a film strip of the clip."""
    sizes = "sizes"
    """How many tokens stand for how many patches."""
    similarity = "similarity"
    """Similarity of the merged pairs, layer by layer."""
    budget = "budget"
    """Tokens along the layers."""


class ThemeName(Enum):
    """Page that a figure is for."""

    light = "light"
    dark = "dark"


@dataclass(kw_only=True, slots=True)
class VisualizeConfig(RuntimeConfig):
    """Draw which patches of an image or a video merged."""

    visual_input: str = MISSING
    """An image or a video."""
    output: str = "outputs/merge_map.png"
    """File to write; its ending decides: .png or .svg a figure, .gif or .mp4 an animation, .html a page to explore."""
    figure: FigureKind = FigureKind.maps
    """What a .png or .svg shows: maps, sizes (of the groups), similarity (of merged pairs), budget (of tokens)."""
    token_kept_ratio: list[float] | None = None
    """Shares of visual tokens to keep, each in (0, 1]; null is [0.4,0.2,0.1], and every tenth in a page to explore."""
    tokens: list[int] = field(default_factory=list)
    """Instead of ratios, tokens of a frame to keep, exactly, such as [490,154,18,6]."""
    layer: list[int] = field(default_factory=lambda: [-1])
    """Layers to draw, counted from 0 or from the end; -1 is what the language model reads."""
    model_path: str | None = None
    """Checkpoint folder or hub id; null is the bundled aurora-tiny."""
    num_frm: int = 8
    """Frames sampled from a video, evenly over its length; an image is one frame."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """How visual tokens are merged; its ratio is taken from token_kept_ratio."""
    image_aspect_ratio: AspectRatio | None = None
    """How frames fit the tower: pad, crop, squash or native (not square); null is the checkpoint's choice."""
    image_size: int | None = None
    """Side of a frame in the tower, pixels, of native frames the short one; null is the checkpoint's."""
    feature_layer: int | None = None
    """Hidden state to draw, counted from the end; null is the checkpoint's. -1 merges in the last layer, too."""
    borders: bool = True
    """Outline the groups."""
    theme: ThemeName = ThemeName.light
    """light or dark paper; a page to explore follows its reader."""
    fps: int = 2
    """Steps per second of an animation."""

    def __post_init__(self) -> None:
        """Check ranges."""
        RuntimeConfig.__post_init__(self)
        for ratio in self.token_kept_ratio or ():
            if not 0 < ratio <= 1:
                raise ValueError(f"token_kept_ratio={self.token_kept_ratio}: want numbers in (0, 1]")
        for key in ("token_kept_ratio", "layer"):
            if getattr(self, key) == []:
                raise ValueError(f"{key}=[]: want at least one")
        if any(count < 1 for count in self.tokens):
            raise ValueError(f"tokens={self.tokens}: want counts of at least 1")
        if self.tokens and self.token_kept_ratio is not None:
            raise ValueError(f"tokens={self.tokens} and token_kept_ratio={self.token_kept_ratio}: want one of them")
        for key in ("num_frm", "image_size"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value}: want at least 1")
        if not 1 <= self.fps <= MAX_FPS:
            raise ValueError(f"fps={self.fps}: want 1 to {MAX_FPS}")
        if self.fixed and (self.tokens or self.token_kept_ratio is not None):
            raise ValueError(f"{self.fixed}: says how much to merge; want it without token_kept_ratio and tokens")
        form = Path(self.output).suffix.lower()
        if form not in _FORMS:
            raise ValueError(f"output={self.output}: want a name that ends in {', '.join(_FORMS)}")
        if self.figure is not FigureKind.maps and form not in (".png", ".svg"):
            raise ValueError(f"figure={self.figure.value}: is a .png or .svg, got output={self.output}")
        if self.figure is not FigureKind.maps and len(self.layer) > 1:
            raise ValueError(f"layer={self.layer}: want one layer with figure={self.figure.value}")

    @property
    def fixed(self) -> str:
        """What of `merge` leaves a ratio nothing to say, as text; empty if nothing does."""
        if self.merge.visual_token_budget is not None:
            return f"merge.visual_token_budget={self.merge.visual_token_budget}"
        return f"merge.r={self.merge.r}" if self.merge.schedule is Schedule.list else ""


register_schema("visualize_schema", VisualizeConfig)


def trace_runs(model: AuroraModel, pixel_values: Tensor, config: VisualizeConfig) -> list[TracedRun]:
    """Encode the frames once for each wish, and record what merged.

    Args:
        model: Encodes the frames.
        pixel_values: Normalised frames, (F, 3, H, W).
        config: Ratios or counts, and merging.

    Returns:
        One run for each ratio or count, in the order of the settings.

    Raises:
        ValueError: if a plan is impossible.
    """
    height, width = pixel_values.shape[2:]
    num_patches = model.plan(1, height, width, MergeConfig())[0].num_patches
    wishes = [(config.fixed.removeprefix("merge.").replace("_", " "), config.merge)] if config.fixed else []
    for count in config.tokens:
        if count > num_patches:
            raise ValueError(f"tokens={config.tokens}: a frame of {width}x{height} pixels has {num_patches} patches")
        merge = dataclasses.replace(config.merge, schedule=Schedule.exact, token_kept_ratio=count / num_patches)
        wishes.append((f"down to {count}", merge))
    if not wishes:
        explored = Path(config.output).suffix.lower() == ".html"
        for ratio in config.token_kept_ratio or (_EXPLORER_RATIOS if explored else _RATIOS):
            wishes.append((f"kept ratio {ratio:g}", dataclasses.replace(config.merge, token_kept_ratio=ratio)))
    return [TracedRun(name, trace_frames(model, pixel_values, merge)) for name, merge in wishes]


def visualize(
    model: AuroraModel, image_processor: AuroraImageProcessor, visual: SampledVideo, config: VisualizeConfig
) -> tuple[bytes, list[TracedRun]]:
    """Draw what `config` asks for.

    Args:
        model: Encodes the frames.
        image_processor: Brings the frames to the tower, as for captioning.
        visual: The image or the frames.
        config: Ratios, layers, merging, and the kind of figure.

    Returns:
        The content of the file, and the encoder runs it was drawn from.

    Raises:
        ValueError: if a layer does not exist or the merging is impossible.
    """
    pixels = image_processor.preprocess_frames(visual.frames)
    pictures = seen_pictures(pixels, image_processor, model.config.vision.patch_size)
    runs = trace_runs(model, pixels.to(model.device), config)
    seconds = visual.seconds if len(pictures) > 1 else []
    return draw(pictures, runs, config, seconds=seconds), runs


def draw(
    pictures: Sequence[Picture], runs: Sequence[TracedRun], config: VisualizeConfig, *, seconds: Sequence[float] = ()
) -> bytes:
    """Draw encoder runs, whatever tower made them, as the settings and the ending of `config.output` say.

    Args:
        pictures: What the tower saw, (H, W, 3) uint8 each, from `seen_pictures`.
        runs: Encoder runs over these frames.
        config: Layers and the kind of figure; what concerns the encoder is not looked at.
        seconds: When each frame of a clip is shown.

    Returns:
        The content of the file.

    Raises:
        ValueError: if a layer does not exist.
    """
    theme = DARK if config.theme is ThemeName.dark else LIGHT
    form = Path(config.output).suffix.lower()
    if form == ".html":
        return explorer_page(pictures, runs, title=Path(config.visual_input).name, seconds=seconds).encode()
    if form in (".gif", ".mp4"):
        sheets = animation_sheets(pictures, runs, seconds=seconds, layer=config.layer[-1], borders=config.borders)
        steps = [draw_sheet(sheet, theme) for sheet in sheets]
        return (gif_bytes if form == ".gif" else mp4_bytes)(steps, fps=config.fps)
    if config.figure is FigureKind.maps:
        if len(pictures) == 1:
            sheet = image_sheet(pictures[0], runs, layers=config.layer, borders=config.borders)
        else:
            sheet = film_sheet(pictures, runs, seconds=seconds, layers=config.layer, borders=config.borders)
        return png_bytes(draw_sheet(sheet, theme)) if form == ".png" else sheet_svg(sheet, theme).encode()
    if config.figure is FigureKind.sizes:
        chart = sizes_chart(runs, layer=config.layer[0], theme=theme)
    elif config.figure is FigureKind.similarity:
        chart = similarity_chart(runs, theme=theme)
    else:
        chart = budget_chart(runs, theme=theme)
    return chart_bytes(chart, form[1:])


def summary(runs: Sequence[TracedRun], written: Path, num_bytes: int) -> str:
    """Say what each run delivered and what was written."""
    width = max(len(run.name) for run in runs)
    lines = []
    for run in runs:
        counts = run.token_counts()
        lines.append(f"{run.name:<{width}}  {counts[:, -1].sum()} of {counts[:, 0].sum()} visual tokens")
    return "\n".join([*lines, f"{written}: {max(1, round(num_bytes / 1000))} kB"])


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
    model = AuroraForConditionalGeneration.from_pretrained(
        path, torch_dtype=resolve_dtype(config.dtype, device), device_map=str(device)
    ).model
    if config.feature_layer is not None:
        num_active_layers(model.config.vision, config.feature_layer)  # refuses what the tower does not have
        model.config.feature_layer = config.feature_layer
    image_processor.config = dataclasses.replace(
        image_processor.config,
        aspect_ratio=config.image_aspect_ratio or image_processor.config.aspect_ratio,
        image_size=config.image_size or image_processor.config.image_size,
        patch_size=model.config.vision.patch_size,
    )
    with torch.inference_mode():
        content, runs = visualize(model, image_processor, visual, config)
    print(summary(runs, save_bytes(content, Path(config.output).expanduser()), len(content)))
