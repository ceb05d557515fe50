"""Ratings from votes of known strengths, and correlations of worked examples."""

import numpy as np
import pytest

from aurora.evaluation.correlation import correlate, kendall, pearson, spearman
from aurora.evaluation.elo import POINTS_PER_UNIT, Vote, bradley_terry, elo, expected_outcome

TRUE = {"a": 1200.0, "b": 1080.0, "c": 1000.0, "d": 930.0, "e": 790.0}


def votes_from(strengths, count, seed=0, ties=0.0):
    rng = np.random.default_rng(seed)
    names = list(strengths)
    votes = []
    for _ in range(count):
        first, second = rng.choice(len(names), 2, replace=False)
        first, second = names[first], names[second]
        chance = expected_outcome(strengths[first], strengths[second])
        outcome = 0.5 if rng.random() < ties else float(rng.random() < chance)
        votes.append(Vote(first, second, outcome))
    return votes


@pytest.mark.parametrize("rate", [bradley_terry, elo])
def test_known_strengths_are_recovered(rate):
    ratings = rate(votes_from(TRUE, 3000))
    assert [row.name for row in ratings] == list(TRUE)
    for row in ratings:
        assert row.low <= TRUE[row.name] <= row.high, row
        assert row.low < row.rating < row.high
        assert row.high - row.low < 80
    assert np.mean([row.rating for row in ratings]) == pytest.approx(1000)
    assert sum(row.num_votes for row in ratings) == 6000


@pytest.mark.parametrize(("rate", "least"), [(bradley_terry, 0.9), (lambda votes: elo(votes, resamples=60), 0.85)])
def test_intervals_hold_what_they_state(rate, least):
    inside = []
    for seed in range(20):
        inside += [row.low <= TRUE[row.name] <= row.high for row in rate(votes_from(TRUE, 800, seed))]
    assert least <= np.mean(inside) <= 1


def test_two_models_have_the_odds_of_their_votes():
    votes = [Vote("x", "y", 1.0)] * 75 + [Vote("y", "x", 1.0)] * 25
    best, other = bradley_terry(votes)
    assert best.name == "x"
    assert best.rating - other.rating == pytest.approx(np.log(3) * POINTS_PER_UNIT, rel=0.01)
    assert abs(elo(votes)[0].rating - best.rating) < 15


def test_order_of_votes_and_of_names_does_not_matter():
    votes = votes_from(TRUE, 400, ties=0.2)
    turned = [Vote(vote.second, vote.first, 1 - vote.outcome) for vote in reversed(votes)]
    for row, other in zip(bradley_terry(votes), bradley_terry(turned), strict=True):
        assert row.name == other.name
        assert row.rating == pytest.approx(other.rating, abs=1e-6)


def test_who_always_wins_is_rated_finitely_and_vaguely():
    best, other = bradley_terry([Vote("x", "y", 1.0)] * 5)
    assert best.name == "x"
    assert 100 < best.rating - other.rating < 2000
    assert best.low < other.high


@pytest.mark.parametrize("votes", [[], [Vote("x", "x", 1.0)], [Vote("x", "y", 2.0)], [Vote("x", "y", float("nan"))]])
@pytest.mark.parametrize("rate", [bradley_terry, elo])
def test_votes_that_are_none_are_refused(rate, votes):
    with pytest.raises(ValueError, match="votes"):
        rate(votes)


def test_correlations_of_a_worked_example():
    x, y = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    assert pearson(x, y) == pytest.approx(0.8)
    assert spearman(x, y) == pytest.approx(0.8)
    assert kendall(x, y) == pytest.approx(0.6)
    ratings = {row.name: row.rating for row in bradley_terry(votes_from(TRUE, 3000))}
    found = correlate({"a": 48.0, "b": 44.0, "c": 45.0, "d": 30.0, "e": 12.0, "not rated": 3.0}, ratings)
    assert found.num_models == 5
    assert (found.spearman, found.kendall) == (pytest.approx(0.9), pytest.approx(0.8))
    assert pearson(x, [-value for value in x]) == -1


def test_correlations_with_ties_equal_scipys():
    """The examples of scipy's documentation with its numbers."""
    assert kendall([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452079103173)
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert pearson([1, 2, 3, 4, 5, 6, 7], [10, 9, 2.5, 6, 4, 3, 2]) == pytest.approx(-0.828503883588428)


@pytest.mark.parametrize(("x", "y"), [([1], [1]), ([1, 2], [1]), ([1, 1], [1, 2]), ([1, float("nan")], [1, 2])])
def test_what_has_no_correlation_is_refused(x, y):
    with pytest.raises(ValueError, match="want"):
        kendall(x, y)
