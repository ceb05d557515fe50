"""How well a metric agrees with ratings: Pearson's, Spearman's and Kendall's correlation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Correlations(NamedTuple):
    """Each in [-1, 1]."""

    pearson: float
    spearman: float
    kendall: float
    """Tau-b, which allows for ties."""
    num_models: int


def correlate(metric: Mapping[str, float], ratings: Mapping[str, float]) -> Correlations:
    """Compare a metric with ratings over the models that have both.

    Args:
        metric: Name of the model -> score.
        ratings: Name of the model -> rating, such as from `aurora.evaluation.elo`.

    Returns:
        The three correlations; for metrics where less is better they are negative.

    Raises:
        ValueError: if fewer than two models have both, or one side is constant or not finite.
    """
    names = sorted(set(metric) & set(ratings))
    return Correlations(
        pearson([metric[name] for name in names], [ratings[name] for name in names]),
        spearman([metric[name] for name in names], [ratings[name] for name in names]),
        kendall([metric[name] for name in names], [ratings[name] for name in names]),
        len(names),
    )


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Linear correlation."""
    a, b = _checked(x, y)
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(np.clip(a @ b, -1, 1))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Linear correlation of the ranks; equal values share the mean of their ranks."""
    a, b = _checked(x, y)
    return pearson(_ranks(a).tolist(), _ranks(b).tolist())


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Tau-b: agreeing minus disagreeing pairs, over the geometric mean of the pairs that are untied on each side."""
    a, b = _checked(x, y)
    rows, columns = np.triu_indices(len(a), 1)
    signs_a, signs_b = np.sign(a[rows] - a[columns]), np.sign(b[rows] - b[columns])
    return float((signs_a @ signs_b) / np.sqrt((signs_a @ signs_a) * (signs_b @ signs_b)))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def _checked(x: Sequence[float], y: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"got {a.size} and {b.size} values, want as many on both sides, and at least two")
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError("values: want finite numbers that are not all equal, on both sides")
    return a, b
