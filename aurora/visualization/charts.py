"""Charts of merging: sizes of the groups, similarity of the merged pairs, tokens along the layers; lines and bars.

matplotlib is needed (`pip install 'aurora-captioner[eval]'`), and imported only when a chart is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aurora.visualization.film import TracedRun
from aurora.visualization.theme import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 144
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MARKED_POINTS = 40
"""A line of more points has no markers."""


def sizes_chart(runs: Sequence[TracedRun], *, layer: int = -1, theme: Theme = LIGHT) -> Figure:
    """Draw how many tokens stand for how many patches, and how many patches such tokens hold.

    Args:
        runs: Encoder runs over the same frames.
        layer: See `group_map`.
        theme: Colours.

    Returns:
        A figure with two panels; sizes are in bins that double.

    Raises:
        ValueError: if there is no such layer, or matplotlib is missing.
    """
    for run in runs:
        run.groups(0, layer)  # refuses a layer that did not run, by name
    num_frames = len(runs[0].traces)
    sizes = [run.group_sizes(layer) for run in runs]
    num_bins = max(int(size.max()) for size in sizes).bit_length()
    names = [_bin_name(number) for number in range(num_bins)]
    figure, axes = _figure(theme, 2, width=10.5)
    for panel, title in zip(axes, ("Tokens, by the patches each stands for", "Patches, by the size of their group")):
        _style(
            panel,
            theme,
            title=title,
            x="patches in the group",
            y="number in a frame, mean" if num_frames > 1 else "number",
        )
        panel.set_xticks(range(num_bins), names)
        panel.grid(visible=False, axis="x")
    width = 0.8 / len(runs)
    for index, (run, size) in enumerate(zip(runs, sizes, strict=True)):
        tokens, patches = size_bins(size, num_bins)
        x = np.arange(num_bins) + (index - (len(runs) - 1) / 2) * width
        for panel, heights in zip(axes, (tokens, patches)):
            panel.bar(x, heights / num_frames, width * 0.92, color=_colour(theme, index), label=run.name)
    _legend(axes[0], theme)
    return figure


def size_bins(sizes: NDArray[np.int64], num_bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count tokens, and the patches they stand for, by size in bins 1, 2-3, 4-7, 8-15 and so on.

    Args:
        sizes: Patches per token, (N,), each at least 1.
        num_bins: Bins; the last one must hold the largest size.

    Returns:
        Tokens and patches, (num_bins,) each.
    """
    bins = np.frexp(sizes.astype(np.float64))[1] - 1  # floor of log2, exactly
    tokens = np.bincount(bins, minlength=num_bins)
    patches = np.bincount(bins, weights=sizes, minlength=num_bins).astype(np.int64)
    return tokens, patches


def similarity_chart(runs: Sequence[TracedRun], *, theme: Theme = LIGHT) -> Figure:
    """Draw the cosine similarity of the pairs that each layer merged: median, and a band of the middle 80 %.

    Args:
        runs: Encoder runs over the same frames.
        theme: Colours.

    Returns:
        The figure.

    Raises:
        ValueError: if no layer of any run merged, or matplotlib is missing.
    """
    merging = [run for run in runs if any(run.similarities(layer).size for layer in range(run.num_layers))]
    if not merging:
        raise ValueError("figure=similarity: nothing merged at these ratios; want one that merges, such as 0.2")
    figure, (axes,) = _figure(theme, 1, width=7.2)
    _style(
        axes,
        theme,
        title="Similarity of the pairs that merge: median, and the middle 80 %",
        x="layer",
        y="cosine similarity of their keys",
    )
    for index, run in enumerate(runs):
        if run not in merging:
            continue
        found = [run.similarities(layer) for layer in range(run.num_layers)]
        layers = [layer for layer, values in enumerate(found, start=1) if values.size]
        low, middle, high = np.array([np.quantile(v, (0.1, 0.5, 0.9)) for v in found if v.size]).T
        axes.fill_between(layers, low, high, color=_colour(theme, index), alpha=0.16, linewidth=0)
        axes.plot(layers, middle, color=_colour(theme, index), marker="o", markersize=4.5, linewidth=2, label=run.name)
    _whole_numbers(axes)
    _legend(axes, theme)
    return figure


