"""What one call may say about merging and sampling, and how it changes a copy of the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypedDict, TypeVar, cast, get_type_hints

from aurora.generation.sampling import SamplingConfig
from aurora.model.merge import MERGE_CHOICES, MergeConfig, Schedule, SizeBias, TextPositions, TextSizeBias

E = TypeVar("E", bound=Enum)


class MergeOptions(TypedDict, total=False):
    """Fields of `MergeConfig`; absent or None means the default of the model. A list has a value for each clip."""

    token_kept_ratio: float | Sequence[float | None] | None
    visual_token_budget: int | Sequence[int | None] | None
    slowfast: bool | Sequence[bool | None] | None
    schedule: Schedule | str | Sequence[Schedule | str | None] | None
    inflection: float | Sequence[float | None] | None
    r: list[int] | Sequence[list[int] | None] | None
    size_bias: SizeBias | str | Sequence[SizeBias | str | None] | None
    text_size_bias: TextSizeBias | str | Sequence[TextSizeBias | str | None] | None
    text_positions: TextPositions | str | Sequence[TextPositions | str | None] | None


class SamplingOptions(TypedDict, total=False):
    """Fields of `SamplingConfig`."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    eos_token_id: int | list[int] | None
    stop: str | list[str]
    seed: int | list[int] | None
    num_beams: int
    length_penalty: float
    early_stopping: bool


class GenerateOptions(MergeOptions, SamplingOptions, total=False):
    """Both."""


def split_options(options: GenerateOptions) -> tuple[SamplingConfig, MergeOptions]:
    """Check the sampling options and hand on the others.

    Args:
        options: Of one call.

    Returns:
        The sampling, and what concerns merging.

    Raises:
        ValueError: for an unknown option or a value out of range.
    """
    _refuse_unknown(options, GenerateOptions)
    merging = {key: value for key, value in options.items() if key in get_type_hints(MergeOptions)}
    sampling: dict[str, Any] = {key: value for key, value in options.items() if key not in merging}
    return SamplingConfig(**sampling), cast(MergeOptions, merging)


def merge_for_call(base: MergeConfig, options: MergeOptions) -> MergeConfig:
    """The defaults with one call's options in place.

    A ratio given here overrides a budget or a list per layer of the defaults, which would otherwise decide.

    Args:
        base: Defaults of the model; not changed.
        options: Of the call.

    Returns:
        A new config.

    Raises:
        ValueError: for an unknown option or a value out of range.
    """
    _refuse_unknown(options, MergeOptions)
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    for key, kind in MERGE_CHOICES.items():
        if key in given:
            given[key] = _member(kind, key, given[key])
    if "token_kept_ratio" in given:
        given.setdefault("visual_token_budget", None)
        if base.schedule is Schedule.list:
            given.setdefault("schedule", Schedule.constant)
    if given.get("schedule", base.schedule) is not Schedule.list:
        given.setdefault("r", [])
    return dataclasses.replace(base, **given)


def _refuse_unknown(options: Mapping[str, object], known: type) -> None:
    names = list(get_type_hints(known))
    for key in options:
        if key not in names:
            raise ValueError(f"{key}: no such option, want one of {', '.join(names)}")


def _member(kind: type[E], key: str, value: object) -> E:
    if isinstance(value, kind):
        return value
    names = [member.name for member in kind]
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{key}={value!r}: want one of {', '.join(names)}")
    return kind[value]
