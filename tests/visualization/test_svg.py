"""SVG sheets show, path by path, what the pixels of PNG sheets show."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from aurora.visualization.figure import Panel, Sheet, draw_sheet, lay_out
from aurora.visualization.merge_map import merge_map
from aurora.visualization.svg import sheet_svg
from aurora.visualization.theme import DARK

SVG = "{http://www.w3.org/2000/svg}"


def _sheet(height: int, width: int, *, scale: int, **settings: object) -> Sheet:
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    groups = np.sort(random.integers(0, 9, (6, 10)), axis=1)
    return Sheet(rows=[[Panel(picture), Panel(picture, groups)]], scale=scale, **settings)  # type: ignore[arg-type]


def _rgb(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def _paint(drawing: ElementTree.Element, shape: tuple[int, int]) -> np.ndarray:
    """Fill the rectangles and lines of a merge map, as a browser would."""
    canvas = np.zeros((*shape, 3), dtype=np.uint8)
    fills, lines = drawing.findall(f"{SVG}g")
    for path in fills.findall(f"{SVG}path"):
        rectangles = re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z", path.get("d", ""))
        assert sum(map(len, map("M{} {}h{}v{}h-{}z".format, *zip(*rectangles)))) == len(path.get("d", ""))
        for x, y, width, height, back in (map(int, rectangle) for rectangle in rectangles):
            assert back == width
            canvas[y : y + height, x : x + width] = _rgb(path.get("fill", ""))
    half = float(lines.get("stroke-width", "")) / 2
    for path in lines.findall(f"{SVG}path"):
        for x, y, way, end in re.findall(r"M([\d.]+) ([\d.]+)([HV])(\d+)", path.get("d", "")):
            x0, y0 = float(x), float(y)
            box = (y0 - half, y0 + half, x0, int(end)) if way == "H" else (y0, int(end), x0 - half, x0 + half)
            top, bottom, left, right = (int(edge) for edge in box)
            canvas[top:bottom, left:right] = _rgb(path.get("stroke", ""))
    return canvas


@pytest.mark.parametrize("size", [(48, 80), (50, 83)], ids=str)
@pytest.mark.parametrize("borders", [True, False], ids=["outlines", "plain"])
def test_paths_paint_the_same_pixels_as_the_merge_map(size: tuple[int, int], borders: bool) -> None:
    sheet = _sheet(*size, scale=6, borders=borders)
    drawing = ElementTree.fromstring(sheet_svg(sheet)).find(f"{SVG}g")
    assert drawing is not None
    picture, groups = sheet.rows[0][1]
    assert groups is not None
    want = merge_map(picture, groups, scale=6, borders=borders)
    assert np.array_equal(_paint(drawing, want.shape[:2]), want)


def test_every_group_is_one_path_with_its_size() -> None:
    sheet = _sheet(48, 80, scale=1)
    paths = ElementTree.fromstring(sheet_svg(sheet)).findall(f".//{SVG}path[@class='group']")
    groups = sheet.rows[0][1].groups
    assert [int(path.get("data-patches", "")) for path in paths] == np.unique(groups, return_counts=True)[1].tolist()


def test_layout_and_texts_are_those_of_the_pixels() -> None:
    sheet = _sheet(48, 80, scale=2, labels=[["a & b", "<two>\nlines"]], row_labels=["row"], title="Title")
    root = ElementTree.fromstring(sheet_svg(sheet, DARK))
    height, width, _ = draw_sheet(sheet).shape
    assert (root.get("width"), root.get("height")) == (str(width), str(height))
    shown = ["\n".join(span.text or "" for span in text) for text in root.findall(f"{SVG}text")]
    assert shown == [text.text for text in lay_out(sheet).texts] == ["Title", "row", "a & b", "<two>\nlines"]
    assert {text.get("fill") for text in root.findall(f"{SVG}text")} == {DARK.ink}
    for text in root.iter(f"{SVG}tspan"):  # inside, and above the panels
        assert 0 < float(text.get("y", "")) < height
    image = root.find(f"{SVG}image")
    assert image is not None
    assert image.get("href", "").startswith("data:image/png;base64,")


def test_dark_paper_is_dark() -> None:
    sheet = _sheet(48, 80, scale=1)
    assert tuple(draw_sheet(sheet, DARK)[0, 0]) == tuple(_rgb(DARK.paper))
    assert f'fill="{DARK.paper}"' in sheet_svg(sheet, DARK)
