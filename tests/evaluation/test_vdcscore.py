"""VDCscore's averages: the numbers of the published script, ours, their counts and intervals."""

import json
from pathlib import Path

import numpy as np
import pytest

from aurora.evaluation.judge import JudgeFailed, Wording
from aurora.evaluation.judging import Item, Judged, Status, judge_question, judge_questions
from aurora.evaluation.vdcscore import average_all, average_reference, score_categories
from aurora.evaluation.verdict import Verdict, read_published

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "vdcscore.json").read_text())
VIDEOS = {video["video_id"]: video["qa"] for video in GOLDEN["inputs"]["videos"]}


def published(videos):
    return [[read_published(entry["judge_text"]) for entry in VIDEOS[name]] for name in videos]


def judged(video, reply, category="short", *, repair=None, question="q"):
    item = Item(video=video, category=category, question=question, answer="a", caption="c")
    replies = (reply,) if repair is None else (reply, repair)
    return Judged(item=item, status=Status.judged, prediction="p", replies=replies)


class Canned:
    """A judge that replies with what a table says for the question."""

    name = "canned"

    def __init__(self, replies):
        self.replies = replies
        self.asked = []

    def reply(self, request):
        self.asked.append(request)
        if request.caption is not None:
            return f" answer to {request.question}\n"
        reply = self.replies[request.question][len(request.messages) > 2]
        if reply is None:
            raise JudgeFailed("500")
        return reply


def test_both_averages_give_the_golden_numbers():
    reference = average_reference(published(VIDEOS))
    assert reference.score == pytest.approx(GOLDEN["reference_aggregate"]["tp_score"], abs=1e-12)
    assert reference.accuracy == pytest.approx(GOLDEN["reference_aggregate"]["tp_acc"], abs=1e-12)
    assert reference.num_videos == len(GOLDEN["reference_kept_videos"])
    ours, wanted = average_all(published(VIDEOS)), GOLDEN["strict_zero_kept_errors_dropped"]
    assert ours == (pytest.approx(wanted["tp_score"]), pytest.approx(wanted["tp_acc"]), wanted["n"])


def test_the_small_example():
    names = GOLDEN["small_example"]["videos"]
    for average, key in ((average_reference, "reference"), (average_all, "strict")):
        found, wanted = average(published(names)), GOLDEN["small_example"][key]
        assert found[:2] == (pytest.approx(wanted["tp_score"]), pytest.approx(wanted["tp_acc"]))


def test_each_kept_video_is_the_goldens():
    kept = [name for name in VIDEOS if average_reference(published([name])) is not None]
    assert kept == GOLDEN["reference_kept_videos"]
    for name, row in zip(kept, GOLDEN["reference_rows"], strict=True):
        assert average_reference(published([name]))[:2] == (row["tp_score"], row["tp_acc"])


def test_nothing_to_average_is_none_and_no_crash():
    zero, half = [Verdict(False, 0)], [Verdict(True, 5), None]
    assert average_reference([zero, half, []]) is None
    assert average_all([half, []]) is None
    assert average_all([zero, half]) == (0, 0, 1)


def test_our_own_rules_take_yes_in_any_case_and_refuse_nine():
    entries = [judged("a", "{'pred': 'Yes', 'score': 5}"), judged("b", "{'pred': 'yes', 'score': 9}")]
    entries[1] = Judged(item=entries[1].item, status=Status.unparsed, replies=entries[1].replies)
    scores = score_categories(entries)["categories"]["short"]
    assert scores["all"] == {"score": 5, "accuracy": 1, "num_videos": 1}
    assert scores["reference"] == {"score": 9, "accuracy": 1, "num_videos": 1}
    assert (scores["judged"], scores["unparsed"], scores["failed"], scores["videos"]) == (1, 1, 0, 2)
    assert scores["accuracy_by_question"] == 1


