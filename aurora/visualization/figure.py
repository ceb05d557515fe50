"""Pictures in labelled rows and columns, drawn with Pillow alone, so that the demo needs no plotting package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aurora.visualization.merge_map import Picture

_GAP_PX = 10
_MARGIN_PX = 16
_TITLE_PX, _LABEL_PX = 20, 15
_INK, _PAPER = (30, 30, 34), (255, 255, 255)


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
    shapes = {picture.shape for row in rows for picture in row}
    lengths = [len(row) for row in rows]
    if len(shapes) != 1 or len(set(lengths)) != 1:
        raise ValueError(f"pictures: got rows of {lengths} with shapes {sorted(shapes)}, want one size and one length")
    if labels and [len(row) for row in labels] != lengths:
        raise ValueError(f"labels: got rows of {[len(row) for row in labels]}, want {lengths} as pictures")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"row_labels: got {len(row_labels)}, want {len(rows)} as rows of pictures")
    height, width, _ = shapes.pop()
    large, small = ImageFont.load_default(_TITLE_PX), ImageFont.load_default(_LABEL_PX)
    left = _MARGIN_PX + (max(_text_size(text, small)[0] for text in row_labels) + _GAP_PX if row_labels else 0)
    above = [_label_height(row, small) for row in labels] if labels else [0] * len(rows)
    top = _MARGIN_PX + (_text_size(title, large)[1] + _GAP_PX if title else 0)

    body_width = left + lengths[0] * (width + _GAP_PX) - _GAP_PX
    full_width = max(body_width, _MARGIN_PX + _text_size(title, large)[0]) + _MARGIN_PX
    full_height = top + sum(above) + len(rows) * (height + _GAP_PX) - _GAP_PX + _MARGIN_PX
    sheet = Image.new("RGB", (full_width, full_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, _MARGIN_PX), title, fill=_INK, font=large)
    y = top
    for index, row in enumerate(rows):
        y += above[index]
        if row_labels:
            draw.multiline_text((_MARGIN_PX, y + height // 2), row_labels[index], fill=_INK, font=small, anchor="lm")
        for column, picture in enumerate(row):
            x = left + column * (width + _GAP_PX)
            sheet.paste(Image.fromarray(picture), (x, y))
            if labels:
                anchor = (x + width // 2, y - _GAP_PX // 2)
                draw.multiline_text(anchor, labels[index][column], _INK, small, anchor="md", align="center")
        y += height + _GAP_PX
    return np.asarray(sheet)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        Image.fromarray(picture).save(beside, format="PNG", optimize=True)
        beside.replace(path)
    except OSError as error:  # Pillow writes through a descriptor, so its error names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def _text_size(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(np.ceil(box[2])), int(np.ceil(box[3]))


def _label_height(texts: Sequence[str], font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    return max(_text_size(text, font)[1] for text in texts) + _GAP_PX if any(texts) else 0
