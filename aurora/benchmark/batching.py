"""What batches and shared prompts save: sixteen mixed clips in one call, and five questions about one clip.

Both sides of a comparison are the same model with the same weights, and their ids are compared before anything is
timed. Shape letters: F frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aurora.benchmark.harness import WrongResultError, compare
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from aurora.processing.processor import AuroraProcessor

SHAPES = ((8, 1.0, 1.0), (1, 1.0, 1.0), (4, 0.75, 1.25), (6, 1.0, 1.25), (2, 1.25, 0.75), (8, 0.75, 0.75))
"""Frames, height and width of the mixed clips, the sides as multiples of the tower's frame."""
RATIOS = (0.2, 1.0, 0.4, 0.1)
"""Kept ratios of the mixed clips."""
QUESTIONS = (
    "Describe the video in detail.",
    "What is the main object in the video, and how does it move? Describe it.",
    "Describe the background.",
    "How does the camera move?",
    "Describe the video in one sentence.",
)
"""Five prompts, as many as VDC has."""
ALONE = "one question"
"""The side that answers the first prompt only."""


class MixedBatch(NamedTuple):
    """Clips that differ in length, size, ratio and prompt."""

    input_ids: list[Tensor]
    """Of each row, (T,)."""
    pixel_values: list[Tensor | None]
    """Of each row, (F, 3, H, W); the last row is text alone."""
    token_kept_ratio: list[float]
    """Of each row."""

    def together(self, pad_token_id: int) -> dict[str, Any]:
        """Arguments of one `generate` for all rows."""
        width = max(map(len, self.input_ids))
        pad = [width - len(ids) for ids in self.input_ids]
        return {
            "input_ids": torch.stack(
                [torch.nn.functional.pad(ids, (n, 0), value=pad_token_id) for ids, n in zip(self.input_ids, pad)]
            ),
            "attention_mask": torch.tensor([[0] * n + [1] * (width - n) for n in pad], device=self.input_ids[0].device),
            "pixel_values_videos": self.pixel_values,
            "token_kept_ratio": self.token_kept_ratio,
        }

    def alone(self, row: int) -> dict[str, Any]:
        """Arguments of `generate` for one row."""
        pixels = self.pixel_values[row]
        return {
            "input_ids": self.input_ids[row][None],
            "pixel_values_videos": None if pixels is None else pixels[None],
            "token_kept_ratio": self.token_kept_ratio[row],
        }


def mixed_batch(
    model: AuroraForConditionalGeneration, processor: AuroraProcessor, *, num_rows: int = 16, seed: int = 0
) -> MixedBatch:
    """Make a batch of random clips that are alike in nothing; the last row has none.

    Args:
        model: For which model; the clips are on its device.
        processor: Of the same checkpoint.
        num_rows: Rows.
        seed: Of the pixels.

    Returns:
        The batch.
    """
    side, patch = model.config.vision.image_size, model.config.vision.patch_size
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, ratios = [], [], []
    for row in range(num_rows):
        num_frames, high, wide = SHAPES[row % len(SHAPES)]
        size = [max(1, round(scale * side / patch)) * patch for scale in (high, wide)]
        clip = None if row == num_rows - 1 else torch.randn(num_frames, 3, *size, generator=generator)
        question = QUESTIONS[row % len(QUESTIONS)]
        prompt = processor.build_prompt(question, 0 if clip is None else num_frames)
        ids.append(processor(text=prompt)["input_ids"][0].to(model.device))
        pixels.append(None if clip is None else clip.to(model.device, model.dtype))
        ratios.append(RATIOS[row % len(RATIOS)])
    return MixedBatch(ids, pixels, ratios)


