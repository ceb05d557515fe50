"""OpenAI's chat completions as a captioner answers them: what a request may hold, and the form of the replies.

Beside OpenAI's own fields a request may name how visual tokens merge (`token_kept_ratio` and its kin), how many frames
of a video are looked at (`num_frames`), and what vLLM and SGLang add (`top_k`, `min_p`, `repetition_penalty`,
`min_tokens`, `video_url`). What would change an answer but is not supported is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from aurora.generation.options import MergeOptions
from aurora.processing.chat import IMAGE_TOKEN

MAX_ANSWERS = 16
"""Largest `n`."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PARTS = ("text", "image_url", "video_url")

# Fields that change nothing here.
_UNREAD = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
# Fields that are accepted with these values alone, which ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_SAMPLING: dict[str, tuple[str, type]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "min_tokens": ("min_new_tokens", int),
    "max_completion_tokens": ("max_new_tokens", int),
    "max_tokens": ("max_new_tokens", int),
    "seed": ("seed", int),
}
"""Field -> the setting it is here, and its type; of two names for one, the later one counts less."""
_MERGING: dict[str, type] = {
    "token_kept_ratio": float,
    "visual_token_budget": int,
    "slowfast": bool,
    "schedule": str,
    "inflection": float,
    "size_bias": str,
    "text_size_bias": str,
    "text_positions": str,
    "r": list,
}
_OWN = {"model", "messages", "n", "stream", "stream_options", "logprobs", "stop", "num_frames"}
_NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "text", list: "a list"}
assert _MERGING.keys() == get_type_hints(MergeOptions).keys()


class RequestError(ValueError):
    """A request that cannot be answered as it is."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        """Keep what to tell the client.

        Args:
            message: One line.
            param: The field it is about.
            status: Of HTTP.
        """
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """What a client asks, checked in form; whether it fits the model is not known yet."""

    model: str
    """Name of the model."""
    messages: list[dict[str, Any]]
    """Of each message role and content: a list of `{"type": "text", "text": ...}` and `{"type": "visual"}`, in whose
    place comes the next of `visuals`."""
    visuals: list[str]
    """URLs of images and videos, in their order."""
    sampling: dict[str, Any]
    """Given fields of `SamplingConfig`."""
    merging: dict[str, Any]
    """Given fields of `MergeConfig`."""
    num_frames: int | None
    """Frames of each video; None leaves it to the server."""
    num_answers: int
    """Answers wanted."""
    stream: bool
    """Whether they come piece by piece."""
    include_usage: bool
    """Whether the last piece says what they took."""
    logprobs: bool
    """Whether each token's log-probability is wanted."""


def read_request(body: object) -> ChatRequest:
    """Read the body of a request.

    Args:
        body: What the JSON holds.

    Returns:
        The request.

    Raises:
        RequestError: if a field is missing, unknown, of another type, or asks for what is not supported.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"body: got a JSON {type(body).__name__}, want an object")
    given = {key: value for key, value in body.items() if value is not None and key not in _UNREAD}
    for key, value in given.items():
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                want = " or ".join(json.dumps(one) for one in _NEUTRAL[key])
                raise RequestError(f"{key}={_shown(value)}: not supported, want {want}", param=key)
        elif key not in _SAMPLING and key not in _MERGING and key not in _OWN:
            known = sorted({*_SAMPLING, *_MERGING, *_OWN})
            raise RequestError(f"{key}: no such field, want one of {', '.join(known)}", param=key)
    messages, visuals = _read_messages(given.get("messages"))
    options = _typed(given, "stream_options", dict, {})
    answers = _typed(given, "n", int, 1)
    if not 1 <= answers <= MAX_ANSWERS:
        raise RequestError(f"n={answers}: want 1 to {MAX_ANSWERS}", param="n")
    frames = _typed(given, "num_frames", int, None)
    if frames is not None and frames < 1:
        raise RequestError(f"num_frames={frames}: want at least 1", param="num_frames")
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in _typed(given, "r", list, [])):
        raise RequestError(f"r={_shown(given['r'])}: want whole numbers", param="r")
    return ChatRequest(
        model=_typed(given, "model", str, ""),
        messages=messages,
        visuals=visuals,
        sampling=_read_sampling(given),
        merging={key: _typed(given, key, kind, None) for key, kind in _MERGING.items() if key in given},
        num_frames=frames,
        num_answers=answers,
        stream=_typed(given, "stream", bool, False),
        include_usage=_typed(options, "include_usage", bool, False),
        logprobs=_typed(given, "logprobs", bool, False),
    )


def _read_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    for key, (name, kind) in _SAMPLING.items():
        if key in given:
            sampling.setdefault(name, _typed(given, key, kind, None))
    if sampling.get("top_k") == -1:  # vLLM's way to say all
        sampling["top_k"] = 0
    if "seed" in sampling:
        sampling["seed"] %= 2**63
    if "stop" in given:
        stop = given["stop"]
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop={_shown(given['stop'])}: want a text that is not empty, or a list", param="stop")
        sampling["stop"] = stop
    return sampling


def _read_messages(messages: object) -> tuple[list[dict[str, Any]], list[str]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: want a list of at least one message", param="messages")
    read: list[dict[str, Any]] = []
    visuals: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where}: got a {type(message).__name__}, want an object", param="messages")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise RequestError(f"{where}.role={_shown(role)}: want one of {', '.join(_ROLES)}", param="messages")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise RequestError(f"{where}.content: want a text, or a list of at least one part", param="messages")
        items: list[dict[str, Any]] = []
        for place, part in enumerate(parts):
            here = f"{where}.content[{place}]"
            kind, value = _read_part(part, here)
            if kind == "text":
                items.append({"type": "text", "text": value})
            elif role != "user":
                raise RequestError(f"{here}: got a {kind} in a message of {role}, want it in one of user",
                                   param="messages")  # fmt: skip
            else:
                items.append({"type": "visual"})
                visuals.append(value)
        read.append({"role": _ROLES[role], "content": items})
    if read[-1]["role"] != "user":
        raise RequestError("messages: the last one is not of user, want a question to answer", param="messages")
    return read, visuals


def _read_part(part: object, where: str) -> tuple[str, str]:
    """Kind of a part, and its text or URL."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in _PARTS:
        raise RequestError(f"{where}: got type {_shown(kind)}, want one of {', '.join(_PARTS)}", param="messages")
    value = part.get(str(kind))
    if kind != "text" and isinstance(value, Mapping):
        value = value.get("url")
    if not isinstance(value, str):
        want = '"text": ...' if kind == "text" else f'"{kind}": {{"url": ...}}'
        raise RequestError(f"{where}: want {want} in a part of type {kind}", param="messages")
    if kind == "text" and IMAGE_TOKEN in value:
        raise RequestError(f"{where}: holds {IMAGE_TOKEN}, want none: one is placed for each frame", param="messages")
    return str(kind), value


