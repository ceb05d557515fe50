"""Pictures in labelled rows and columns: where they stand, and drawing them with Pillow alone.

No plotting package is needed, since the demo draws with this. `svg.py` draws the same sheets as SVG.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from aurora.visualization.merge_map import Picture, enlarge, merge_map
from aurora.visualization.theme import LIGHT, Theme

_GAP_PX = 10
_MARGIN_PX = 16
_TITLE_PX, _LABEL_PX = 20, 15


class Panel(NamedTuple):
    """One picture of a sheet, or its merge map."""

    picture: Picture
    """(H, W, 3) uint8."""
    groups: NDArray[np.int64] | None = None
    """Group of each patch, (rows, columns): draw the merge map; None draws the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """Panels in labelled rows and columns."""

    rows: Sequence[Sequence[Panel]]
    """Pictures of one size, all rows of one length."""
    scale: int = 1
    """Enlarge the pictures by this whole factor."""
    borders: bool = True
    """Outline the groups of merge maps."""
    labels: Sequence[Sequence[str]] = ()
    """Text above each panel, in the same rows; empty where there is none."""
    row_labels: Sequence[str] = ()
    """Text left of each row, lines apart by newline."""
    title: str = ""
    """Text above everything, one line."""

    def __post_init__(self) -> None:
        """Check that everything fits together."""
        shapes = {panel.picture.shape for row in self.rows for panel in row}
        lengths = [len(row) for row in self.rows]
        if len(shapes) != 1 or len(set(lengths)) != 1:
            raise ValueError(
                f"pictures: got rows of {lengths} with shapes {sorted(shapes)}, want one size and one length"
            )
        if self.labels and [len(row) for row in self.labels] != lengths:
            raise ValueError(f"labels: got rows of {[len(row) for row in self.labels]}, want {lengths} as pictures")
        if self.row_labels and len(self.row_labels) != len(self.rows):
            raise ValueError(f"row_labels: got {len(self.row_labels)}, want {len(self.rows)} as rows of pictures")

    @property
    def panel_px(self) -> tuple[int, int]:
        """Width and height of every panel as drawn."""
        height, width, _ = self.rows[0][0].picture.shape
        return width * self.scale, height * self.scale


class Text(NamedTuple):
    """A text and where it stands."""

    text: str
    """Lines apart by newline."""
    x: int
    y: int
    anchor: str
    """Pillow's: `la` from its left top, `lm` from the middle of its left side, `md` from the middle of its foot."""
    size_px: int


class Layout(NamedTuple):
    """Where everything on a sheet stands, in pixels."""

    width: int
    height: int
    corners: list[list[tuple[int, int]]]
    """Left and top of each panel."""
    texts: list[Text]


def lay_out(sheet: Sheet) -> Layout:
    """Place the panels and texts of a sheet."""
    width, height = sheet.panel_px
    columns = len(sheet.rows[0])
    side = max((_text_size(text, _LABEL_PX)[0] for text in sheet.row_labels), default=-_GAP_PX) + _GAP_PX
    left = _MARGIN_PX + side
    texts = [Text(sheet.title, _MARGIN_PX, _MARGIN_PX, "la", _TITLE_PX)] if sheet.title else []
    y = _MARGIN_PX + (_text_size(sheet.title, _TITLE_PX)[1] + _GAP_PX if sheet.title else 0)
    corners = []
    for index in range(len(sheet.rows)):
        labels = sheet.labels[index] if sheet.labels else [""] * columns
        y += _label_height(labels)
        corners.append([(left + column * (width + _GAP_PX), y) for column in range(columns)])
        if sheet.row_labels:
            texts.append(Text(sheet.row_labels[index], _MARGIN_PX, y + height // 2, "lm", _LABEL_PX))
        texts += [
            Text(text, x + width // 2, y - _GAP_PX // 2, "md", _LABEL_PX)
            for (x, _), text in zip(corners[-1], labels, strict=True)
            if text
        ]
        y += height + _GAP_PX
    body = left + columns * (width + _GAP_PX) - _GAP_PX
    full = max(body, _MARGIN_PX + _text_size(sheet.title, _TITLE_PX)[0]) + _MARGIN_PX
    return Layout(full, y - _GAP_PX + _MARGIN_PX, corners, texts)


def draw_sheet(sheet: Sheet, theme: Theme = LIGHT) -> Picture:
    """Draw a sheet as pixels.

    Args:
        sheet: What to draw.
        theme: Colours of paper and text.

    Returns:
        The figure, (H, W, 3) uint8.
    """
    layout = lay_out(sheet)
    paper = Image.new("RGB", (layout.width, layout.height), ImageColor.getrgb(theme.paper))
    draw = ImageDraw.Draw(paper)
    for row, corners in zip(sheet.rows, layout.corners, strict=True):
        for panel, corner in zip(row, corners, strict=True):
            if panel.groups is None:
                drawn = enlarge(panel.picture, sheet.scale)
            else:
                drawn = merge_map(panel.picture, panel.groups, scale=sheet.scale, borders=sheet.borders)
            paper.paste(Image.fromarray(drawn), corner)
    for text in layout.texts:
        draw.multiline_text(
            (text.x, text.y), text.text, theme.ink, _font(text.size_px), text.anchor,
            align="center" if text.anchor == "md" else "left",
        )  # fmt: skip
    return np.asarray(paper)


def picture_grid(
    rows: Sequence[Sequence[Picture]],
    *,
    labels: Sequence[Sequence[str]] = (),
    row_labels: Sequence[str] = (),
    title: str = "",
) -> Picture:
    """Lay pictures out in a grid on white, with labels.

    Args:
        rows: Rows of pictures, (H, W, 3) uint8; all of one size, all rows of one length.
        labels: Text above each picture, in the same rows; empty where there is none.
        row_labels: Text left of each row, lines apart by newline.
        title: Text above everything, one line.

    Returns:
        The figure, (H, W, 3) uint8.

    Raises:
        ValueError: if there is no picture, or sizes or label counts differ.
    """
    panels = [[Panel(picture) for picture in row] for row in rows]
    return draw_sheet(Sheet(rows=panels, labels=labels, row_labels=row_labels, title=title))


def save_picture(picture: Picture, path: str | Path) -> Path:
    """Write a PNG beside its place and rename it, making folders as needed.

    Args:
        picture: (H, W, 3) uint8.
        path: File to write, ending in .png.

    Returns:
        The path written.

    Raises:
        ValueError: if the name does not end in .png.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output={path}: want a name that ends in .png")
    return save_bytes(png_bytes(picture), path)


def save_bytes(content: bytes, path: str | Path) -> Path:
    """Write a file beside its place and rename it, making folders as needed.

    Args:
        content: The whole file.
        path: File to write.

    Returns:
        The path written.

    Raises:
        OSError: if the file cannot be written; the error names it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(error.errno, "a file, want a folder", str(path.parent)) from error
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:  # of the file that the user named, not of the one beside it
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def png_bytes(picture: Picture) -> bytes:
    """Encode (H, W, 3) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@functools.cache
def _font(size_px: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size_px)


def _text_size(text: str, size_px: int) -> tuple[int, int]:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    box = draw.multiline_textbbox((0, 0), text, font=_font(size_px))
    return int(np.ceil(box[2])), int(np.ceil(box[3]))


def _label_height(texts: Sequence[str]) -> int:
    return max(_text_size(text, _LABEL_PX)[1] for text in texts) + _GAP_PX if any(texts) else 0
