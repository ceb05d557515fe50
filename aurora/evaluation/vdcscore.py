"""VDCscore: short questions about a clip are answered from its caption, and the answers are judged.

AuroraCap (2025), section 4: question -> answer from the predicted caption -> compared with the reference answer, right
or wrong and 0 to 5. A video's score is the mean over its questions, a category's the mean over its videos. The
published script drops every video whose score or accuracy is zero, and every video with one unusable reply; the first
raises the average. Both averages are computed here from the same replies: `all` keeps zeros, `reference` is the
script's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aurora.evaluation.judging import Judged, Status
from aurora.evaluation.verdict import Verdict

RESAMPLES = 2000


class Averaging(Enum):
    """Which videos count."""

    all = "all"
    """Every video that is judged completely, zeros included."""
    reference = "reference"
    """As the published script: without the videos whose score or accuracy is zero."""


class Average(NamedTuple):
    """Of a category: mean over videos of the mean over questions."""

    score: float
    """0 to 5."""
    accuracy: float
    """Share of right answers, in [0, 1]."""
    num_videos: int
    """Videos that count."""


def average_all(videos: Sequence[Sequence[Verdict | None]]) -> Average | None:
    """Keep zeros; a video with a verdict missing is left out, because the judge and not the caption failed there.

    Args:
        videos: For each video the verdicts of its questions, None where there is none.

    Returns:
        The average, or None where no video is complete.
    """
    return _average([video for video in videos if video and None not in video])


def average_reference(videos: Sequence[Sequence[Verdict | None]]) -> Average | None:
    """As `post_eval/process_vdc_result.py`: also without the videos whose score or accuracy is zero.

    Args:
        videos: For each video the verdicts as `read_published` gives them.

    Returns:
        The average, or None where the script would divide by zero.
    """
    complete = [video for video in videos if video and None not in video]
    return _average([video for video in complete if all(_means(video))])


def _average(videos: Sequence[Sequence[Verdict | None]]) -> Average | None:
    if not videos:
        return None
    score, accuracy = np.mean([_means(video) for video in videos], axis=0).tolist()
    return Average(score, accuracy, len(videos))


def _means(video: Sequence[Verdict | None]) -> tuple[float, float]:
    """Mean score and accuracy of a complete video."""
    verdicts = [verdict for verdict in video if verdict is not None]
    count = len(verdicts)
    return sum(verdict.score for verdict in verdicts) / count, sum(verdict.is_right for verdict in verdicts) / count


def score_categories(judged: Sequence[Judged], *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Average by category, both ways, with counts and intervals.

    Args:
        judged: All questions.
        resamples: Bootstrap samples over videos.

    Returns:
        Plain values for JSON: `categories` by name, and `mean`, in which categories weigh the same. Accuracies are in
        [0, 1]; an average is None where no video is complete.
    """
    names = list(dict.fromkeys(entry.item.category for entry in judged))
    ids = list(dict.fromkeys(entry.item.video for entry in judged))
    grouped: dict[str, dict[str, list[Judged]]] = {name: {} for name in names}
    for entry in judged:
        grouped[entry.item.category].setdefault(entry.item.video, []).append(entry)
    values = np.full((len(names), len(ids), 2), np.nan)  # score and accuracy; NaN where a video does not count
    for row, videos in enumerate(grouped.values()):
        for column, video in enumerate(ids):
            verdicts = [entry.verdict for entry in videos.get(video, [])]
            if verdicts and None not in verdicts:
                values[row, column] = _means(verdicts)
    *intervals, interval_of_mean = _intervals(values, resamples)
    categories = {
        name: _category(list(videos.values())) | {"interval": interval}
        for (name, videos), interval in zip(grouped.items(), intervals, strict=True)
    }
    return {"categories": categories, "mean": _mean_of(categories) | {"interval": interval_of_mean}}


def _category(videos: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    entries = [entry for video in videos for entry in video]
    right = [verdict.is_right for entry in entries if (verdict := entry.verdict) is not None]
    return {
        "all": _plain(average_all([[entry.verdict for entry in video] for video in videos])),
        "reference": _plain(average_reference([[entry.published for entry in video] for video in videos])),
        "videos": len(videos),
        "questions": len(entries),
        **{status.value: sum(entry.status is status for entry in entries) for status in Status},
        "accuracy_by_question": sum(right) / len(right) if right else None,
    }


def _mean_of(categories: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over categories of each average, and sums of the counts."""
    mean: dict[str, Any] = {}
    for averaging in Averaging:
        entries = [entry[averaging.value] for entry in categories.values()]
        mean[averaging.value] = (
            None
            if None in entries
            else {key: float(np.mean([entry[key] for entry in entries])) for key in ("score", "accuracy")}
        )
    for key in ("questions", *(status.value for status in Status)):
        mean[key] = sum(entry[key] for entry in categories.values())
    return mean


def _intervals(values: NDArray[np.float64], resamples: int) -> list[dict[str, list[float]] | None]:
    """95 % intervals by drawing videos, for each category and for their mean; a video brings all its categories."""
    num_categories, num_videos, _ = values.shape
    picks = np.random.default_rng(0).integers(0, num_videos, (resamples, num_videos))
    counts = np.zeros((resamples, num_videos))
    np.add.at(counts, (np.arange(resamples)[:, None], picks), 1)
    present = ~np.isnan(values)  # (C, V, 2)
    sums = np.einsum("rv,cvk->rck", counts, np.where(present, values, 0.0))
    weights = np.einsum("rv,cvk->rck", counts, present.astype(float))
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = sums / weights  # (resamples, C, 2), NaN where no video of a draw counts
    drawn = np.concatenate([drawn, drawn.mean(axis=1, keepdims=True)], axis=1)
    return [_interval(drawn[:, row]) for row in range(num_categories + 1)]


def _interval(drawn: NDArray[np.float64]) -> dict[str, list[float]] | None:
    drawn = drawn[~np.isnan(drawn).any(axis=1)]
    if not len(drawn):
        return None
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {"score": [float(low[0]), float(high[0])], "accuracy": [float(low[1]), float(high[1])]}


def _plain(average: Average | None) -> dict[str, float] | None:
    return None if average is None else average._asdict()
