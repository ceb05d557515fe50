"""Who judges captions: what is asked, in which words, and of whom.

A judge gets two kinds of request: answer a question from a caption alone, and compare that answer with the right one.
Judges differ in how they come to a reply only, so a language model behind HTTP and the rules of TinyWorld go the same
way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Protocol

Messages = tuple[Mapping[str, str], ...]
"""`role` and `content` of each message, as an OpenAI-compatible server takes them."""

_FIELD = re.compile(r"\{(caption|question|answer|prediction)\}")


class JudgeKind(Enum):
    """Who judges."""

    rules = "rules"
    """A parser that knows TinyWorld's words; no server."""
    server = "server"
    """A language model behind an OpenAI-compatible server, such as SGLang, vLLM or llama.cpp."""
    stub = "stub"
    """The rules behind a server that this run starts itself, to try the protocol without a language model."""


@dataclass(kw_only=True, slots=True)
class JudgeConfig:
    """The judge of captions, and how patiently it is asked."""

    kind: JudgeKind = JudgeKind.rules
    """rules (TinyWorld's own words, no server), server (a language model) or stub (the rules behind a local server)."""
    url: str = "http://127.0.0.1:30000/v1"
    """Base address of an OpenAI-compatible server; 30000 is SGLang's port, 8000 vLLM's, 8080 llama.cpp's."""
    model: str | None = None
    """Name of the model there; null takes the first that the server lists."""
    api_key_file: str | None = None
    """File that holds the key of a hosted server; the key itself appears in no setting and no report."""
    wording_file: str | None = None
    """Other words for the two requests: our JSON or the published .py, of which only the texts are read."""
    concurrency: int = 8
    """Requests under way at once."""
    timeout_s: float = 60.0
    """Seconds that one request may take from connecting to the last byte."""
    retries: int = 4
    """Further tries after a timeout, a refused connection, a 429 or a 5xx."""
    backoff_s: float = 1.0
    """Pause before the first further try; it doubles each time, up to 30 s, give or take a half."""
    give_up_after: int = 100
    """After so many failed requests in a row the others are counted as failed without being sent."""
    max_new_tokens: int = 256
    """At most so many tokens of a reply."""
    cache: str | None = None
    """SQLite file of replies, shared by runs; null is replies.sqlite in the output folder."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not re.match(r"https?://[^/\s]+", self.url):
            raise ValueError(f"judge.url={self.url}: want http://host:port/v1 or https://...")
        for key, low in (("concurrency", 1), ("retries", 0), ("give_up_after", 1), ("max_new_tokens", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"judge.{key}={getattr(self, key)}: want at least {low}")
        for key in ("timeout_s", "backoff_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"judge.{key}={getattr(self, key)}: want a number above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """The texts of both requests; `{caption}`, `{question}`, `{answer}` and `{prediction}` are filled in."""

    answer_system: str = (
        "You answer questions about a video that you have not seen. All you know of it is a description by somebody "
        'else. Take nothing from elsewhere: where the description does not say it, the answer is "not stated".'
    )
    answer_user: str = "Description of the video:\n{caption}\n\nQuestion: {question}\n\nAnswer in a few words."
    verdict_system: str = (
        "You compare a predicted answer with the correct one. The wording may differ; what counts is whether both say "
        "the same thing."
    )
    verdict_user: str = (
        "Question: {question}\nCorrect answer: {answer}\nPredicted answer: {prediction}\n\n"
        'Reply with one JSON object and nothing else, such as {"pred": "no", "score": 2}: pred is "yes" if the '
        'predicted answer is right and "no" if it is not, score is a whole number from 0 (nothing in common) to 5 '
        "(the same)."
    )
    repair: str = (
        'That is not the form asked for. Reply with one JSON object and nothing else: {"pred": "yes" or "no", '
        '"score": a whole number from 0 to 5}.'
    )

    def digest(self) -> str:
        """Short name of these words for a report."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One thing to ask: the messages, and what they are made of."""

    messages: Messages
    question: str
    caption: str | None = None
    """The caption to answer from; None where an answer is to be compared."""
    answer: str | None = None
    prediction: str | None = None

    @classmethod
    def to_answer(cls, caption: str, question: str, wording: Wording) -> Request:
        """Ask for an answer from a caption alone."""
        fields = {"caption": caption, "question": question}
        return cls(messages=_messages(wording.answer_system, wording.answer_user, fields), **fields)

    @classmethod
    def to_compare(cls, question: str, answer: str, prediction: str, wording: Wording) -> Request:
        """Ask whether a predicted answer is the right one."""
        fields = {"question": question, "answer": answer, "prediction": prediction}
        return cls(messages=_messages(wording.verdict_system, wording.verdict_user, fields), **fields)

    def repair(self, reply: str, wording: Wording) -> Request:
        """Ask again after a reply of another form."""
        more = ({"role": "assistant", "content": reply}, {"role": "user", "content": wording.repair})
        return Request(
            messages=(*self.messages, *more), question=self.question, answer=self.answer, prediction=self.prediction
        )


class JudgeFailed(Exception):  # noqa: N818 - what happened to one request, not a mistake of the user
    """No reply to one request, after all tries."""


class Judge(Protocol):
    """Whoever replies to requests; called from several threads."""

    @property
    def name(self) -> str:
        """What the report says: a model with its server, or the rules."""

    def reply(self, request: Request) -> str:
        """Reply to one request.

        Raises:
            JudgeFailed: if there is no reply.
            ValueError: if none can be expected for any request, such as with a wrong key.
        """


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Put values into a template; other braces, and braces in the values, stay as they are."""
    return _FIELD.sub(lambda match: fields.get(match[1], match[0]), template)


def unfill(template: str, text: str) -> dict[str, str] | None:
    """Find the values that a text was filled with, or None if it is no such text."""
    parts = _FIELD.split(template)
    pattern = "".join(f"(?P<{part}>.*)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    match = re.fullmatch(pattern, text, flags=re.DOTALL)
    return match.groupdict() if match else None


def _messages(system: str, user: str, fields: Mapping[str, str]) -> Messages:
    return ({"role": "system", "content": system}, {"role": "user", "content": fill(user, fields)})
