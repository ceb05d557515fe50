"""Charts show the numbers of the encoder's trace."""

import sys

import numpy as np
import pytest
import torch

from aurora.model.merge import MergeConfig, Schedule
from aurora.model.vision import VisionTrace
from aurora.visualization.charts import budget_chart, chart_bytes, similarity_chart, size_bins, sizes_chart
from aurora.visualization.film import TracedRun
from aurora.visualization.merge_map import FrameTrace, trace_frames
from aurora.visualization.theme import DARK, LIGHT


@pytest.fixture(scope="module")
def runs(small_model) -> list[TracedRun]:
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    wishes = [MergeConfig(token_kept_ratio=ratio, schedule=Schedule.exact, slowfast=True) for ratio in (0.5, 0.1, 1.0)]
    return [TracedRun(f"kept {wish.token_kept_ratio}", trace_frames(small_model, pixels, wish)) for wish in wishes]


def test_sizes_fall_into_bins_that_double() -> None:
    sizes = np.array([1, 1, 2, 3, 4, 7, 8, 15, 16, 31, 64])
    tokens, patches = size_bins(sizes, 7)
    assert tokens.tolist() == [2, 2, 2, 2, 2, 0, 1]
    assert patches.tolist() == [2, 5, 11, 23, 47, 0, 64]


def test_histogram_counts_every_token_and_every_patch(runs: list[TracedRun]) -> None:
    figure = sizes_chart(runs)
    tokens, patches = figure.axes
    for run, shown, held in zip(runs, tokens.containers, patches.containers, strict=True):
        assert shown.get_label() == run.name
        # Means over three frames, the first of which is unmerged.
        assert sum(bar.get_height() for bar in shown) == pytest.approx(run.token_counts()[:, -1].mean())
        assert sum(bar.get_height() for bar in held) == pytest.approx(64)
    assert [label.get_text() for label in tokens.get_xticklabels()][:3] == ["1", "2-3", "4-7"]


def test_budget_follows_the_plan(runs: list[TracedRun], small_model) -> None:
    lines = budget_chart(runs).axes[0].lines
    merge = MergeConfig(token_kept_ratio=0.1, schedule=Schedule.exact, slowfast=True)
    plans = small_model.plan(3, 64, 64, merge)
    want = np.mean([plan.tokens for plan in plans], axis=0)
    np.testing.assert_allclose(lines[1].get_ydata(), want)
    assert list(lines[1].get_xdata()) == [0, 1, 2, 3, 4]


def test_similarity_shows_the_quantiles_of_the_merged_pairs(runs: list[TracedRun]) -> None:
    axes = similarity_chart(runs).axes[0]
    assert [line.get_label() for line in axes.lines] == ["kept 0.5", "kept 0.1"]  # the third merged nothing
    for line, run in zip(axes.lines, runs):
        medians = [
            np.median(np.concatenate([trace.similarities[layer][row].numpy() for trace, row in run.traces]))
            for layer in range(4)
        ]
        np.testing.assert_allclose(line.get_ydata(), medians, rtol=1e-6)
        assert all(-1 <= value <= 1 + 1e-6 for value in medians)


def test_a_layer_without_merges_is_left_out() -> None:
    similarities = [torch.tensor([[0.9, 0.8]]), torch.zeros(1, 0), torch.tensor([[0.5]])]
    source = torch.zeros(1, 4, dtype=torch.int64)
    trace = VisionTrace((2, 2), 0, [torch.ones(1, 1, 1)] * 3, [source] * 3, similarities)
    (line,) = similarity_chart([TracedRun("a", [FrameTrace(trace, 0)])]).axes[0].lines
    assert list(line.get_xdata()) == [1, 3]
    np.testing.assert_allclose(line.get_ydata(), [0.85, 0.5])


def test_nothing_merged_has_no_similarity(runs: list[TracedRun]) -> None:
    with pytest.raises(ValueError, match=r"figure=similarity: nothing merged.*0\.2"):
        similarity_chart(runs[2:])


def test_a_layer_that_did_not_run_is_refused(runs: list[TracedRun]) -> None:
    with pytest.raises(ValueError, match=r"layer=7: want -4 to 3"):
        sizes_chart(runs, layer=7)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_chart_gives_the_same_bytes_on_its_paper(runs: list[TracedRun], kind: str) -> None:
    first, second = (chart_bytes(budget_chart(runs), kind) for _ in range(2))
    assert first == second
    assert chart_bytes(budget_chart(runs, theme=DARK), kind) != first
    if kind == "svg":
        assert LIGHT.paper.encode() in first
        assert DARK.paper.encode() in chart_bytes(budget_chart(runs, theme=DARK), kind)


def test_without_matplotlib_the_error_names_it(runs: list[TracedRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        budget_chart(runs)
