"""Figures of notebooks carry their caption, in the picture and as text."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aurora.visualization.charts import bar_chart, line_chart
from aurora.visualization.figure import picture_grid
from aurora.visualization.notebook import captioned
from aurora.visualization.theme import DARK, LIGHT

CAPTION = "One black square and one grey one, which is a long enough caption to need a second line in this picture."


def grid() -> np.ndarray:
    return picture_grid([[np.full((64, 64, 3), value, dtype=np.uint8) for value in (0, 128)]], title="Two squares")


def test_the_caption_stands_below_the_picture_which_does_not_change() -> None:
    picture = grid()
    shown = captioned(picture, CAPTION)
    height, width, _ = picture.shape
    assert shown.picture.shape[1] == shown.width_px == width
    np.testing.assert_array_equal(shown.picture[:height], picture)
    foot = shown.picture[height:]
    assert foot.min() < 80  # ink
    assert (foot[:, : 16 - 2] == 255).all()  # within the margins
    assert (foot[:, -14:] == 255).all()
    assert (foot[-10:] == 255).all()
    assert len(foot) > len(captioned(picture, "Short.").picture) - height  # more lines, more room


def test_jupyter_gets_a_png_and_the_caption_as_text() -> None:
    shown = captioned(grid(), CAPTION)
    data, metadata = shown._repr_mimebundle_()
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as image:
        np.testing.assert_array_equal(np.asarray(image), shown.picture)
    assert data["text/plain"] == CAPTION
    assert metadata == {"image/png": {"width": shown.width_px, "alt": CAPTION}}


def test_it_can_be_saved(tmp_path: Path) -> None:
    shown = captioned(grid(), CAPTION)
    with Image.open(shown.save(tmp_path / "figure.png")) as image:
        np.testing.assert_array_equal(np.asarray(image), shown.picture)


def test_a_chart_may_hold_its_caption_itself() -> None:
    chart = bar_chart(["a"], {"x": [1.0]}, title="One")
    before = captioned(chart, "Drawn below.")
    chart.supxlabel("Mean of\none thing.")
    shown = captioned(chart)
    assert shown.caption == "Mean of one thing."
    assert shown.width_px == before.width_px < shown.picture.shape[1]  # sharper than it is shown
    assert captioned(chart, "Drawn below.", theme=DARK).picture[-1, -1].tolist() == [13, 17, 23]


@pytest.mark.parametrize("caption", [None, "", "  "])
def test_a_figure_without_caption_is_refused(caption: str | None) -> None:
    with pytest.raises(ValueError, match="caption"):
        captioned(grid(), caption)
    with pytest.raises(ValueError, match="caption"):
        captioned(line_chart({"a": ([1], [2])}, title="t", x="x", y="y"), caption)


def test_lines_have_their_numbers_their_own_colour_and_marker() -> None:
    lines = {"first": ([1, 10, 100], [3, 2, 1]), "second": ([1, 10], [5, 5]), "long": (range(99), range(99))}
    axes = line_chart(lines, title="t", x="x", y="y", log_ticks=(1, 10, 100), chosen=(10, 2, "this")).axes[0]
    *drawn, ring = axes.lines
    for (name, (x, y)), line in zip(lines.items(), drawn, strict=True):
        assert line.get_label() == name
        assert list(line.get_xdata()) == list(x)
        assert list(line.get_ydata()) == list(y)
    assert [line.get_color() for line in drawn] == list(LIGHT.series[:3])
    assert [line.get_marker() for line in drawn] == ["o", "s", "None"]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([10], [2])
    assert [text.get_text() for text in axes.texts] == ["this"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10", "100"]


@pytest.mark.parametrize("stacked", [False, True])
def test_bars_have_their_numbers(stacked: bool) -> None:
    bars = {"low": [0.0808, 20.0], "high": [2.5, 1234.0]}
    axes = bar_chart(["a", "b"], bars, title="t", stacked=stacked).axes[0]
    for (name, heights), container in zip(bars.items(), axes.containers, strict=True):
        assert container.get_label() == name
        assert [bar.get_height() for bar in container] == heights
    written = [text.get_text() for text in axes.texts]
    assert written == (["2.58", "1254"] if stacked else ["0.081", "20", "2.5", "1234"])
    assert [bar.get_y() for bar in axes.containers[1]] == ([0.0808, 20.0] if stacked else [0, 0])