def _typed(given: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """The value of a field, which must be of a type; whole numbers are numbers, truth values are not."""
    if given.get(key) is None:
        return default
    value = given[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{key}={_shown(value)}: want {_NAMES.get(kind, 'an object')}", param=key)
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One finished answer."""

    text: str
    """What was written, up to a stop string."""
    finish_reason: str
    """stop (the model or a stop string ended it) or length (no more tokens, context or time)."""
    num_tokens: int
    """Tokens generated."""
    logprobs: list[tuple[str, float]] | None = None
    """Of each token its text and log-probability, if they were wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a request took."""

    prompt_tokens: int
    """Text and visual tokens that the language model read."""
    visual_tokens_per_frame: list[int]
    """Of these the visual ones, for each frame."""
    num_patches: int
    """Visual tokens without merging."""
    seconds: dict[str, float]
    """Of each phase; those of a batch in equal shares."""
    cached: bool
    """Whether the encoding of the frames was there already."""


class Replies:
    """Writes the objects that answer one request."""

    def __init__(self, name: str, model: str, created: int) -> None:
        """Keep what all of them hold.

        Args:
            name: Id of the completion.
            model: Name of the model.
            created: Seconds since 1970.
        """
        self._head = {"id": name, "created": created, "model": model}

    def whole(self, answers: Sequence[Answer], costs: Costs) -> dict[str, Any]:
        """The reply to a request without `stream`."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
                "logprobs": _logprobs(answer),
            }
            for index, answer in enumerate(answers)
        ]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": _usage(answers, costs), "aurora": _extra(costs)}

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk of an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A chunk with the next piece of its text."""
        return self._chunk(index, {"content": text}, None)

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """The last chunk of an answer; it has the log-probabilities of all tokens."""
        chunk = self._chunk(index, {}, answer.finish_reason)
        chunk["choices"][0]["logprobs"] = _logprobs(answer)
        return chunk

    def usage(self, answers: Sequence[Answer], costs: Costs) -> dict[str, Any]:
        """The chunk behind the last one, for `stream_options.include_usage`."""
        head = {**self._head, "object": "chat.completion.chunk"}
        return {**head, "choices": [], "usage": _usage(answers, costs), "aurora": _extra(costs)}

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The object that OpenAI's clients read an error from.

    Args:
        message: One line.
        status: Of HTTP.
        param: The field it is about.
        code: A word for programs.
    """
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _usage(answers: Sequence[Answer], costs: Costs) -> dict[str, Any]:
    written = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": costs.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": costs.prompt_tokens + written,
    }


def _extra(costs: Costs) -> dict[str, Any]:
    return {
        "visual_tokens": sum(costs.visual_tokens_per_frame),
        "visual_tokens_per_frame": costs.visual_tokens_per_frame,
        "patches": costs.num_patches,
        "encoding_was_cached": costs.cached,
        "seconds": {phase: round(seconds, 4) for phase, seconds in costs.seconds.items()},
    }


def _logprobs(answer: Answer) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None
    return {
        "content": [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in answer.logprobs
        ]
    }
