"""What a judge replied: a flat object with `pred` and `score`, read by a small grammar and never evaluated.

Judges are asked for JSON; many write a Python dictionary. Both are taken, and nothing else: text around the object
makes a reply unusable, because a reading that guesses is a second judge.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

MAX_SCORE = 5
_MAX_REPLY_CHARS = 4000
_SPACE = re.compile(r"\s*")
_STRING = re.compile(r""""(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"(?:true|false|null|True|False|None)\b")
_FENCE = re.compile(r"```(?:json|python)?\s*\n(?P<inside>.*)\n?```", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)")

Value = str | float | None


class Verdict(NamedTuple):
    """A judge's opinion of one predicted answer."""

    is_right: bool
    score: float
    """0 (no match) to 5 (the same)."""


def read_verdict(reply: str) -> Verdict | None:
    """Read a reply by our rules: pred is yes or no in any case, the score a number from 0 to 5.

    Args:
        reply: Text of the judge; a fence of backticks around the object is allowed.

    Returns:
        The verdict, or None where the reply is something else.
    """
    text = reply.strip()
    fenced = _FENCE.fullmatch(text)
    fields = read_object(fenced["inside"].strip() if fenced else text)
    if fields is None or not isinstance(fields.get("pred"), str):
        return None
    pred = str(fields["pred"]).strip().lower()
    score = _number(fields.get("score"))
    if pred not in ("yes", "no") or score is None or not 0 <= score <= MAX_SCORE:
        return None
    return Verdict(pred == "yes", score)


def read_published(reply: str) -> Verdict | None:
    """Read a reply as the published script does: right is the lower-case `yes` alone, and no score is out of range.

    Differs from `post_eval/process_vdc_result.py` for scores that are not finite, which are unusable here.

    Args:
        reply: Text of the judge.

    Returns:
        The verdict, or None where that script gives the video up.
    """
    fields = read_object(reply.strip())
    if fields is None or "pred" not in fields:
        return None
    score = _number(fields.get("score"))
    return None if score is None else Verdict(fields["pred"] == "yes", score)


def read_object(text: str) -> dict[str, Value] | None:
    """Read a flat object of strings, numbers and null, in the notation of JSON or of Python.

    Args:
        text: From brace to brace.

    Returns:
        Its fields (true and false are 1 and 0), or None where the text is anything else.
    """
    if len(text) > _MAX_REPLY_CHARS or not (text.startswith("{") and text.endswith("}")):
        return None
    fields: dict[str, Value] = {}
    place = _skip(text, 1)
    while text[place] != "}":
        key = _STRING.match(text, place)
        if key is None:
            return None
        place = _skip(text, key.end())
        if text[place] != ":":
            return None
        place = _skip(text, place + 1)
        value = _STRING.match(text, place) or _NUMBER.match(text, place) or _WORD.match(text, place)
        if value is None:
            return None
        fields[_unquote(key[0])] = _value(value[0])
        place = _skip(text, value.end())
        if text[place] == ",":
            place = _skip(text, place + 1)
        elif text[place] != "}":
            return None
    return fields if place == len(text) - 1 else None


def _skip(text: str, place: int) -> int:
    """Past blanks; the closing brace ends every text that is read, so a place always exists."""
    match = _SPACE.match(text, place)
    assert match is not None
    return min(match.end(), len(text) - 1)


def _value(text: str) -> Value:
    if text[0] in "\"'":
        return _unquote(text)
    if text in ("null", "None"):
        return None
    return {"true": 1.0, "false": 0.0}.get(text.lower()) if text[0] in "tTfF" else float(text)


def _unquote(text: str) -> str:
    return _ESCAPE.sub(r"\1", text[1:-1])


def _number(value: Value) -> float | None:
    """A score: a number, or a string that holds one."""
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip())
        value = float(match[0]) if match else None
    return value if value is not None and math.isfinite(value) else None
