"""Accuracy of short answers: equal after normalisation, agreement with several people, or by a judge.

The normalisation is that of VQA v2 (Goyal et al., 2017): case, articles, punctuation and number words do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from aurora.evaluation.judge import Judge, Wording
from aurora.evaluation.judging import Item, Judged, Status, in_threads, judge_answer

_NUMBERS = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905 - a list of digits by place
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.']|_")


class JudgedAccuracy(NamedTuple):
    """Of answers that a judge compared; those without a verdict do not count."""

    accuracy: float | None
    """Share of right answers, in [0, 1]; None where there is no verdict."""
    score: float | None
    """Mean from 0 to 5."""
    num_judged: int
    num_unparsed: int
    num_failed: int


def normalise(answer: str) -> str:
    """Bring an answer into the form in which answers are compared."""
    text = _PUNCTUATION.sub(" ", _COMMA_IN_NUMBER.sub("", answer.lower().replace("’", "'")))
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(word for word in words if word not in _ARTICLES)


def exact_accuracy(predictions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> float:
    """Share of predictions that equal an accepted answer.

    Args:
        predictions: One for each question.
        answers: For each question, the answer or all that are accepted.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: if the lengths differ, or nothing is given.
    """
    return _mean([float(normalise(p) in accepted) for p, accepted in _pairs(predictions, answers)])


def consensus_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Accuracy of VQA v2: an answer is right that three of the other people gave, averaged over whom to leave out.

    Args:
        predictions: One for each question.
        answers: For each question, the answers of several people, usually ten.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: as `exact_accuracy`.
    """
    scores = []
    for prediction, people in _pairs(predictions, answers):
        given = normalise(prediction)
        matches = people.count(given)
        others = [matches - (answer == given) for answer in people]
        scores.append(_mean([min(1.0, count / 3) for count in others]))
    return _mean(scores)


def judged_accuracy(
    judge: Judge,
    questions: Sequence[str],
    answers: Sequence[str],
    predictions: Sequence[str],
    *,
    wording: Wording | None = None,
    concurrency: int = 8,
) -> JudgedAccuracy:
    """Have each prediction compared with its answer.

    Args:
        judge: Whom to ask, such as a `ChatClient`.
        questions: What was asked.
        answers: The right answers.
        predictions: The answers given.
        wording: In which words the judge is asked; None is our own.
        concurrency: Requests under way at once.

    Returns:
        Accuracy and score over the questions with a verdict, with counts of the others.

    Raises:
        ValueError: if the lengths differ, or nothing is given.
    """
    if not questions or not len(questions) == len(answers) == len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions, {len(answers)} answers, {len(questions)} questions: want as many"
        )
    items = [
        (Item(video=str(index), category="vqa", question=question, answer=answer, caption=""), prediction)
        for index, (question, answer, prediction) in enumerate(zip(questions, answers, predictions, strict=True))
    ]

    def compare(pair: tuple[Item, str]) -> Judged:
        return judge_answer(judge, *pair, wording or Wording())

    judged = list(in_threads(compare, items, concurrency))
    verdicts = [verdict for entry in judged if (verdict := entry.verdict) is not None]
    return JudgedAccuracy(
        accuracy=_mean([float(verdict.is_right) for verdict in verdicts]) if verdicts else None,
        score=_mean([verdict.score for verdict in verdicts]) if verdicts else None,
        num_judged=len(verdicts),
        num_unparsed=sum(entry.status is Status.unparsed for entry in judged),
        num_failed=sum(entry.status is Status.failed for entry in judged),
    )


def _pairs(predictions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> list[tuple[str, list[str]]]:
    if not predictions or len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} questions: want as many, and at least one")
    accepted = [[entry] if isinstance(entry, str) else list(entry) for entry in answers]
    if empty := [index for index, entry in enumerate(accepted) if not entry]:
        raise ValueError(f"answers[{empty[0]}]: got none, want at least one")
    return [(p, [normalise(answer) for answer in entry]) for p, entry in zip(predictions, accepted, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