def budget_chart(runs: Sequence[TracedRun], *, theme: Theme = LIGHT) -> Figure:
    """Draw the visual tokens of a frame along the layers; several frames give their mean.

    Args:
        runs: Encoder runs over the same frames.
        theme: Colours.

    Returns:
        The figure.

    Raises:
        ValueError: if matplotlib is missing.
    """
    figure, (axes,) = _figure(theme, 1, width=7.2)
    _style(axes, theme, title="Visual tokens along the layers", x="after layer (0: patches)", y="tokens a frame")
    for index, run in enumerate(runs):
        counts = run.token_counts().mean(axis=0)
        layers = range(len(counts))
        axes.plot(layers, counts, color=_colour(theme, index), marker="o", markersize=4, linewidth=2, label=run.name)
        axes.annotate(
            f"{counts[-1]:.4g}",
            (layers[-1], counts[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=_colour(theme, index),
            fontsize=10,
        )
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    _legend(axes, theme)
    return figure


def line_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    log_ticks: Sequence[float] = (),
    chosen: tuple[float, float, str] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Draw lines that differ in colour and in marker.

    Args:
        lines: Name of each line, to its x and y values.
        title: Above the chart.
        x: What runs to the right, with its unit.
        y: What runs upwards, with its unit.
        log_ticks: Where given, x is logarithmic with these ticks.
        chosen: A point to ring, as x, y and what to write beside it.
        theme: Colours.

    Returns:
        The figure; long lines have no markers.

    Raises:
        ValueError: if matplotlib is missing.
    """
    figure, (axes,) = _figure(theme, 1, width=7.2)
    _style(axes, theme, title=title, x=x, y=y)
    for index, (name, (across, up)) in enumerate(lines.items()):
        marker = _MARKERS[index % len(_MARKERS)] if len(across) <= _MARKED_POINTS else None
        axes.plot(across, up, color=_colour(theme, index), marker=marker, markersize=5, linewidth=2, label=name)
    if log_ticks:
        axes.set_xscale("log")
        axes.set_xticks(log_ticks, [f"{tick:g}" for tick in log_ticks])
        axes.minorticks_off()
    if chosen is not None:
        point, text = chosen[:2], chosen[2]
        axes.plot(*point, marker="o", markersize=14, markerfacecolor="none", color=theme.ink, linestyle="none")
        axes.annotate(
            text,
            point,
            (0, 9),
            textcoords="offset points",
            color=theme.ink,
            fontsize=10,
            ha="center",
            va="bottom",
        )
    if len(lines) > 1:
        _legend(axes, theme)
    return figure


def bar_chart(
    labels: Sequence[str],
    bars: Mapping[str, Sequence[float]],
    *,
    title: str,
    x: str = "",
    y: str = "",
    stacked: bool = False,
    theme: Theme = LIGHT,
) -> Figure:
    """Draw bars with their numbers, side by side or on top of each other.

    Args:
        labels: What stands under each group of bars.
        bars: Name of each kind of bar, to a number for each label.
        title: Above the chart.
        x: What the labels are.
        y: What the numbers are, with their unit.
        stacked: Put the kinds on top of each other; the number is then that of the whole.
        theme: Colours.

    Returns:
        The figure.

    Raises:
        ValueError: if matplotlib is missing.
    """
    figure, (axes,) = _figure(theme, 1, width=7.2)
    _style(axes, theme, title=title, x=x, y=y)
    across = np.arange(len(labels), dtype=np.float64)
    width = 0.7 if stacked else 0.8 / len(bars)
    bottom = np.zeros(len(labels))
    for index, (name, heights) in enumerate(bars.items()):
        shift = 0.0 if stacked else (index - (len(bars) - 1) / 2) * width
        drawn = axes.bar(
            across + shift, heights, width * 0.94, bottom=bottom, color=_colour(theme, index), label=name,
            edgecolor=theme.paper, linewidth=0.8,
        )  # fmt: skip
        if stacked:
            bottom = bottom + np.asarray(heights)
        if not stacked or index == len(bars) - 1:
            numbers = [_short(value) for value in (bottom if stacked else heights)]
            axes.bar_label(drawn, numbers, padding=2, color=theme.ink, fontsize=9)
    axes.set_xticks(across, list(labels))
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    if len(bars) > 1:
        _legend(axes, theme)
    return figure


def chart_bytes(figure: Figure, kind: str) -> bytes:
    """Encode a chart.

    Args:
        figure: The chart.
        kind: png or svg.

    Returns:
        The content of the file; the same chart gives the same bytes.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    metadata: dict[str, str | None] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "aurora", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()


def _figure(theme: Theme, num_panels: int, *, width: float) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ValueError("figure: charts need matplotlib; want: pip install matplotlib") from None
    # Without pyplot, which would choose a window system and keep the figure.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(width, 4.2), facecolor=theme.paper, layout=layout)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _style(axes: Axes, theme: Theme, *, title: str, x: str, y: str) -> None:
    axes.set_facecolor(theme.paper)
    axes.set_title(title, loc="left", color=theme.ink, fontsize=12)
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)
    axes.grid(color=theme.faint, alpha=0.22, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.faint)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, labelcolor=theme.ink)


def _colour(theme: Theme, index: int) -> str:
    return theme.series[index % len(theme.series)]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _bin_name(number: int) -> str:
    low, high = 1 << number, (2 << number) - 1
    return str(low) if low == high else f"{low}-{high}"
