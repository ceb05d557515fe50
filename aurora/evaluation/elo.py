"""Ratings from pairwise votes: Bradley-Terry's model and Elo's updates, on Elo's scale, with 95 % intervals.

A difference of 400 points means that the stronger one is preferred ten times as often. Bradley and Terry, 1952; Elo,
1978. AuroraCap validates VDCscore by its correlation (`aurora.evaluation.correlation`) with an Elo rating from human
votes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

POINTS_PER_UNIT = 400 / math.log(10)
"""Elo points of one unit of log-odds."""
MEAN_RATING = 1000.0
PRIOR_POINTS = 2000.0
"""Standard deviation of ratings before any vote: wide, so that it decides only about who won or lost every time."""
MIN_GAMES = 300
"""Elo's updates forget where they began after so many games of each."""
MAX_INDICES = 8_000_000
"""Of votes in memory at once."""


class Vote(NamedTuple):
    """One comparison."""

    first: str
    second: str
    outcome: float
    """1 if the first was preferred, 0 if the second, 0.5 for a tie."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rating:
    """One rated model; the mean of all is 1000."""

    name: str
    rating: float
    low: float
    high: float
    num_votes: int


def bradley_terry(votes: Sequence[Vote]) -> list[Rating]:
    """Fit the strengths that make the votes most likely.

    Args:
        votes: In any order; it does not matter.

    Returns:
        Best first, with intervals from the curvature of the likelihood.

    Raises:
        ValueError: if there is no vote, or one compares a name with itself or has no outcome.
    """
    names, pairs, outcomes = _arrays(votes)
    strengths, curvature = np.zeros(len(names)), np.eye(len(names))
    for _ in range(100):
        expected = 1 / (1 + np.exp(strengths[pairs[:, 1]] - strengths[pairs[:, 0]]))
        gradient = -strengths * (POINTS_PER_UNIT / PRIOR_POINTS) ** 2
        np.add.at(gradient, pairs[:, 0], outcomes - expected)
        np.add.at(gradient, pairs[:, 1], expected - outcomes)
        weight = expected * (1 - expected)
        curvature = np.eye(len(names)) * (POINTS_PER_UNIT / PRIOR_POINTS) ** 2
        for row, column, sign in ((0, 0, 1), (1, 1, 1), (0, 1, -1), (1, 0, -1)):
            np.add.at(curvature, (pairs[:, row], pairs[:, column]), sign * weight)
        step = np.linalg.solve(curvature, gradient)
        strengths += step / max(1.0, float(np.abs(step).max()))  # at most one unit, or a first step may overshoot
        if np.abs(step).max() < 1e-10:
            break
    centre = np.eye(len(names)) - 1 / len(names)
    errors = np.sqrt(np.diag(centre @ np.linalg.inv(curvature) @ centre.T)) * POINTS_PER_UNIT
    ratings = MEAN_RATING + (strengths - strengths.mean()) * POINTS_PER_UNIT
    return _ranked(names, pairs, ratings, ratings - 1.959964 * errors, ratings + 1.959964 * errors)


def elo(
    votes: Sequence[Vote], *, k: float = 16.0, orders: int = 20, resamples: int = 200, seed: int = 0
) -> list[Rating]:
    """Update ratings vote by vote, and average over random orders of the votes, of which no one is meant.

    Args:
        votes: In any order.
        k: Points that one surprising vote moves at most.
        orders: Random orders to average over.
        resamples: Bootstrap samples of the votes for the intervals.
        seed: Of orders and samples.

    Returns:
        Best first, with intervals from the bootstrap.

    Raises:
        ValueError: as `bradley_terry`.
    """
    names, pairs, outcomes = _arrays(votes)
    rng = np.random.default_rng(seed)
    passes = max(1, math.ceil(MIN_GAMES * len(names) / (2 * len(votes))))
    few = max(1, orders // 4)
    samples = [rng.integers(0, len(votes), len(votes)) for _ in range(resamples)]
    drawn = [np.arange(len(votes))] * orders + [sample for sample in samples for _ in range(few)]
    together = max(1, MAX_INDICES // (passes * len(votes)))
    ratings = np.concatenate(
        [
            _play(
                [np.concatenate([rng.permutation(sample) for _ in range(passes)]) for sample in part],
                pairs,
                outcomes,
                k,
            )
            for part in (drawn[start : start + together] for start in range(0, len(drawn), together))
        ]
    )
    resampled = ratings[orders:].reshape(resamples, few, len(names)).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return _ranked(names, pairs, ratings[:orders].mean(axis=0), low, high)


def _play(
    orders: Sequence[NDArray[np.int64]], pairs: NDArray[np.int64], outcomes: NDArray[np.float64], k: float
) -> NDArray[np.float64]:
    """Ratings after the votes in each order, (orders, names); all orders advance together."""
    ratings = np.full((len(orders), int(pairs.max()) + 1), MEAN_RATING)
    lane = np.arange(len(orders))
    for step in np.stack(orders, axis=1):
        first, second = pairs[step, 0], pairs[step, 1]
        moved = k * (outcomes[step] - 1 / (1 + 10 ** ((ratings[lane, second] - ratings[lane, first]) / 400)))
        ratings[lane, first] += moved
        ratings[lane, second] -= moved
    return ratings


def expected_outcome(rating: float, other: float) -> float:
    """How often the first of two ratings is preferred."""
    return 1 / (1 + 10 ** ((other - rating) / 400))


def _arrays(votes: Sequence[Vote]) -> tuple[list[str], NDArray[np.int64], NDArray[np.float64]]:
    if not votes:
        raise ValueError("votes: got none, want at least one")
    for index, vote in enumerate(votes):
        if vote.first == vote.second or not 0 <= vote.outcome <= 1:
            raise ValueError(f"votes[{index}]: got {tuple(vote)}, want two names and an outcome from 0 to 1")
    names = sorted({name for vote in votes for name in (vote.first, vote.second)})
    index_of = {name: index for index, name in enumerate(names)}
    pairs = np.array([(index_of[vote.first], index_of[vote.second]) for vote in votes])
    return names, pairs, np.array([vote.outcome for vote in votes], dtype=np.float64)


def _ranked(
    names: Sequence[str],
    pairs: NDArray[np.int64],
    ratings: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> list[Rating]:
    counts = np.bincount(pairs.ravel(), minlength=len(names))
    rows = [
        Rating(name=name, rating=float(r), low=float(a), high=float(b), num_votes=int(count))
        for name, r, a, b, count in zip(names, ratings, low, high, counts, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.rating)
