"""Prompts: the Vicuna form the released weights know, chat templates, and text around visual placeholders to ids.

A clip is `<image> <image> ...` joined by single spaces, one placeholder per frame, then a newline and the question,
inside `USER: ... ASSISTANT:` without any system text. The finished string is split at every `<image>` and each piece is
encoded on its own, the first with the beginning-of-sequence id (goldens: prompt.json).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200
TURN = "USER: {} ASSISTANT:"

DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set frames = message.content | selectattr('type', 'eq', 'image') | map(attribute='placeholder') | join(' ') %}
    {%- set text = message.content | selectattr('type', 'eq', 'text') | map(attribute='text') | join('\\n') %}
    {%- if message.role == 'system' %}
        {{- text ~ ' ' }}
    {%- elif message.role == 'user' %}
        {{- 'USER: ' ~ frames ~ ('\\n' if frames and text else '') ~ text }}
        {{- ' ASSISTANT:' if not loop.last or add_generation_prompt else '' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ text ~ eos_token ~ '\\n' ~ ('' if loop.last else bos_token) }}
    {%- else %}
        {{- raise_exception('role=' ~ message.role ~ ': want system, user or assistant') }}
    {%- endif %}
{%- endfor %}"""


class TextEncoder(Protocol):
    """What prompts and conversations need of a tokenizer."""

    bos_id: int | None
    eos_id: int

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Return the ids of a text."""
        ...


def check_frame_template(template: str) -> str:
    """Return the template if it holds exactly one placeholder.

    Raises:
        ValueError: otherwise.
    """
    if template.count(IMAGE_TOKEN) != 1:
        raise ValueError(f"frame_template={template!r}: want exactly one {IMAGE_TOKEN}")
    return template


def frame_text(num_frames: int, frame_template: str = IMAGE_TOKEN, *, first: int = 1) -> str:
    """Return the placeholders of a clip's frames, joined by single spaces.

    Args:
        num_frames: Number of placeholders.
        frame_template: Text of one frame: one `<image>`, and `{index}` where its number shall stand.
        first: Number of the first frame.
    """
    check_frame_template(frame_template)
    return " ".join(frame_template.replace("{index}", str(first + i)) for i in range(num_frames))


def build_prompt(question: str, num_frames: int, frame_template: str = IMAGE_TOKEN) -> str:
    """Return the prompt for one question about an image or a clip.

    Args:
        question: What to ask.
        num_frames: Frames of the clip, 1 for an image, 0 for text alone.
        frame_template: See `frame_text`.

    Returns:
        `USER: <image> <image>` and so on, a newline, then the question and ` ASSISTANT:`.
    """
    frames = frame_text(num_frames, frame_template)
    return TURN.format(f"{frames}\n{question}" if frames else question)


def tokenize_prompt(text: str, tokenizer: TextEncoder, image_token_index: int = IMAGE_TOKEN_INDEX) -> list[int]:
    """Encode a prompt around its placeholders.

    Args:
        text: Prompt with `<image>` wherever visual tokens go.
        tokenizer: Encodes the pieces between the placeholders.
        image_token_index: Id written for a placeholder.

    Returns:
        Ids: beginning-of-sequence, first piece, placeholder, second piece, and so on.
    """
    first, *rest = text.split(IMAGE_TOKEN)
    ids = tokenizer.encode(first, add_bos=True)
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:  # the template had already written it
        del ids[0]
    for piece in rest:
        ids += [image_token_index, *tokenizer.encode(piece)]
    return ids


def apply_chat_template(
    conversation: Sequence[Mapping[str, Any]],
    chat_template: str | None = None,
    *,
    add_generation_prompt: bool = False,
    frame_template: str = IMAGE_TOKEN,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """Write a conversation as the text a model continues.

    Args:
        conversation: Messages with `role` and `content`; content is text or a list of `{"type": "text", "text": ...}`,
            `{"type": "image"}` and `{"type": "video", "num_frames": n}`. An image item may also stand for a whole clip.
        chat_template: Jinja2 source, rendered in a sandbox; `None` is the Vicuna form.
        add_generation_prompt: End with the cue for an answer.
        frame_template: Text of one frame, see `frame_text`; numbers run through the whole conversation.
        bos_token: Beginning of sequence, written in front of later turns.
        eos_token: End of sequence, written after an answer.

    Raises:
        ValueError: if a message has another form or the template fails.
    """
    messages = _normalise(conversation, frame_template)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(chat_template if chat_template is not None else DEFAULT_CHAT_TEMPLATE).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos_token, eos_token=eos_token
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error}") from None
    except (TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from None


def _normalise(conversation: Sequence[Mapping[str, Any]], frame_template: str) -> list[dict[str, Any]]:
    """Check the messages and spell every frame out as an image item with its `placeholder`."""
    check_frame_template(frame_template)
    if isinstance(conversation, Mapping | str) or not conversation:
        raise ValueError(f"conversation: got {conversation!r}, want a list of messages with role and content")
    messages = []
    num_frames = 0
    for position, message in enumerate(conversation):
        where = f"conversation[{position}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where}: got {message!r}, want a mapping with role and content")
        content = message["content"]
        if not isinstance(content, str | list | tuple):
            raise ValueError(f"{where}: got content {content!r}, want text or a list of items")
        items: list[dict[str, Any]] = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "text" and isinstance(item.get("text"), str):
                items.append({"type": "text", "text": item["text"]})
            elif kind in ("image", "video"):
                frames = item.get("num_frames", 1)
                if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
                    raise ValueError(f"{where}: num_frames={frames!r}: want at least 1")
                texts = [frame_text(1, frame_template, first=num_frames + i + 1) for i in range(frames)]
                items += [{"type": "image", "placeholder": text} for text in texts]
                num_frames += frames
            else:
                raise ValueError(f"{where}: got {item!r}, want an item of type text, image or video")
        messages.append({"role": message["role"], "content": items})
    return messages


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
