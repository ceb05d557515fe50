"""Questions about captions put to a judge: each ends judged, unparsed or failed, and all of them end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TypeVar

from aurora.evaluation.judge import Judge, JudgeFailed, Request, Wording
from aurora.evaluation.verdict import Verdict, read_published, read_verdict

T = TypeVar("T")
R = TypeVar("R")


class Status(StrEnum):
    """What became of a question."""

    judged = "judged"
    unparsed = "unparsed"
    """The verdict had another form, and after one more request still had."""
    failed = "failed"
    """No reply after all tries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question about one caption."""

    video: str
    category: str
    question: str
    answer: str
    """The reference answer."""
    caption: str
    """The predicted caption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What the judge made of one question."""

    item: Item
    status: Status
    prediction: str | None = None
    """The answer that the judge found in the caption."""
    replies: tuple[str, ...] = ()
    """The verdict as it came, and once more after a repair."""
    reason: str | None = None
    """Why it failed."""

    @property
    def verdict(self) -> Verdict | None:
        """By our rules; None unless judged."""
        return read_verdict(self.replies[-1]) if self.status is Status.judged else None

    @property
    def published(self) -> Verdict | None:
        """What the published script reads, which asks once."""
        return read_published(self.replies[0]) if self.replies else None

    def to_dict(self) -> dict[str, Any]:
        """A row of verdicts.jsonl."""
        verdict = self.verdict
        row: dict[str, Any] = asdict(self.item)
        del row["caption"]
        return row | {
            "prediction": self.prediction,
            "status": self.status.value,
            "pred": None if verdict is None else "yes" if verdict.is_right else "no",
            "score": None if verdict is None else verdict.score,
            "replies": list(self.replies),
            **({} if self.reason is None else {"reason": self.reason}),
        }


def judge_question(judge: Judge, item: Item, wording: Wording) -> Judged:
    """Have one question answered from its caption, and the answer judged.

    Args:
        judge: Whom to ask.
        item: The question.
        wording: In which words.

    Returns:
        The verdict, or what went wrong.

    Raises:
        ValueError: if the judge can answer no request at all.
    """
    try:
        prediction = judge.reply(Request.to_answer(item.caption, item.question, wording)).strip()
    except JudgeFailed as error:
        return Judged(item=item, status=Status.failed, reason=str(error))
    return judge_answer(judge, item, prediction, wording)


def judge_answer(judge: Judge, item: Item, prediction: str, wording: Wording) -> Judged:
    """Have an answer compared with the reference answer; a verdict of another form is asked for once more.

    Args:
        judge: Whom to ask.
        item: The question.
        prediction: The answer to compare.
        wording: In which words.

    Returns:
        The verdict, or what went wrong.

    Raises:
        ValueError: if the judge can answer no request at all.
    """
    replies: list[str] = []
    status, reason = Status.judged, None
    request = Request.to_compare(item.question, item.answer, prediction, wording)
    try:
        replies.append(judge.reply(request))
        if read_verdict(replies[0]) is None:
            replies.append(judge.reply(request.repair(replies[0], wording)))
            status = Status.unparsed if read_verdict(replies[1]) is None else Status.judged
    except JudgeFailed as error:
        status, reason = Status.failed, str(error)
    return Judged(item=item, status=status, prediction=prediction, replies=tuple(replies), reason=reason)


def judge_questions(judge: Judge, items: Sequence[Item], wording: Wording, *, concurrency: int) -> Iterator[Judged]:
    """Judge many questions at once.

    Args:
        judge: Whom to ask.
        items: The questions.
        wording: In which words.
        concurrency: Requests under way at once.

    Yields:
        What became of each, in order of completion.
    """
    yield from in_threads(lambda item: judge_question(judge, item, wording), items, concurrency)


def in_threads(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """Results of a function that waits for others, in order of completion; the first exception ends it.

    The threads are daemons: Ctrl-C leaves at once, with no wait for requests that are under way.

    Args:
        function: Called once for each item, from several threads.
        items: Its arguments.
        workers: Threads.

    Yields:
        One result for each item.
    """
    todo: queue.SimpleQueue[T] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for item in items:
        todo.put(item)

    def work() -> None:
        while not stopped.is_set():
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((function(item), None))
            except BaseException as error:
                done.put((None, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            result, error = done.get()
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
    finally:
        stopped.set()