def test_a_verdict_of_another_form_is_asked_for_once_more():
    good, bad = '{"pred": "yes", "score": 4}', "I would say yes"
    judge = Canned({"good": [good, None], "repaired": [bad, good], "hopeless": [bad, bad], "dead": [None, None],
                    "dies": [bad, None]})  # fmt: skip
    items = [Item(video="v", category="short", question=name, answer="a", caption="c") for name in judge.replies]
    found = {entry.item.question: entry for entry in judge_questions(judge, items, Wording(), concurrency=3)}
    assert {name: entry.status.value for name, entry in found.items()} == {
        "good": "judged", "repaired": "judged", "hopeless": "unparsed", "dead": "failed", "dies": "failed"}  # fmt: skip
    assert found["repaired"].verdict == Verdict(True, 4)
    assert found["repaired"].published is None  # the published script asks once
    assert found["good"].prediction == "answer to good"
    assert len(judge.asked) == 5 + 5 + 3
    assert found["dead"].to_dict()["reason"] == "500"


def test_a_mistake_of_the_user_ends_the_run():
    class Refused:
        name = "refused"

        def reply(self, request):
            raise ValueError("wrong key")

    items = [Item(video=str(i), category="short", question="q", answer="a", caption="c") for i in range(9)]
    with pytest.raises(ValueError, match="wrong key"):
        list(judge_questions(Refused(), items, Wording(), concurrency=4))


def test_requests_hold_what_they_are_made_of_and_nothing_is_filled_twice():
    judge = Canned({"{answer}?": ['{"pred": "no", "score": 1}', None]})
    item = Item(video="v", category="short", question="{answer}?", answer="secret", caption="a {question} and {'b': 1}")
    judge_question(judge, item, Wording())
    answer, verdict = (request.messages[-1]["content"] for request in judge.asked)
    assert "a {question} and {'b': 1}" in answer
    assert "secret" not in answer
    assert "Question: {answer}?\nCorrect answer: secret" in verdict


def test_intervals_cover_the_truth_about_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        right = rng.random((60, 2)) < rng.beta(2, 2, (60, 1))
        entries = [
            judged(str(video), json.dumps({"pred": "yes" if hit else "no", "score": 5 * int(hit)}), category)
            for video, pair in enumerate(right)
            for category, hit in zip(("short", "camera"), pair)
        ]
        scores = score_categories(entries, resamples=300)
        low, high = scores["mean"]["interval"]["accuracy"]
        covered += low <= 0.5 <= high
        assert scores["mean"]["all"]["accuracy"] == pytest.approx(right.mean())
    assert 50 <= covered <= 60


def test_an_interval_is_over_the_videos_that_count_and_that_of_the_mean_over_all_categories():
    """Video b has an unparsed question, and so no part in the average or its interval; camera is all wrong."""
    yes, no = '{"pred": "yes", "score": 5}', '{"pred": "no", "score": 0}'
    entries = [judged("a", yes), judged("b", no), judged("a", no, "camera"), judged("b", no, "camera")]
    lost = judged("b", "hm", question="other")
    entries.append(Judged(item=lost.item, status=Status.unparsed, replies=lost.replies))
    scores = score_categories(entries, resamples=50)
    short, mean = scores["categories"]["short"], scores["mean"]
    assert short["all"] == {"score": 5, "accuracy": 1, "num_videos": 1}
    assert short["interval"] == {"score": [5, 5], "accuracy": [1, 1]}
    assert mean["interval"] == {"score": [2.5, 2.5], "accuracy": [0.5, 0.5]}


def test_a_category_weighs_the_same_however_many_questions_it_has():
    entries = [judged("a", '{"pred": "yes", "score": 5}', "short")]
    entries += [judged("a", '{"pred": "no", "score": 1}', "detailed", question=str(i)) for i in range(9)]
    scores = score_categories(entries, resamples=10)
    assert scores["mean"]["all"] == {"score": 3, "accuracy": 0.5}
    assert scores["mean"]["questions"] == 10