def measure_mixed_batch(
    model: AuroraForConditionalGeneration,
    processor: AuroraProcessor,
    *,
    num_rows: int = 16,
    max_new_tokens: int = 64,
    repeats: int = 3,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Time one call for mixed clips against one call for each.

    Args:
        model: The captioner, in float32 if the ids shall be equal.
        processor: Of the same checkpoint.
        num_rows: Rows.
        max_new_tokens: Tokens of each answer; none ends before.
        repeats: Rounds.
        threads: CPU threads of both sides.

    Returns:
        Rows of the harness with tokens per second of decoding (`decode_tokens_s`), of prefill and decoding
        (`generated_tokens_s`) and of everything (`end_to_end_tokens_s`), each with its ratio to single calls.

    Raises:
        WrongResultError: if the ids differ.
    """
    batch = mixed_batch(model, processor, num_rows=num_rows)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": -1, "return_dict": True}

    def one_by_one() -> list[GenerateOutput]:
        return [_made(model.generate(**batch.alone(row), **options)) for row in range(num_rows)]

    def together() -> list[GenerateOutput]:
        return [_made(model.generate(**batch.together(model.config.pad_token_id), **options))]

    rows = _timed({"single calls": one_by_one, "one batch": together}, repeats, threads, model.device)
    for row in rows:
        row["op"] = f"{num_rows} mixed clips"
    return rows


def measure_shared_prompts(
    model: AuroraForConditionalGeneration,
    processor: AuroraProcessor,
    *,
    questions: Sequence[str] = QUESTIONS,
    num_frames: int = 8,
    token_kept_ratio: float = 1.0,
    max_new_tokens: int = 32,
    repeats: int = 5,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Time several questions about one clip in one call, against one question and against one call for each.

    Args:
        model: The captioner, in float32 if the ids shall be equal.
        processor: Of the same checkpoint.
        questions: What to ask.
        num_frames: Frames of the clip.
        token_kept_ratio: How much of them is kept.
        max_new_tokens: Tokens of each answer; none ends before.
        repeats: Rounds.
        threads: CPU threads of all sides.

    Returns:
        Rows of the harness; `cost` is the time over that of one question.

    Raises:
        WrongResultError: if the ids differ.
    """
    side = model.config.vision.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, num_frames, 3, side, side, generator=generator).to(model.device, model.dtype)
    inputs = [processor(text=processor.build_prompt(text, num_frames)).to(model.device) for text in questions]
    joint = processor(text=[processor.build_prompt(text, num_frames) for text in questions]).to(model.device)
    options: dict[str, Any] = {
        "pixel_values_videos": pixels,
        "token_kept_ratio": token_kept_ratio,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": -1,
        "return_dict": True,
    }

    def separate() -> list[GenerateOutput]:
        return [_made(model.generate(**one, **options)) for one in inputs]

    def shared() -> list[GenerateOutput]:
        return [_made(model.generate(**joint, **options))]

    def one() -> list[GenerateOutput]:
        return [_made(model.generate(**inputs[0], **options))]

    sides = {f"{len(inputs)} calls": separate, "one call": shared, ALONE: one}
    calls, together, alone = _timed(sides, repeats, threads, model.device)
    for row in (alone, calls, together):
        row["op"] = f"{len(inputs)} questions, {num_frames} frames"
        row["cost"] = row["p50_ms"] / alone["p50_ms"]
    return [alone, calls, together]


def _timed(
    sides: Mapping[str, Callable[[], list[GenerateOutput]]], repeats: int, threads: int, device: torch.device
) -> list[dict[str, Any]]:
    """Time sides that generate the same tokens; the median seconds of each phase become tokens per second."""
    made: dict[str, list[list[GenerateOutput]]] = {name: [] for name in sides}

    def recorded(name: str) -> Callable[[], list[GenerateOutput]]:
        def call() -> list[GenerateOutput]:
            made[name].append(sides[name]())
            return made[name][-1]

        return call

    rows = compare(
        {name: recorded(name) for name in sides},
        repeats=repeats,
        threads_per_side=[threads],
        check=_check_ids,
        device=device,
    )
    for row in rows:
        runs = made[row["side"]][-repeats:]
        num_tokens = sum(sum(out.num_generated) for out in runs[0])
        for name, phases in {
            "decode": ("decode",),
            "generated": ("prefill", "decode"),
            "end_to_end": ("encode", "prefill", "decode"),
        }.items():
            seconds = sorted(sum(out.seconds[phase] for out in run for phase in phases) for run in runs)
            row[f"{name}_tokens_s"] = num_tokens / seconds[len(seconds) // 2]
            row[f"{name}_ratio"] = row[f"{name}_tokens_s"] / rows[0][f"{name}_tokens_s"]
    return rows


def _check_ids(name: str, got: list[GenerateOutput], want: list[GenerateOutput]) -> None:
    ids, expected = ([row.tolist() for out in outs for row in out.sequences] for outs in (got, want))
    if name == ALONE:
        expected = expected[:1]
    if ids != expected:
        wrong = next(row for row, pair in enumerate(zip(ids, expected)) if pair[0] != pair[1])
        raise WrongResultError(f"{name}: row {wrong} has other ids than alone")


def _made(output: Tensor | GenerateOutput) -> GenerateOutput:
    assert isinstance(output, GenerateOutput)
    return output
