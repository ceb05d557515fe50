"""The figures of a sweep: the paper's numbers as they are, ours where they belong, nothing on top of each other."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aurora.visualization.curves import (
    draw_sweep,
    paper_curve,
    paper_figures,
    ratio_figure,
    time_figure,
    tokens_figure,
)
from aurora.visualization.theme import DARK, LIGHT

RATIOS = (1.0, 0.3, 0.1, 0.03)
FIGURES = (ratio_figure, tokens_figure, time_figure)


def a_record():
    def point(variant, ratio, quality):
        return {
            "variant": variant, "ratio": ratio, "visual_tokens": 1000 * ratio, "tokens_per_frame": 125 * ratio,
            "share_delivered": ratio, "accuracy": {"value": quality, "low": quality - 0.02, "high": quality + 0.02},
            "tasks_of_unmerged": [quality - 0.1, quality, quality + 0.1],
            "seconds": {"encode": 0.1 * ratio, "prefill": 0.2 * ratio, "decode": 0.1}, "kv_mib": 6 * ratio,
        }  # fmt: skip

    points = [point("exact", ratio, quality) for ratio, quality in zip(RATIOS, (1.0, 0.98, 0.9, 0.6))]
    points += [point(name, 0.1, 0.8) for name in ("merging_after_encoder", "uniform_drop", "random_drop")]
    return {
        "model": "toy", "num_clips": 6, "num_frames": 8, "num_patches": 125, "points": points,
        "settings": {"dtype": "float32"}, "environment": {"device": "cpu", "processes": "2"},
    }  # fmt: skip


def lines(axes):
    return {line.get_label(): np.array(line.get_xydata()) for line in axes.get_lines()}


def visible_texts(figure):
    found = list(figure.texts)  # the caption
    for axes in figure.axes:
        found += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        found += [title for title in axes.get_children() if title.__class__.__name__ == "Text" and title not in found]
        found += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_text() and text.get_visible()]


def test_the_papers_curve_is_what_was_published():
    figures = paper_figures()
    curve = paper_curve()
    assert curve.of_unmerged.shape == (17, 12)
    assert curve.of_unmerged[:, -1] == pytest.approx(np.ones(17))
    gqa = figures["auroracap_7b_by_ratio"]["GQA"]
    assert any(np.allclose(row, np.array(gqa) / gqa[-1]) for row in curve.of_unmerged)
    flickr = [
        np.array(values) / values[-1] for name, values in figures["auroracap_7b_by_ratio"].items() if "flickr" in name
    ]
    assert len(flickr) == 5
    assert any(np.allclose(row, np.mean(flickr, axis=0)) for row in curve.of_unmerged)


def test_the_papers_ratios_stand_at_the_tokens_they_deliver():
    """378 px, 32 layers of which 31 run: 388, 171 and 109 of 729 at 0.5, 0.2 and 0.1 (DESIGN, section 3)."""
    delivered = dict(zip(paper_figures()["token_kept_ratio"], paper_curve().share_delivered, strict=True))
    assert {ratio: round(729 * delivered[ratio]) for ratio in (0.01, 0.1, 0.2, 0.5, 1.0)} == {
        0.01: 47, 0.1: 109, 0.2: 171, 0.5: 388, 1.0: 729}  # fmt: skip


def test_both_curves_are_in_the_ratio_figure_with_their_bands():
    (axes,) = ratio_figure(a_record()).axes
    drawn = lines(axes)
    ours = drawn["toy, 3 kinds of caption"]
    assert ours[:, 0] == pytest.approx([3, 10, 30, 100])
    assert ours[:, 1] == pytest.approx([60, 90, 98, 100])
    paper = drawn["AuroraCap-7B, 17 tasks"]
    assert paper[:, 1] == pytest.approx(100 * paper_curve().of_unmerged.mean(axis=0))
    assert len(axes.collections) == 2
    low, high = axes.collections[1].get_paths()[0].get_extents().get_points()[:, 1]
    spread = 100 * np.std([-0.1, 0, 0.1])
    assert (low, high) == pytest.approx((60 - spread, 100 + spread))


def test_every_model_of_the_paper_is_in_the_tokens_figure():
    left, right = tokens_figure(a_record()).axes
    published = paper_figures()["vdcscore_by_visual_tokens"]
    named = {text.get_text() for text in left.texts}
    assert named == {name for name in published if name != "Gemini-1,5-Pro"} | {"Gemini 1.5 Pro"}
    drawn = [line.get_xydata().tolist() for line in left.get_lines()]
    for entry in published.values():
        if entry["visual_tokens"]:
            assert [list(pair) for pair in zip(entry["visual_tokens"], entry["vdcscore"])] in drawn
    assert set(lines(right)) == {"merging in the encoder", "merging after the encoder", "uniform drop", "random drop"}
    assert lines(right)["uniform drop"].tolist() == [[100, 80]]
    ticks = {label.get_text() for label in right.get_xticklabels()}
    assert {"50\n0.3", "500\n3"} <= ticks  # 6 KiB a token


def test_the_time_figure_adds_up_the_phases():
    left, right = time_figure(a_record()).axes
    assert lines(left)["merging in the encoder"][:, 0] == pytest.approx([0.109, 0.13, 0.19, 0.4])
    tops = [max(bar.get_y() + bar.get_height() for bar in bars) for bars in zip(*right.containers, strict=True)]
    assert tops == pytest.approx([0.109, 0.13, 0.19, 0.4])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("draw", FIGURES)
def test_no_text_is_cut_off_or_on_top_of_another(draw, theme):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(a_record(), theme)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = visible_texts(figure)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    width, height = canvas.get_width_height()
    for name, box in boxes:
        assert box.x0 >= -1, name
        assert box.y0 >= -1, name
        assert box.x1 <= width + 1, name
        assert box.y1 <= height + 1, name
    for index, (name, box) in enumerate(boxes):
        for other, second in boxes[index + 1 :]:
            assert name == other or not box.shrunk(0.98, 0.9).overlaps(second.shrunk(0.98, 0.9)), (
                f"{name!r} on {other!r}"
            )


def test_files_are_written_for_light_and_dark_pages(tmp_path: Path):
    paths = draw_sweep(a_record(), tmp_path / "figures")
    assert [path.name for path in paths] == [
        f"quality_by_{name}{suffix}.png" for name in ("ratio", "tokens", "time") for suffix in ("", "_dark")
    ]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {path.name for path in paths}
    for path in paths:
        picture = np.asarray(Image.open(path).convert("RGB"))
        corner = "#{:02x}{:02x}{:02x}".format(*picture[0, 0])
        assert corner == (DARK if "dark" in path.name else LIGHT).paper
        assert picture.shape[1] > 1000


def test_the_numbers_in_the_package_are_the_published_ones():
    figures = paper_figures()
    assert figures["token_kept_ratio"] == [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert all(len(values) == 12 for values in figures["auroracap_7b_by_ratio"].values())
    assert figures["auroracap_7b_by_ratio"]["VDC_Detailed_acc"][4] == 40.807
    assert json.dumps(figures)
