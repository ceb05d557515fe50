"""Figures of notebooks: a sheet of pictures or a chart, with its caption beneath, in the house colours.

The caption is part of the picture, so that it is still there when the picture is saved or pasted elsewhere; it is also
the text that a screen reader gets.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from aurora.visualization.charts import chart_bytes
from aurora.visualization.figure import png_bytes, save_picture
from aurora.visualization.merge_map import Picture
from aurora.visualization.theme import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARGIN_PX = 16
_CHART_SCALE = 1.5
"""Pixels of a chart for each pixel on the page, so that it is sharp on dense screens."""
_CAPTION_PX = 16


@dataclass(frozen=True, slots=True)
class CaptionedFigure:
    """A figure with its caption; Jupyter shows it where it ends a cell."""

    picture: Picture
    """Figure and caption, (H, W, 3) uint8."""
    caption: str
    """What the caption says."""
    width_px: int
    """How wide a page should show it."""

    def save(self, path: str | Path) -> Path:
        """Write it as PNG; see `save_picture`."""
        return save_picture(self.picture, path)

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Give Jupyter the picture, and the caption where pictures are not shown."""
        data = {"image/png": base64.b64encode(png_bytes(self.picture)).decode("ascii"), "text/plain": self.caption}
        return data, {"image/png": {"width": self.width_px, "alt": self.caption}}


def captioned(figure: Figure | Picture, caption: str | None = None, *, theme: Theme = LIGHT) -> CaptionedFigure:
    """Put a caption under a figure.

    Args:
        figure: A chart of `charts` or `curves`, or a picture, (H, W, 3) uint8, of `film` or `figure`.
        caption: Sentences that say what is shown; None where a chart already holds its caption.
        theme: Colours of the caption's paper and text.

    Returns:
        The figure, to end a cell with.

    Raises:
        ValueError: if there is no caption.
    """
    picture, shown_scale = (figure, 1.0) if isinstance(figure, np.ndarray) else (_drawn(figure), _CHART_SCALE)
    width_px = round(picture.shape[1] / shown_scale)
    if caption is None:
        caption = "" if isinstance(figure, np.ndarray) else " ".join(figure.get_supxlabel().split())
    else:
        picture = _with_caption(picture, caption, round(_CAPTION_PX * shown_scale), theme)
    if not caption.strip():
        raise ValueError("caption: got none, want sentences that say what the figure shows")
    return CaptionedFigure(picture, caption, width_px)


def _drawn(chart: Figure) -> Picture:
    with Image.open(io.BytesIO(chart_bytes(chart, "png"))) as image:
        return np.asarray(image.convert("RGB"))


def _with_caption(picture: Picture, caption: str, size_px: int, theme: Theme) -> Picture:
    font = ImageFont.load_default(size_px)
    height, width, _ = picture.shape
    text = "\n".join(_lines(caption, font, width - 2 * _MARGIN_PX))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    spacing = size_px // 3
    foot = int(np.ceil(measure.multiline_textbbox((0, 0), text, font=font, spacing=spacing)[3])) + _MARGIN_PX
    paper = Image.new("RGB", (width, height + foot), ImageColor.getrgb(theme.paper))
    paper.paste(Image.fromarray(picture), (0, 0))
    ImageDraw.Draw(paper).multiline_text((_MARGIN_PX, height), text, theme.ink, font, spacing=spacing)
    return np.asarray(paper)


def _lines(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Break a text where the next word would not fit; a word that is wider has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
