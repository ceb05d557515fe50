"""Curves of a sweep beside those of the AuroraCap paper: quality against kept tokens, models, and time.

Each figure is written for light and for dark pages, with its caption in it. Colours are those of Okabe and Ito, which
colour-blind readers tell apart; lines differ in their markers, too. matplotlib is needed (`[eval]`).
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from aurora.model.merge import MergeConfig, plan_merge
from aurora.model.vision import VisionConfig, num_active_layers
from aurora.visualization.figure import save_picture
from aurora.visualization.merge_map import Picture
from aurora.visualization.theme import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160
_LABELLED_RATIOS = (1.0, 0.7, 0.5, 0.3, 0.1, 0.06, 0.04, 0.03, 0.02)
_CAPTION_WIDTH = 118
"""Characters of a caption's line."""


_MARKERS = ("s", "^", "D", "v", "P", "X")


class PaperCurve(NamedTuple):
    """What the paper measured over its kept ratios."""

    share_delivered: list[float]
    """Share of visual tokens that the published rule really keeps."""
    of_unmerged: np.ndarray[Any, np.dtype[np.float64]]
    """Performance divided by the unmerged one, (tasks, ratios)."""


def paper_figures() -> dict[str, Any]:
    """The numbers behind the paper's figures, as its authors published them with their plotting notebook."""
    text = (resources.files("aurora") / "assets" / "paper" / "figures.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def paper_curve() -> PaperCurve:
    """AuroraCap-7B's performance by kept ratio, relative to its own without merging.

    A task with several metrics counts once, with their mean; LLM-judged scores are left out, as three of their five
    columns are copies of each other. The published rule delivers more than the ratio asked for: 0.01 keeps 6.4 % of
    the tokens of a frame.

    Returns:
        17 tasks at 12 ratios, from the lowest on.
    """
    figures = paper_figures()
    ratios = figures["token_kept_ratio"]
    tasks: dict[str, list[list[float]]] = {}
    for name, values in figures["auroracap_7b_by_ratio"].items():
        task, _, metric = name.rpartition("_")
        if metric != "score":
            tasks.setdefault(task or name, []).append([value / values[-1] for value in values])
    vision = VisionConfig()
    shares = []
    for ratio in ratios:
        plan = plan_merge(
            MergeConfig(token_kept_ratio=ratio),
            height_px=vision.image_size,
            width_px=vision.image_size,
            vision=vision,
            num_active_layers=num_active_layers(vision, -2),
        )
        shares.append(plan.num_visual_tokens / plan.num_patches)
    return PaperCurve(shares, np.array([np.mean(metrics, axis=0) for metrics in tasks.values()]))


def draw_sweep(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every figure of a sweep.

    Args:
        record: Content of the sweep's report.json.
        folder: Where the PNG files go; made if absent.

    Returns:
        The files written: three figures, each for light and dark pages.

    Raises:
        OSError: if a file cannot be written.
    """
    drawings: dict[str, Callable[[Mapping[str, Any], Theme], Figure]] = {
        "quality_by_ratio": ratio_figure,
        "quality_by_tokens": tokens_figure,
        "quality_by_time": time_figure,
    }
    paths = []
    for name, draw in drawings.items():
        for suffix, theme in (("", LIGHT), ("_dark", DARK)):
            paths.append(save_picture(_to_picture(draw(record, theme)), folder / f"{name}{suffix}.png"))
    return paths


def ratio_figure(record: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Quality relative to no merging against the share of tokens kept, ours over the paper's.

    Args:
        record: Content of report.json.
        theme: Colours.

    Returns:
        The figure.
    """
    figure, (axes,) = _figure(theme, 1, height=4.6)
    paper = paper_curve()
    curve = sorted(_of(record, "exact"), key=lambda point: point["ratio"])
    ours = np.array([point["tasks_of_unmerged"] for point in curve]).T  # (tasks, ratios)
    name = record["model"]
    for shares, values, colour, marker, label in (
        (
            paper.share_delivered,
            paper.of_unmerged,
            theme.series[1],
            "s",
            f"AuroraCap-7B, {len(paper.of_unmerged)} tasks",
        ),
        ([p["share_delivered"] for p in curve], ours, theme.series[0], "o", f"{name}, {len(ours)} kinds of caption"),
    ):
        x, mean, spread = 100 * np.array(shares), 100 * values.mean(axis=0), 100 * values.std(axis=0)
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.16, linewidth=0)
        axes.plot(x, mean, color=colour, marker=marker, markersize=5.5, linewidth=2, label=label)
    axes.axhline(95, color=theme.faint, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(101, 94.2, "95 %", color=theme.faint, fontsize=9, ha="right", va="top")
    _log_axis(axes, (2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100))
    axes.set_xlabel("visual tokens kept, % of all patches")
    axes.set_ylabel("% of the performance without merging")
    axes.legend(loc="lower right", frameon=False, labelcolor=theme.ink)
    axes.set_title("How much quality is left when tokens merge", loc="left", color=theme.ink, fontsize=12)
    return _caption(
        figure,
        f"Mean over tasks; bands are one standard deviation between tasks. {name}: {record['num_clips']} TinyWorld "
        f"clips, {record['num_patches']} patches a frame, merge.schedule=exact. AuroraCap-7B: figures of the paper "
        "(arXiv 2410.03051), placed at the share of tokens that the published rule delivers, which is more than the "
        "ratio asked for.",
        theme,
    )


def tokens_figure(record: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Quality against visual tokens: the models of the paper, and ways to have fewer tokens with our model.

    Args:
        record: Content of report.json.
        theme: Colours.

    Returns:
        The figure.
    """
    figure, (left, right) = _figure(theme, 2, height=5.2)
    _published_models(left, theme)
    curve = sorted(_of(record, "exact"), key=lambda point: point["visual_tokens"])
    baselines = [name for name in BASELINE_LABELS if _of(record, name)]
    for name, colour, marker in zip(baselines, [*theme.series[1:], theme.faint], _MARKERS):
        points = sorted(_of(record, name), key=lambda point: point["visual_tokens"])
        right.plot(
            [point["visual_tokens"] for point in points],
            [100 * point["accuracy"]["value"] for point in points],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            label=BASELINE_LABELS[name],
        )
    x = [point["visual_tokens"] for point in curve]
    right.fill_between(
        x,
        [100 * point["accuracy"]["low"] for point in curve],
        [100 * point["accuracy"]["high"] for point in curve],
        color=theme.series[0],
        alpha=0.18,
        linewidth=0,
    )
    right.plot(
        x,
        [100 * point["accuracy"]["value"] for point in curve],
        color=theme.series[0],
        marker="o",
        markersize=5.5,
        linewidth=2.2,
        label="merging in the encoder",
    )
    ticks = [tick for tick in (25, 50, 100, 200, 500, 1000, 2000, 5000) if x[0] * 0.9 < tick < x[-1] * 1.1]
    mib_per_token = curve[-1]["kv_mib"] / curve[-1]["visual_tokens"]
    _log_axis(right, ticks)
    right.set_xticks(ticks, [f"{tick:g}\n{tick * mib_per_token:.2g}" for tick in ticks])
    right.set_xlabel("visual tokens of a clip, and MiB of memory that they take")
    right.set_ylabel("facts right, %")
    handles, labels = right.get_legend_handles_labels()
    right.legend(
        [handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]], loc="lower right", frameon=False,
        labelcolor=theme.ink, fontsize=8.5,
    )  # fmt: skip
    right.set_title(f"{record['model']} on TinyVDC", loc="left", color=theme.ink, fontsize=12)
    return _caption(
        figure,
        "Left: VDCscore (accuracy) of the models in the paper (arXiv 2410.03051); AuroraCap-7B at kept ratios from "
        f"0.01 on. Right: ours, another benchmark ({record['num_clips']} TinyWorld clips; band: 95 % interval over "
        "clips); all at the same token counts, on a model that was trained with merging in its encoder. Memory: keys "
        "and values in the language model.",
        theme,
    )


BASELINE_LABELS = {
    "merging_after_encoder": "merging after the encoder",
    "mean_attention": "pruning by mean attention",
    "class_attention": "pruning by class attention",
    "average_pooling": "average pooling",
    "uniform_drop": "uniform drop",
    "random_drop": "random drop",
}
"""Baselines with a line in the figures."""


def time_figure(record: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Quality against time, and where the time goes.

    Args:
        record: Content of report.json.
        theme: Colours.

    Returns:
        The figure.
    """
    figure, (left, right) = _figure(theme, 2, height=4.6)
    curve = sorted(_of(record, "exact"), key=lambda point: point["ratio"])
    total = [sum(point["seconds"].values()) for point in curve]
    quality = [100 * point["accuracy"]["value"] for point in curve]
    left.plot(
        total, quality, color=theme.series[0], marker="o", markersize=5.5, linewidth=2, label="merging in the encoder"
    )
    after = sorted(_of(record, "merging_after_encoder"), key=lambda point: point["ratio"])
    if after:
        left.plot(
            [sum(point["seconds"].values()) for point in after],
            [100 * point["accuracy"]["value"] for point in after],
            color=theme.series[1],
            marker="s",
            markersize=5,
            linewidth=1.2,
            label="merging after the encoder",
        )
        left.legend(loc="lower right", frameon=False, labelcolor=theme.ink)
    for point, x, y in zip(curve, total, quality, strict=True):
        if point["ratio"] in _LABELLED_RATIOS:
            above = point["ratio"] >= 0.1  # where the curve is flat
            left.annotate(
                f"{point['ratio']:g}", (x, y), (0, 7) if above else (-8, 0), textcoords="offset points",
                color=theme.ink, fontsize=8.5, ha="center" if above else "right", va="bottom" if above else "center",
            )  # fmt: skip
    left.margins(y=0.12)
    left.set_xlim(0, max(total) * 1.12)
    left.set_xlabel("seconds a clip, five captions")
    left.set_ylabel("facts right, %")
    left.set_title("Quality by time, with kept ratios", loc="left", color=theme.ink, fontsize=12)

    positions = np.arange(len(curve))
    bottom = np.zeros(len(curve))
    for phase, colour in zip(
        ("encode", "prefill", "decode"), (theme.series[0], theme.series[1], theme.series[2]), strict=True
    ):
        height = np.array([point["seconds"][phase] for point in curve])
        right.bar(
            positions, height, 0.72, bottom=bottom, color=colour, label=phase, edgecolor=theme.paper, linewidth=0.8
        )
        bottom += height
    right.grid(visible=False, axis="x")
    right.set_xticks(positions, [f"{point['ratio']:g}" for point in curve])
    right.set_xlabel("kept ratio")
    right.set_ylabel("seconds a clip, five captions")
    right.legend(loc="upper left", frameon=False, labelcolor=theme.ink)
    right.set_title("Where the time goes", loc="left", color=theme.ink, fontsize=12)
    environment = record["environment"]
    return _caption(
        figure,
        f"{record['model']}, {record['num_frames']} frames a clip, merge.schedule=exact; "
        f"{environment.get('device', '?')}, processes at once: {environment.get('processes', '?')}, "
        f"{record['settings'].get('dtype', '?')}. The five captions of a clip share its encoding and its prefill.",
        theme,
    )


# Where the label of each published model stands: beside which of its points, offset in points, and alignment.
_MODEL_LABELS: dict[str, tuple[int, float, float, str]] = {
    "AuroraCap-7B": (1, 8, 12, "right"),
    "InternVL-2-8B": (-1, 6, 6, "left"),
    "LLaVA-OV-7B": (-1, 6, -4, "left"),
    "ShareGPT4Video-8B": (-1, 17, 0, "left"),
    "LLaVA-Next-V7B": (0, 8, -2, "left"),
    "LongVA-7B": (-1, -6, 4, "right"),
    "Video-LLaVA-7B": (-1, 62, -34, "left"),
    "VILA-7B": (0, -6, 0, "right"),
    "Video-ChatGPT-7B": (0, 8, -2, "left"),
    "MovieChat-7B": (-1, 4, 9, "right"),
    "LLaMA-VID-7B": (0, 8, 0, "left"),
}
_LEADER_POINTS = 20
"""A label further away gets a line to its point."""


def _published_models(axes: Axes, theme: Theme) -> None:
    """VDCscore against visual tokens, as in the paper; ours is the bold one."""
    figures = paper_figures()
    axes.axhline(figures["gemini_1_5_pro_vdcscore"], color=theme.faint, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(
        32, figures["gemini_1_5_pro_vdcscore"] + 0.2, "Gemini 1.5 Pro", color=theme.faint, fontsize=8.5, va="bottom"
    )
    colours = [*theme.series[2:], theme.faint]
    shown = [(name, entry) for name, entry in figures["vdcscore_by_visual_tokens"].items() if entry["visual_tokens"]]
    for index, (name, entry) in enumerate(shown):
        bold = name == "AuroraCap-7B"
        colour = theme.series[1] if bold else colours[index % len(colours)]
        axes.plot(
            entry["visual_tokens"],
            entry["vdcscore"],
            color=colour,
            marker="o" if bold else _MARKERS[index % len(_MARKERS)],
            markersize=5.5 if bold else 4.5,
            linewidth=2.2 if bold else 1.2,
            zorder=3 if bold else 2,
        )
        at, dx, dy, align = _MODEL_LABELS.get(name, (-1, 6, 0, "left"))
        axes.annotate(
            name, (entry["visual_tokens"][at], entry["vdcscore"][at]), (dx, dy), textcoords="offset points",
            color=colour, fontsize=8.5, ha=align, va="center", fontweight="bold" if bold else "normal", zorder=4,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7} if abs(dx) > _LEADER_POINTS else None,
        )  # fmt: skip
    _log_axis(axes, (50, 100, 200, 500, 1000, 2000, 5000, 10000))
    axes.set_xlim(28, 60000)
    axes.set_ylim(24, 43.5)
    axes.set_xlabel("visual tokens of a clip")
    axes.set_ylabel("VDCscore, %")
    axes.set_title("Published models on VDC", loc="left", color=theme.ink, fontsize=12)


def _of(record: Mapping[str, Any], variant: str) -> list[Mapping[str, Any]]:
    return [point for point in record["points"] if point["variant"] == variant]


def _figure(theme: Theme, columns: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """An empty figure with axes side by side, in a theme's colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6 if columns == 1 else 11.4, height), facecolor=theme.paper, layout="constrained")
    panels = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in panels:
        axes.set_facecolor(theme.paper)
        axes.grid(color=theme.faint, alpha=0.25, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.ink, labelsize=9)
        axes.xaxis.label.set_color(theme.ink)
        axes.yaxis.label.set_color(theme.ink)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
    return figure, panels


def _log_axis(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _caption(figure: Figure, text: str, theme: Theme) -> Figure:
    width = _CAPTION_WIDTH if figure.get_figwidth() < 9 else round(_CAPTION_WIDTH * 1.55)
    figure.supxlabel(
        "\n".join(textwrap.wrap(text, width)), x=0.01, ha="left", fontsize=8.5, color=theme.ink, linespacing=1.35
    )
    return figure


def _to_picture(figure: Figure) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))
