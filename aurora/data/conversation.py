"""LLaVA-style conversations to ids and labels, in the form the released weights were trained on.

Every turn is `USER: {question} ASSISTANT:` with its own beginning-of-sequence id, then the answer, the end-of-sequence
id and a newline. Only the answer and its end are learned (goldens: prompt.json). Where the original accepts exactly one
placeholder a turn, any number is split here, so a clip can have one per frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aurora.processing.chat import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, TURN, TextEncoder, frame_text, tokenize_prompt

IGNORE_INDEX = -100
SEPARATOR = "\n"


class Turn(NamedTuple):
    """One question with its answer."""

    question: str
    """The full prompt of the turn, `USER: ... ASSISTANT:`."""
    answer: str


class EncodedConversation(NamedTuple):
    """A conversation as a model trains on it."""

    input_ids: list[int]
    """Ids with `image_token_index` at every placeholder."""
    labels: list[int]
    """The same ids where something is learned, `IGNORE_INDEX` elsewhere."""


def split_turns(source: Sequence[Mapping[str, Any]], *, frame_template: str = IMAGE_TOKEN) -> list[Turn]:
    """Write a LLaVA conversation as turns, with the placeholders in front of the question that holds them.

    Args:
        source: Messages `{"from": "human" | "gpt", "value": text}`. Human messages in a row join into one question;
            leading answers are dropped.
        frame_template: Text of one frame, see `aurora.processing.chat.frame_text`; numbers run through the
            conversation.

    Raises:
        ValueError: if a message has another form, a question stays unanswered, or there is no turn.
    """
    turns: list[Turn] = []
    question = ""
    num_frames = 0
    asked = False
    for position, message in enumerate(source):
        sender, value = message.get("from"), message.get("value")
        if sender not in ("human", "gpt") or not isinstance(value, str):
            raise ValueError(
                f"conversation[{position}]: got {dict(message)!r}, want from: human or gpt, and a text value"
            )
        if sender == "human":
            frames = value.count(IMAGE_TOKEN)
            if frames:
                value = value.replace(IMAGE_TOKEN, "").strip()
                value = f"{frame_text(frames, frame_template, first=num_frames + 1)}\n{value}".strip()
            num_frames += frames
            question += value
            asked = True
        elif asked:
            turns.append(Turn(TURN.format(question), value))
            question, asked = "", False
    if asked or not turns:
        raise ValueError(
            f"conversation: got {len(source)} messages with {len(turns)} answers; want every question answered"
        )
    return turns


def encode_conversation(
    source: Sequence[Mapping[str, Any]],
    tokenizer: TextEncoder,
    *,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    frame_template: str = IMAGE_TOKEN,
    max_length: int | None = None,
    tokens_per_placeholder: int = 1,
) -> EncodedConversation:
    """Encode a LLaVA conversation for training.

    Args:
        source: See `split_turns`.
        tokenizer: Encodes the pieces.
        image_token_index: Id written for a placeholder.
        frame_template: See `split_turns`.
        max_length: Longest sequence after the placeholders are expanded; the end is cut off. `None` cuts nothing.
        tokens_per_placeholder: Visual tokens that replace one placeholder, for `max_length`.

    Returns:
        Ids and labels of equal length.

    Raises:
        ValueError: if the conversation is malformed, or the cut leaves nothing to learn.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for turn in split_turns(source, frame_template=frame_template):
        asked = tokenize_prompt(turn.question, tokenizer, image_token_index)
        learned = [*tokenizer.encode(turn.answer), tokenizer.eos_id]
        separator = tokenizer.encode(SEPARATOR)
        input_ids += asked + learned + separator
        labels += [IGNORE_INDEX] * len(asked) + learned + [IGNORE_INDEX] * len(separator)
    if max_length is None:
        return EncodedConversation(input_ids, labels)
    kept = length = 0
    for token_id in input_ids:
        length += tokens_per_placeholder if token_id == image_token_index else 1
        if length > max_length:
            break
        kept += 1
    if all(label == IGNORE_INDEX for label in labels[:kept]):
        raise ValueError(
            f"max_length={max_length}: the first answer starts behind it; want a longer limit or fewer frames"
        )
    return EncodedConversation(input_ids[:kept], labels[:kept])
