"""Sheets of merge maps as SVG: every group one path, sharp at any size; pictures embedded, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape

import numpy as np
from numpy.typing import NDArray

from aurora.visualization.figure import Layout, Panel, Sheet, Text, lay_out, png_bytes
from aurora.visualization.merge_map import group_colours, palette
from aurora.visualization.theme import LIGHT, Theme

_LINE_HEIGHT = 1.2
_FONT = "Aileron, 'Helvetica Neue', Arial, sans-serif"


def sheet_svg(sheet: Sheet, theme: Theme = LIGHT) -> str:
    """Draw a sheet as SVG.

    Args:
        sheet: What to draw.
        theme: Colours of paper and text.

    Returns:
        The text of an SVG file, of the size and layout that `draw_sheet` gives in pixels. Each group of a merge map is
        a `<path class="group">` whose `data-patches` says how many patches it has.
    """
    layout = lay_out(sheet)
    body = [f'<rect width="100%" height="100%" fill="{theme.paper}"/>']
    for row, corners in zip(sheet.rows, layout.corners, strict=True):
        for panel, corner in zip(row, corners, strict=True):
            body.append(_picture(panel, corner, sheet) if panel.groups is None else _map(panel, corner, sheet))
    body += [_text(text, theme) for text in layout.texts]
    return "\n".join([_head(layout), *body, "</svg>", ""])


def _head(layout: Layout) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{layout.width}" height="{layout.height}" '
        f'viewBox="0 0 {layout.width} {layout.height}" font-family="{_FONT}">'
    )


def _picture(panel: Panel, corner: tuple[int, int], sheet: Sheet) -> str:
    width, height = sheet.panel_px
    data = base64.b64encode(png_bytes(panel.picture)).decode()
    return (
        f'<image x="{corner[0]}" y="{corner[1]}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
    )


def _map(panel: Panel, corner: tuple[int, int], sheet: Sheet) -> str:
    assert panel.groups is not None
    names, compact = np.unique(panel.groups, return_inverse=True)
    groups: NDArray[np.int64] = compact.reshape(panel.groups.shape)
    colours = np.rint(group_colours(panel.picture, groups)).astype(int)
    outlines, sizes = palette(len(names)), np.bincount(groups.ravel())
    height, width, _ = panel.picture.shape
    # A pixel belongs to the patch that `merge_map` gives it: patches need not divide a picture evenly.
    rows, columns = groups.shape
    xs, ys = _edges(columns, width) * sheet.scale, _edges(rows, height) * sheet.scale
    stroke = max(1, sheet.scale // 3)
    fills, lines = _fills(groups, xs, ys), _outlines(groups, xs, ys, stroke / 2)
    drawn = [f'<g transform="translate({corner[0]} {corner[1]})">', '<g shape-rendering="crispEdges">']
    for group, path in fills.items():
        drawn.append(
            f'<path class="group" data-patches="{sizes[group]}" fill="{_hex(colours[group])}" d="{"".join(path)}"/>'
        )
    drawn.append(f'</g><g fill="none" stroke-width="{stroke}">')
    for group, path in lines.items() if sheet.borders else ():
        if sizes[group] > 1:
            drawn.append(f'<path stroke="{_hex(outlines[group])}" d="{"".join(path)}"/>')
    return "\n".join([*drawn, "</g></g>"])


def _edges(count: int, side: int) -> NDArray[np.int64]:
    """First pixel of each patch along a side, and the side itself."""
    return -(-np.arange(count + 1) * side // count)


def _fills(groups: NDArray[np.int64], xs: NDArray[np.int64], ys: NDArray[np.int64]) -> dict[int, list[str]]:
    """Rectangles of each group, one for each run of its patches along a row."""
    paths: dict[int, list[str]] = {group: [] for group in range(groups.max() + 1)}
    for row, start, end, group in _runs(groups, np.ones(groups.shape, dtype=np.bool_)):
        width, height = xs[end] - xs[start], ys[row + 1] - ys[row]
        paths[group].append(f"M{xs[start]} {ys[row]}h{width}v{height}h-{width}z")
    return paths


def _outlines(
    groups: NDArray[np.int64], xs: NDArray[np.int64], ys: NDArray[np.int64], inset: float
) -> dict[int, list[str]]:
    """Lines just inside the edge of each group, so that both neighbours show their colour."""
    paths: dict[int, list[str]] = {group: [] for group in range(groups.max() + 1)}
    padded = np.pad(groups, 1, constant_values=-1)
    for step, side in ((0, 0), (2, 1)):  # the patch before, and the one after
        for row, start, end, group in _runs(groups, padded[step : step + len(groups), 1:-1] != groups):
            y = ys[row + side] + (inset if side == 0 else -inset)
            paths[group].append(f"M{xs[start]} {y:g}H{xs[end]}")
        across = (padded[1:-1, step : step + groups.shape[1]] != groups).T
        for column, start, end, group in _runs(groups.T, across):
            x = xs[column + side] + (inset if side == 0 else -inset)
            paths[group].append(f"M{x:g} {ys[start]}V{ys[end]}")
    return paths


def _runs(groups: NDArray[np.int64], wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int, int, int]]:
    """Row, first column, column behind the last, and group of each run of wanted patches of one group."""
    joined = np.zeros(groups.shape, dtype=np.bool_)
    joined[:, 1:] = (groups[:, 1:] == groups[:, :-1]) & wanted[:, 1:] & wanted[:, :-1]
    starts = np.argwhere(wanted & ~joined)
    last = wanted.copy()
    last[:, :-1] &= ~joined[:, 1:]
    ends = np.argwhere(last)[:, 1] + 1  # in the order of the starts, as runs of a row do not overlap
    for (row, start), end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield row, start, end, int(groups[row, start])


def _text(text: Text, theme: Theme) -> str:
    lines = text.text.split("\n")
    step = text.size_px * _LINE_HEIGHT
    # From the baseline of the first line: letters reach about 0.75 of their size above it and 0.25 below.
    above = {"a": 0.75 * text.size_px, "m": 0.27 * text.size_px - step * (len(lines) - 1) / 2,
             "d": -0.25 * text.size_px - step * (len(lines) - 1)}[text.anchor[1]]  # fmt: skip
    spans = "".join(
        f'<tspan x="{text.x}" y="{text.y + above + step * number:g}">{escape(line)}</tspan>'
        for number, line in enumerate(lines)
    )
    anchor = "middle" if text.anchor[0] == "m" else "start"
    return f'<text font-size="{text.size_px}" fill="{theme.ink}" text-anchor="{anchor}">{spans}</text>'


def _hex(colour: NDArray[np.int_] | NDArray[np.uint8]) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in colour)
