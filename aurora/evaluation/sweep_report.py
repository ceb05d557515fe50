"""What a sweep found: cells gathered into points with intervals, the paper's claim checked, and tables in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aurora.evaluation.baselines import BASELINES
from aurora.evaluation.tables import table
from aurora.evaluation.variants import EQUAL_COUNT, MEANINGS, REFERENCE, UNMERGED

CLAIM_RATIO, CLAIM_SHARE = 0.3, 0.95
"""The paper's claim: performance keeps above 95 % of the unmerged down to this kept ratio."""

PHASES = ("encode", "prefill", "decode")

Hits = NDArray[np.float64]


def to_record(cells: Sequence[Mapping[str, Any]], *, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the seeds of each variant and ratio.

    Intervals are 95 %, by bootstrap over clips; those of a share and of a difference resample both sides together,
    as both captioned the same clips.

    Args:
        cells: Rows of cells.jsonl, every variant and ratio with the same seeds, the unmerged one among them.
        model: Name of the checkpoint.
        settings: What the captions depend on.

    Returns:
        What report.json holds; scores are in [0, 1].
    """
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["variant"], cell["ratio"]), []).append(cell)
    whole = _clip_scores(groups[REFERENCE, UNMERGED])
    whole_by_category = np.concatenate([row["scores"] for row in groups[REFERENCE, UNMERGED]]).mean(axis=0)
    picks = np.random.default_rng(0).integers(0, len(whole), (2000, len(whole)))
    points = []
    for (variant, ratio), rows in groups.items():
        scores = np.concatenate([row["scores"] for row in rows])  # (clips, categories)
        per_clip = scores.mean(axis=1)
        against = _clip_scores(groups[REFERENCE, ratio])
        points.append(
            {
                "variant": variant,
                "ratio": ratio,
                "tokens_per_frame": _mean(rows, "visual_tokens") / rows[0]["num_frames"],
                "visual_tokens": _mean(rows, "visual_tokens"),
                "share_delivered": _mean(rows, "visual_tokens") / rows[0]["num_frames"] / rows[0]["num_patches"],
                "accuracy": _estimate(per_clip.mean(), per_clip[picks].mean(axis=1)),
                "deviation_of_seeds": float(np.std([np.mean(row["scores"]) for row in rows])),
                "categories": dict(zip(rows[0]["categories"], scores.mean(axis=0).tolist(), strict=True)),
                "tasks_of_unmerged": _share(scores.mean(axis=0), whole_by_category).tolist(),
                "of_unmerged": _estimate(
                    _share(per_clip.mean(), whole.mean()),
                    _share(per_clip[picks].mean(axis=1), whole[picks].mean(axis=1)),
                ),
                "versus_merging": _estimate(
                    per_clip.mean() - against.mean(), (per_clip[picks] - against[picks]).mean(axis=1)
                ),
                "seconds": {phase: float(np.mean([row["seconds"][phase] for row in rows])) for phase in PHASES},
                "kv_mib": _mean(rows, "kv_mib"),
                "peak_mib": None if rows[0]["peak_mib"] is None else max(row["peak_mib"] for row in rows),
            }
        )
    points.sort(key=lambda point: (list(MEANINGS).index(point["variant"]), -point["ratio"]))
    record = {
        "benchmark": "TinyVDC ablation",
        "model": model,
        "num_seeds": len({cell["seed"] for cell in cells}),
        "num_clips": len(whole),
        "num_frames": cells[0]["num_frames"],
        "num_patches": cells[0]["num_patches"],
        "settings": dict(settings),
        "environment": dict(cells[0]["environment"]),
        "num_cells": len(cells),
        "process_s": sum(cell["wall_s"] for cell in cells),
        "points": points,
    }
    return record | {"claim": claim(record), "comparison": comparison(record)}


def claim(record: Mapping[str, Any]) -> str:
    """Say in one sentence, with numbers, whether the paper's claim holds for this model on these clips.

    It is confirmed where the intervals of all ratios from 0.3 up lie above 95 %, denied where one lies below.

    Args:
        record: From `to_record`.

    Returns:
        The sentence.
    """
    curve = _curve(record)
    inside = [point for point in curve if CLAIM_RATIO <= point["ratio"] < UNMERGED]
    limit = f"{_percent(CLAIM_SHARE, 0)} %"
    said = f"The paper's claim, above {limit} of the unmerged quality down to a kept ratio of {CLAIM_RATIO:g}"
    if not inside or min(point["ratio"] for point in inside) > CLAIM_RATIO:
        return f"{said}, was not tested: no ratio {CLAIM_RATIO:g} among those measured."
    if not curve[0]["accuracy"]["value"]:
        return f"{said}, was not tested: {record['model']} states no fact rightly without merging."
    worst = min(inside, key=lambda point: point["of_unmerged"]["low"])
    verdict = "is undecided"
    if worst["of_unmerged"]["low"] > CLAIM_SHARE:
        verdict = "is confirmed"
    elif any(point["of_unmerged"]["high"] < CLAIM_SHARE for point in inside):
        verdict = "is denied"
    keeping = [point for point in curve if point["of_unmerged"]["low"] > CLAIM_SHARE]
    fewest = min(keeping, key=lambda point: point["ratio"]) if keeping else None
    further = (
        ""
        if fewest is None
        else f"; the lowest ratio whose interval lies above {limit} is {fewest['ratio']:g}, "
        f"{fewest['tokens_per_frame']:g} tokens"
    )
    lowest = ""
    if worst["ratio"] != CLAIM_RATIO:
        found = worst["of_unmerged"]
        lowest = f", lowest {_percent(found['value'])} % ({_interval(found)}) at {worst['ratio']:g}"
    at = next(point for point in inside if point["ratio"] == CLAIM_RATIO)
    return (
        f"{said}, {verdict} for {record['model']}: at {CLAIM_RATIO:g} ({at['tokens_per_frame']:g} of "
        f"{record['num_patches']} tokens a frame) it keeps {_percent(at['of_unmerged']['value'])} % "
        f"(95 % interval {_interval(at['of_unmerged'])}){lowest}, on {record['num_clips']} clips{further}."
    )


def comparison(record: Mapping[str, Any]) -> list[str]:
    """Say for each ratio which baselines merging inside the encoder beats, at as many tokens of a frame.

    Args:
        record: From `to_record`.

    Returns:
        A sentence for each ratio; a baseline counts as beaten, or ahead, where the interval of the difference does not
        hold 0.
    """
    sentences = []
    others = [point for point in record["points"] if point["variant"] in BASELINES]
    for ratio in dict.fromkeys(point["ratio"] for point in others):
        here = [point for point in others if point["ratio"] == ratio]
        groups: dict[str, list[str]] = {"is ahead of": [], "is level with": [], "is behind": []}
        for point in here:
            difference = point["versus_merging"]
            how = "is ahead of" if difference["high"] < 0 else "is behind" if difference["low"] > 0 else "is level with"
            groups[how].append(f"{_spaced(point['variant'])} ({_signed(-difference['value'])})")
        parts = [f"{how} {', '.join(names)}" for how, names in groups.items() if names]
        tokens = here[0]["tokens_per_frame"]
        sentences.append(f"At {tokens:g} tokens a frame merging inside the encoder {'; '.join(parts)}.")
    return sentences


def markdown(record: Mapping[str, Any]) -> str:
    """The report: the claim, the curve, the variants, and the comparison with the baselines.

    Args:
        record: From `to_record`.

    Returns:
        Markdown that is also readable in a terminal.
    """
    categories = list(record["points"][0]["categories"])
    curve = _curve(record)
    rest = [point for point in record["points"] if point["variant"] != REFERENCE]
    parts = [
        f"## Token merging in {record['model']}: {record['num_clips']} TinyWorld clips, {record['num_seeds']} seeds",
        record["claim"],
        "Facts that the five captions of a clip state rightly, in per cent, with 95 % intervals over clips; seeds: "
        "standard deviation between them.",
        table(
            ["kept", "a frame", "right", "interval", "seeds", "of unmerged", "interval", *categories],
            [
                [
                    f"{point['ratio']:g}",
                    f"{point['tokens_per_frame']:g}",
                    _percent(point["accuracy"]["value"]),
                    _interval(point["accuracy"]),
                    _percent(point["deviation_of_seeds"]),
                    _percent(point["of_unmerged"]["value"]),
                    _interval(point["of_unmerged"]),
                    *(_percent(point["categories"][name]) for name in categories),
                ]
                for point in curve
            ],
        ),
        "Cost of a clip: seconds of one process, and the memory of its frames' keys and values in the language model.",
        _cost_table([*curve, *rest]),
    ]
    if rest:
        parts += _variants(rest)
    if record["comparison"]:
        parts += [
            "\n".join(record["comparison"])
            + "\nIn brackets by how many points. This model was trained with merging in "
            "its encoder, and with none of the baselines.",
        ]
    parts.append(
        f"{record['environment'].get('device', '?')}, {record['environment'].get('processes', '?')} processes, "
        f"{record['settings'].get('dtype', '?')}, torch {record['environment'].get('torch', '?')}, commit "
        f"{record['environment'].get('commit', '?')}; {record['num_cells']} cells in "
        f"{record['process_s'] / 60:.1f} minutes of one process."
    )
    return "\n\n".join(parts) + "\n"


def _variants(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """What else was compared with merging, and what it is."""
    return [
        "Variants; the difference is to merging (exact) with as many tokens, on the same clips.",
        table(
            ["variant", "kept", "a frame", "right", "interval", "difference", "interval"],
            [
                [
                    _spaced(point["variant"]),
                    f"{point['ratio']:g}",
                    f"{point['tokens_per_frame']:g}",
                    _percent(point["accuracy"]["value"]),
                    _interval(point["accuracy"]),
                    *_difference(point),
                ]
                for point in sorted(points, key=lambda point: -point["ratio"])
            ],
        ),
        "\n".join(
            f"- {_spaced(name)}: {MEANINGS[name]}"
            for name in (REFERENCE, *dict.fromkeys(point["variant"] for point in points))
        ),
    ]


def _cost_table(points: Sequence[Mapping[str, Any]]) -> str:
    on_gpu = points[0]["peak_mib"] is not None
    return table(
        ["variant", "kept", "visual tokens", *(f"{phase} s" for phase in PHASES), "all s", "kv MiB"]
        + ["peak MiB"] * on_gpu,
        [
            [
                _spaced(point["variant"]),
                f"{point['ratio']:g}",
                f"{point['visual_tokens']:g}",
                *(f"{point['seconds'][phase]:.3f}" for phase in PHASES),
                f"{sum(point['seconds'].values()):.3f}",
                f"{point['kv_mib']:.2f}",
                *([f"{point['peak_mib']:.0f}"] if on_gpu else []),
            ]
            for point in points
        ],
    )


def _curve(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [point for point in record["points"] if point["variant"] == REFERENCE]


def _clip_scores(rows: Sequence[Mapping[str, Any]]) -> Hits:
    return np.concatenate([np.mean(row["scores"], axis=1) for row in rows])


def _share(part: ArrayLike, whole: ArrayLike) -> Hits:
    """Divide; 0 where there is nothing to have a share of."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _estimate(value: ArrayLike, resampled: Hits) -> dict[str, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": float(np.asarray(value)), "low": float(low), "high": float(high)}


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{_percent(estimate['low'])} to {_percent(estimate['high'])}"


def _difference(point: Mapping[str, Any]) -> tuple[str, str]:
    """Points ahead of merging, with the interval; nothing where merging was not measured at this token count."""
    if point["variant"] not in EQUAL_COUNT:
        return "", ""
    found = point["versus_merging"]
    return _signed(found["value"]), f"{_signed(found['low'])} to {_signed(found['high'])}"


def _signed(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0 makes -0.0 a plain zero


def _spaced(name: str) -> str:
    return name.replace("_", " ")
