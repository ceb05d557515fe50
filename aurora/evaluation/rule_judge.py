"""A judge for TinyWorld without a language model: its questions ask for slots, which a parser reads from any text."""

from __future__ import annotations

import json
import re

from aurora.data.tinyworld.language import PLURALS, QUESTION_SLOTS
from aurora.data.tinyworld.scene import SLOTS
from aurora.evaluation.judge import Request
from aurora.evaluation.tinyvdc import parse
from aurora.evaluation.verdict import MAX_SCORE

NOT_STATED = "not stated"
_SINGULAR = {plural: noun for noun, plural in PLURALS.items()}


class RuleJudge:
    """Answers with the value of the slot that a question asks for; right is the same value, and scores 5 or 0."""

    name = "the rules of TinyWorld"

    def reply(self, request: Request) -> str:
        """Reply to one request; see `Judge`.

        Raises:
            ValueError: if the question is none of TinyWorld's.
        """
        slot = QUESTION_SLOTS.get(request.question)
        if slot is None:
            raise ValueError(
                f"judge=rules: got the question {request.question[:80]!r}, and the rules know TinyWorld's only; "
                "want judge=server"
            )
        if request.caption is not None:
            return parse("detailed", request.caption).get(slot, NOT_STATED)
        value = _value(slot, request.answer or "")
        is_right = value is not None and value == _value(slot, request.prediction or "")
        return json.dumps({"pred": "yes" if is_right else "no", "score": MAX_SCORE if is_right else 0})


def _value(slot: str, answer: str) -> str | None:
    """The one value of a slot that an answer names; `two dots` and `left panning` hold more than the value."""
    words = [_SINGULAR.get(word, word) for word in re.findall(r"[a-z]+", answer.lower())]
    named = {word for word in words if word in SLOTS[slot]}
    return named.pop() if len(named) == 1 else None
