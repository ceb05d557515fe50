"""Accuracy of short answers."""

import pytest

from aurora.evaluation.rule_judge import RuleJudge
from aurora.evaluation.vqa import consensus_accuracy, exact_accuracy, judged_accuracy, normalise


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("The Red Car.", "red car"),
        ("two", "2"),
        ("1,000.5 m!", "1000.5 m"),
        ("It’s a man's", "it's man's"),
        ("yes/no", "yes no"),
        ("", ""),
    ],
)
def test_normal_form(answer, wanted):
    assert normalise(answer) == wanted


def test_exact_accuracy_takes_any_accepted_answer():
    assert exact_accuracy(["A dog", "two", "left"], ["dog", ["three", "2"], "right"]) == pytest.approx(2 / 3)


def test_consensus_wants_three_others():
    people = ["red"] * 3 + ["blue"] * 7
    # Without one of the three that said red, two are left; without another, three.
    assert consensus_accuracy(["red"], [people]) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert consensus_accuracy(["blue", "green"], [people, people]) == pytest.approx(0.5)


def test_a_judge_compares_answers():
    question = "What color is the main object?"
    found = judged_accuracy(RuleJudge(), [question] * 3, ["red"] * 3, ["It is red", "blue", "red or blue"])
    assert found == (pytest.approx(1 / 3), pytest.approx(5 / 3), 3, 0, 0)


@pytest.mark.parametrize(("predictions", "answers"), [([], []), (["a"], []), (["a"], [[]])])
def test_what_cannot_be_compared_is_refused(predictions, answers):
    with pytest.raises(ValueError, match="want"):
        exact_accuracy(predictions, answers)
