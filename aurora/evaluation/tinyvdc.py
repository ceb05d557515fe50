"""The mini VDC of TinyWorld: read the facts back out of a caption, and count how many are right.

VDCscore (AuroraCap, 2025) asks short questions about each of five structured captions and judges the answers. Here a
small parser answers from the text alone: it has a vocabulary of its own, and sees neither templates nor clips. A fact
that is missing, or stated twice with different values, counts as wrong. Chance is the best constant caption's score.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

REQUIRED: dict[str, tuple[str, ...]] = {
    "short": ("colour", "shape", "motion", "background"),
    "detailed": (
        *("colour", "shape", "size", "motion", "start", "count", "tiny_colour", "tiny_shape"),
        *("background", "time", "weather", "camera"),
    ),
    "background": ("background", "time", "weather", "count", "tiny_colour", "tiny_shape"),
    "camera": ("camera", "start"),
    "main_object": ("colour", "shape", "size", "motion", "start"),
}
"""The facts that each category's caption must state."""

CATEGORIES = tuple(REQUIRED)

_COLOUR = "red|orange|yellow|green|blue|purple|pink|white"
_SHAPE = "circle|square|triangle|star|heart|cross"
_TINY = {"dot": "dot", "dots": "dot", "box": "box", "boxes": "box", "cone": "cone", "cones": "cone", "stick": "stick"}
_TINY["sticks"] = "stick"
_TINY_NOUN = "|".join(sorted(_TINY, key=len, reverse=True))
_CAMERA = "static framing|left panning|right panning|inward zooming|outward zooming|vertical tilting"

_PATTERNS: dict[str, str] = {
    "colour": rf"\b({_COLOUR}) (?:{_SHAPE})\b",
    "shape": rf"\b({_SHAPE})\b",
    "size": rf"\b(small|medium|large) (?:(?:{_COLOUR}) )?(?:{_SHAPE})\b",
    "motion": r"\b(leftward|rightward|upward|downward|looping|bouncing|swaying|no) motion\b",
    "start": r"\bat the (left|center|right)\b",
    "count": rf"\b(one|two|three|four) (?:(?:{_COLOUR}) )?(?:{_TINY_NOUN})\b",
    "tiny_colour": rf"\b({_COLOUR}) (?:{_TINY_NOUN})\b",
    "tiny_shape": rf"\b({_TINY_NOUN})\b",
    "background": r"\b(meadow|beach|desert|city|forest|mountain)\b",
    "time": r"\b(noon|sunset|night)\b",
    "weather": r"\b(clear|rainy|snowy|foggy) weather\b",
    "camera": rf"\b({_CAMERA})\b",
}
_MATCHERS = {slot: re.compile(pattern) for slot, pattern in _PATTERNS.items()}

Hits = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Accuracy with its 95 % interval (bootstrap over clips), all in [0, 1]."""

    accuracy: float
    low: float
    high: float
    chance: float
    """Accuracy of the best constant caption on the same clips."""
    num_clips: int
    slots: dict[str, float]
    """Accuracy per fact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Scores of the five categories and of their mean; the same for clips with a held-out (colour, shape) pair."""

    categories: dict[str, Score]
    mean: Score
    held_out: "Report | None" = None

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def parse(category: str, caption: str) -> dict[str, str]:
    """Read the facts that a category asks for out of a caption.

    Args:
        category: One of `CATEGORIES`.
        caption: Any text.

    Returns:
        Slot -> value for each fact stated without contradiction; other slots are absent.

    Raises:
        ValueError: if category is unknown.
    """
    if category not in REQUIRED:
        raise ValueError(f"category={category!r}: want one of {', '.join(CATEGORIES)}")
    text = " ".join(re.findall(r"[a-z]+", caption.lower()))
    facts = {}
    for slot in REQUIRED[category]:
        values = set(_MATCHERS[slot].findall(text))
        if slot == "tiny_shape":
            values = {_TINY[value] for value in values}
        if slot == "camera":
            values = {value.split()[0] for value in values}
        if len(values) == 1:
            facts[slot] = values.pop()
    return facts


def score(
    captions: Sequence[Mapping[str, str]], scenes: Sequence[Mapping[str, object]], *, resamples: int = 2000
) -> Report:
    """Score captions against the facts of their clips.

    Args:
        captions: For each clip, category -> caption; a missing category counts as an empty caption.
        scenes: For each clip, `Scene.to_dict()`: the twelve slots and `held_out`.
        resamples: Bootstrap samples for the intervals.

    Returns:
        Accuracy is the share of required facts stated rightly; the mean weighs the five categories equally.

    Raises:
        ValueError: if there is no clip, or the two lengths differ.
    """
    report = _score(captions, scenes, resamples)
    chosen = [i for i, scene in enumerate(scenes) if scene.get("held_out")]
    if not chosen or len(chosen) == len(scenes):
        return report
    held_out = _score([captions[i] for i in chosen], [scenes[i] for i in chosen], resamples)
    return Report(categories=report.categories, mean=report.mean, held_out=held_out)


def _score(captions: Sequence[Mapping[str, str]], scenes: Sequence[Mapping[str, object]], resamples: int) -> Report:
    if not scenes or len(captions) != len(scenes):
        raise ValueError(f"{len(captions)} captions for {len(scenes)} clips: want one each, and at least one clip")
    picks = np.random.default_rng(0).integers(0, len(scenes), (resamples, len(scenes)))
    scores: dict[str, Score] = {}
    per_clip = []
    for category, slots in REQUIRED.items():
        parsed = [parse(category, caption.get(category, "")) for caption in captions]
        rows = [[facts.get(slot) == scene[slot] for slot in slots] for facts, scene in zip(parsed, scenes, strict=True)]
        hits = np.asarray(rows, dtype=np.float64)  # (clips, slots)
        per_clip.append(hits.mean(axis=1))
        chance = float(np.mean([_majority([scene[slot] for scene in scenes]) for slot in slots]))
        by_slot = {slot: float(value) for slot, value in zip(slots, hits.mean(axis=0), strict=True)}
        scores[category] = _summary(per_clip[-1], picks, chance, by_slot)
    chance = float(np.mean([entry.chance for entry in scores.values()]))
    mean = _summary(np.mean(per_clip, axis=0), picks, chance, {})
    return Report(categories=scores, mean=mean)


def _majority(values: Sequence[object]) -> float:
    return Counter(values).most_common(1)[0][1] / len(values)


def _summary(per_clip: Hits, picks: NDArray[np.int64], chance: float, slots: dict[str, float]) -> Score:
    low, high = np.percentile(per_clip[picks].mean(axis=1), [2.5, 97.5])
    return Score(
        accuracy=float(per_clip.mean()),
        low=float(low),
        high=float(high),
        chance=chance,
        num_clips=len(per_clip),
        slots=slots,
    )


def format_report(report: Report) -> str:
    """A plain table: per cent right, 95 % interval and chance for each category, the mean, and held-out pairs."""
    lines = [f"{'category':<22}{'accuracy':>9}{'95 % interval':>16}{'chance':>8}{'clips':>7}"]
    rows = {**report.categories, "mean": report.mean}
    if report.held_out is not None:
        rows["mean, held-out pairs"] = report.held_out.mean
    for name, entry in rows.items():
        interval = f"{100 * entry.low:.1f} - {100 * entry.high:.1f}"
        numbers = f"{100 * entry.accuracy:>9.1f}{interval:>16}{100 * entry.chance:>8.1f}{entry.num_clips:>7}"
        lines.append(f"{name:<22}{numbers}")
    return "\n".join(lines)
