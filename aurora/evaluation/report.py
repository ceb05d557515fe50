"""What an evaluation found: operating points with their scores, as a record for JSON and as tables in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from aurora.evaluation.tables import table
from aurora.evaluation.tinyvdc import CATEGORIES, REQUIRED, Report, Score
from aurora.generation.options import MergeOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """How clips are shown to the model."""

    ratio: float
    """Share of visual tokens to keep."""
    schedule: str
    """Name of a `Schedule`, or none at ratio 1."""
    noise: bool = False
    """Noise instead of the clip."""

    @property
    def name(self) -> str:
        """Such as `exact 0.4`."""
        kept = "unmerged" if self.ratio == 1.0 else f"{self.schedule} {self.ratio:g}"
        return f"{kept}, noise" if self.noise else kept

    @property
    def merging(self) -> MergeOptions:
        """The same for one call of the model."""
        if self.ratio == 1.0:
            return {"token_kept_ratio": 1.0}
        return {"token_kept_ratio": self.ratio, "schedule": self.schedule}

    @property
    def columns(self) -> dict[str, Any]:
        """The same as columns of a row of captions."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Scores of one operating point."""

    point: Point
    scores: Report
    other_clip: Score | None
    """Mean score of the same captions against the facts of the next clip; None for a single clip."""
    visual_tokens: list[int]
    """Per clip."""
    num_frames: int
    """Frames of a clip."""
    seconds: list[float]
    """Per clip in one process: reading the file, encoding, and five captions."""

    def summary(self) -> str:
        """One line."""
        mean = self.scores.mean
        return (
            f"{self.point.name}: {100 * mean.accuracy:.1f} % right ({100 * mean.low:.1f} to {100 * mean.high:.1f}), "
            f"chance {100 * mean.chance:.1f}, {fmean(self.visual_tokens) / self.num_frames:g} tokens a frame, "
            f"{fmean(self.seconds):.2f} s a clip"
        )


def to_record(
    measured: Sequence[Measured],
    *,
    model: str,
    clips: str,
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Put everything into plain values.

    Args:
        measured: Operating points; the others are compared with the first.
        model: Name of the checkpoint.
        clips: What was captioned, in words.
        settings: What the captions depend on.
        environment: See `environment_report`.

    Returns:
        What report.json holds; accuracies are in [0, 1].
    """
    first = measured[0].scores.mean.accuracy
    return {
        "benchmark": "TinyVDC",
        "model": model,
        "clips": clips,
        "settings": dict(settings),
        "environment": dict(environment),
        "points": [
            {
                "name": entry.point.name,
                **entry.point.columns,
                "visual_tokens_per_frame": fmean(entry.visual_tokens) / entry.num_frames,
                "num_frames": entry.num_frames,
                "seconds_per_clip": fmean(entry.seconds),
                "retention": entry.scores.mean.accuracy / first if first else 0.0,
                "scores": entry.scores.to_dict(),
                "other_clip": None if entry.other_clip is None else asdict(entry.other_clip),
            }
            for entry in measured
        ],
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of a record: categories of the first point, all points, and facts of the first point.

    Args:
        record: From `to_record`.

    Returns:
        Markdown that is also readable in a terminal.
    """
    first = record["points"][0]
    parts = [
        f"## {record['model']} on TinyVDC: {record['clips']}",
        f"Share of the required facts that a caption states rightly, in per cent; {first['name']}. Chance is the best "
        "constant caption.",
        table(["category", "right", "95 % interval", "chance", "held-out pairs"], _category_rows(first["scores"])),
        f"Operating points ({first['num_frames']} frames a clip); the share is of the first row's mean.",
        table(
            ["tokens kept", "a frame", "mean", "95 % interval", "share", "held-out pairs", *CATEGORIES, "s a clip"],
            [_point_row(point) for point in record["points"]],
        ),
        _controls(record["points"]),
        f"Facts, {first['name']}:",
        table(["fact", *CATEGORIES], _fact_rows(first["scores"])),
        f"{record['environment'].get('device', '?')}, {record['settings'].get('dtype', '?')}, torch "
        f"{record['environment'].get('torch', '?')}, commit {record['environment'].get('commit', '?')}; seconds are of "
        "one process, all five captions.",
    ]
    return "\n\n".join(parts) + "\n"


def _category_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    held_out = scores["held_out"]
    rows = []
    for name, entry in {**scores["categories"], "mean": scores["mean"]}.items():
        apart = None if held_out is None else held_out["mean"] if name == "mean" else held_out["categories"][name]
        rows.append([name, _percent(entry["accuracy"]), _interval(entry), _percent(entry["chance"]), _apart(apart)])
    return rows


def _point_row(point: Mapping[str, Any]) -> list[str]:
    scores = point["scores"]
    mean, held_out = scores["mean"], scores["held_out"]
    return [
        point["name"],
        f"{point['visual_tokens_per_frame']:g}",
        _percent(mean["accuracy"]),
        _interval(mean),
        "" if point["noise"] else _percent(point["retention"]),
        _apart(None if held_out is None else held_out["mean"]),
        *(_percent(scores["categories"][name]["accuracy"]) for name in CATEGORIES),
        f"{point['seconds_per_clip']:.2f}",
    ]


def _controls(points: Sequence[Mapping[str, Any]]) -> str:
    """What captions score that have not seen the clip."""
    lines = [f"Controls: chance {_percent(points[0]['scores']['mean']['chance'])}"]
    if (other := points[0]["other_clip"]) is not None:
        lines.append(f"captions of the next clip {_percent(other['accuracy'])} ({_interval(other)})")
    for point in points:
        if point["noise"]:
            mean = point["scores"]["mean"]
            lines.append(f"noise instead of frames {_percent(mean['accuracy'])} ({_interval(mean)})")
    return ", ".join(lines) + "."


def _fact_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    facts = list(dict.fromkeys(slot for slots in REQUIRED.values() for slot in slots))
    by_category = {name: scores["categories"][name]["slots"] for name in CATEGORIES}
    return [
        [fact, *(_percent(by_category[name][fact]) if fact in by_category[name] else "" for name in CATEGORIES)]
        for fact in facts
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(score: Mapping[str, Any]) -> str:
    return f"{_percent(score['low'])} to {_percent(score['high'])}"


def _apart(score: Mapping[str, Any] | None) -> str:
    return "" if score is None else f"{_percent(score['accuracy'])} (n={score['num_clips']})"
