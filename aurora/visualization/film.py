"""Sheets of merge maps: an image beside its maps, a film strip of a clip, and the steps of an animation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aurora.processing.image import AuroraImageProcessor
from aurora.visualization.figure import Panel, Sheet, draw_sheet
from aurora.visualization.merge_map import FrameTrace, Picture, group_map, to_pictures

_IMAGE_PX, _FRAME_PX = 384, 168
"""About how wide a picture is drawn: of an image, and of a frame in a film strip."""


class TracedRun(NamedTuple):
    """One encoder run over the frames of a clip."""

    name: str
    """What to call it, such as `kept ratio 0.2`."""
    traces: Sequence[FrameTrace]
    """One for each frame."""

    @property
    def num_layers(self) -> int:
        """Layers that ran."""
        return len(self.traces[0].trace.sources)

    def groups(self, frame: int, layer: int = -1) -> NDArray[np.int64]:
        """Return the token of each patch of a frame after a layer, (rows, columns); see `group_map`."""
        return group_map(self.traces[frame].trace, layer=layer, row=self.traces[frame].row)

    def token_counts(self) -> NDArray[np.int64]:
        """Count the visual tokens of each frame before the first layer and after each, (F, layers + 1)."""
        counts = [
            [trace.grid[0] * trace.grid[1], *(size.shape[1] - trace.num_prefix_tokens for size in trace.sizes)]
            for trace, _ in self.traces
        ]
        return np.array(counts, dtype=np.int64)

    def group_sizes(self, layer: int = -1) -> NDArray[np.int64]:
        """List how many patches each visual token of every frame stands for after a layer, one row of numbers."""
        sizes = [trace.sizes[layer][row, trace.num_prefix_tokens :, 0] for trace, row in self.traces]
        return np.concatenate([size.cpu().numpy() for size in sizes]).astype(np.int64)

    def similarities(self, layer: int) -> NDArray[np.float32]:
        """List the cosine similarities of the pairs that a layer merged in every frame; empty where it merged none."""
        merged = [trace.similarities[layer][row] for trace, row in self.traces]
        return np.concatenate([similarity.float().cpu().numpy() for similarity in merged])

    def labels(self, frame: int, layer: int = -1) -> str:
        """Say how many visual tokens a frame has after a layer, two lines."""
        counts = self.token_counts()[frame]
        return f"{self.name}\n{counts[1:][layer]} of {counts[0]} tokens"


def image_sheet(
    picture: Picture, runs: Sequence[TracedRun], *, layers: Sequence[int] = (-1,), borders: bool = True
) -> Sheet:
    """Place an image beside its merge maps, one row for each layer.

    Args:
        picture: What the tower saw, (H, W, 3) uint8, from `seen_pictures`.
        runs: Encoder runs over this one frame.
        layers: See `group_map`.
        borders: Outline the groups.

    Returns:
        The sheet.

    Raises:
        ValueError: if there is no such layer.
    """
    return Sheet(
        rows=[[Panel(picture), *(Panel(picture, run.groups(0, layer)) for run in runs)] for layer in layers],
        labels=[["original", *(run.labels(0, layer) for run in runs)] for layer in layers],
        row_labels=[_layer_name(layer, runs[0]) for layer in layers] if len(layers) > 1 else [],
        scale=max(1, round(_IMAGE_PX / picture.shape[1])),
        borders=borders,
    )


def image_figure(
    picture: Picture, runs: Sequence[TracedRun], *, layers: Sequence[int] = (-1,), borders: bool = True
) -> Picture:
    """Draw what `image_sheet` places; the arguments are the same."""
    return draw_sheet(image_sheet(picture, runs, layers=layers, borders=borders))


def film_sheet(
    pictures: Sequence[Picture],
    runs: Sequence[TracedRun],
    *,
    seconds: Sequence[float] = (),
    layers: Sequence[int] = (-1,),
    borders: bool = True,
) -> Sheet:
    """Place the frames of a clip above their merge maps, one row for each run and layer.

    Args:
        pictures: What the tower saw, (H, W, 3) uint8 each, from `seen_pictures`.
        runs: Encoder runs over these frames.
        seconds: When each frame is shown.
        layers: See `group_map`.
        borders: Outline the groups.

    Returns:
        The sheet.

    Raises:
        ValueError: if there is no such layer.
    """
    rows, row_labels = [[Panel(picture) for picture in pictures]], ["original"]
    for run in runs:
        for layer in layers:
            rows.append([Panel(picture, run.groups(frame, layer)) for frame, picture in enumerate(pictures)])
            name = run.labels(len(pictures) - 1, layer)
            row_labels.append(name if len(layers) == 1 else f"{name}\n{_layer_name(layer, run)}")
    times = [[f"{second:.1f} s" for second in seconds]] if seconds else [[""] * len(pictures)]
    return Sheet(
        rows=rows,
        labels=times + [[""] * len(pictures)] * (len(rows) - 1),
        row_labels=row_labels,
        scale=max(1, round(_FRAME_PX / pictures[0].shape[1])),
        borders=borders,
    )


def film_strip(
    pictures: Sequence[Picture],
    runs: Sequence[TracedRun],
    *,
    seconds: Sequence[float] = (),
    layers: Sequence[int] = (-1,),
    borders: bool = True,
) -> Picture:
    """Draw what `film_sheet` places; the arguments are the same."""
    return draw_sheet(film_sheet(pictures, runs, seconds=seconds, layers=layers, borders=borders))


def animation_sheets(
    pictures: Sequence[Picture],
    runs: Sequence[TracedRun],
    *,
    seconds: Sequence[float] = (),
    layer: int = -1,
    borders: bool = True,
) -> list[Sheet]:
    """Place each step of an animation: the frames of a clip in time, or the layers of an image in depth.

    Args:
        pictures: What the tower saw, (H, W, 3) uint8 each, from `seen_pictures`.
        runs: Encoder runs over these frames.
        seconds: When each frame is shown.
        layer: For a clip, see `group_map`.
        borders: Outline the groups.

    Returns:
        One sheet for each frame; of a single picture, one for each layer that ran.

    Raises:
        ValueError: if there is no such layer.
    """
    moving = len(pictures) > 1
    sheets = []
    for step in range(len(pictures) if moving else runs[0].num_layers):
        frame, depth = (step, layer) if moving else (0, step)
        when = f"{seconds[frame]:.1f} s" if moving and seconds else _layer_name(depth, runs[0]).replace("\n", " ")
        maps = [Panel(pictures[frame], run.groups(frame, depth)) for run in runs]
        sheets.append(
            Sheet(
                rows=[[Panel(pictures[frame]), *maps]],
                labels=[[f"original\n{when}", *(run.labels(frame, depth) for run in runs)]],
                scale=max(1, round(_IMAGE_PX * 2 / 3 / pictures[0].shape[1])),
                borders=borders,
            )
        )
    return sheets


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


def _layer_name(layer: int, run: TracedRun) -> str:
    return f"after layer {layer % run.num_layers + 1}\nof {run.num_layers}"
