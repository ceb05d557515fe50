"""The adapter: lmms-eval's requests answered by an Aurora checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from torch import Tensor

from aurora.generation.options import MergeOptions, SamplingOptions
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import load_visual
from aurora.runtime import Dtype, resolve_device, resolve_dtype

BUNDLED_MODEL = Path(__file__).parents[2] / "assets" / "aurora-tiny"
_PLACEHOLDER = "<image>"
_IGNORED = {"image_aspect_ratio", "image_sizes", "max_length", "use_cache"}
"""Settings that tasks give for other models and that mean nothing here."""


class Question(NamedTuple):
    """One request for text."""

    text: str
    """The question."""
    visuals: tuple[Any, ...]
    """Paths of images or videos, or PIL images; empty for text alone."""
    settings: dict[str, Any]
    """Of the generation, as the task has them."""


class AuroraLmms(lmms):  # type: ignore[misc]
    """`--model aurora --model_args pretrained=...,token_kept_ratio=0.2`.

    Several images of a request are the frames of one clip. Neighbouring requests about the same visuals are answered
    together over one encoding, whatever `batch_size` says; answers do not depend on it.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        token_kept_ratio: float = 1.0,
        schedule: str | None = None,
        num_frames: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        **unknown: Any,
    ) -> None:
        """Load a checkpoint.

        Args:
            pretrained: Checkpoint folder or hub id of any layout; None is the bundled aurora-tiny.
            token_kept_ratio: Share of visual tokens to keep.
            schedule: exact, constant or linear; None is the checkpoint's.
            num_frames: Frames taken from a video; None is the checkpoint's.
            dtype: auto, float32, float16 or bfloat16.
            device: Such as cuda:1; None is this process's own.
            batch_size: Accepted for lmms-eval's sake.
            **unknown: None there are.

        Raises:
            ValueError: for an unknown argument, or a checkpoint that cannot be loaded.
        """
        super().__init__()
        if unknown:
            known = "pretrained, token_kept_ratio, schedule, num_frames, dtype, device, batch_size"
            raise ValueError(f"model_args: unknown {', '.join(unknown)}; want some of {known}")
        if dtype not in Dtype.__members__:
            raise ValueError(f"dtype={dtype}: want one of {', '.join(Dtype.__members__)}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None else resolve_device(device)
        path = BUNDLED_MODEL if pretrained is None else pretrained
        self.model = AuroraForConditionalGeneration.from_pretrained(
            path, torch_dtype=resolve_dtype(Dtype[dtype], self.device), device_map=self.device
        )
        self.processor = AuroraProcessor.from_pretrained(path)
        self.num_frames = self.processor.video_processor.num_frames if num_frames is None else int(num_frames)
        self.merging: MergeOptions = {"token_kept_ratio": float(token_kept_ratio)}
        if schedule is not None:
            self.merging["schedule"] = schedule

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer requests.

        Args:
            requests: With args (question, generation settings, doc -> visuals, doc id, task, split).

        Returns:
            One text for each.

        Raises:
            ValueError: if visuals cannot be read or a setting is out of range.
        """
        answers: list[str] = []
        for group in _alike(self._questions(requests)):
            answers += self.answer(group)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), answer)
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Score given answers.

        Args:
            requests: With args (question, answer or doc -> answer, doc -> visuals, doc id, task, split).

        Returns:
            For each the mean negative log-likelihood of the answer's tokens, which is what lmms-eval's tasks take the
            smallest of, in spite of the name; and whether greedy decoding would begin with this answer.

        Raises:
            ValueError: if visuals cannot be read.
        """
        results = []
        for text, target, to_visuals, doc_id, task, split in (request.args for request in requests):
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            results.append(self.score(text, str(answer), self._visuals(to_visuals, doc_id, task, split)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse: Aurora answers one question at a time."""
        raise NotImplementedError("aurora: several rounds are not supported, want tasks with generate_until")

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answer questions with the same visuals and settings.

        Args:
            questions: At least one.

        Returns:
            One text for each, without the stop string.

        Raises:
            ValueError: if visuals cannot be read or a setting is out of range.
        """
        pixels = self.read(questions[0].visuals)
        num_frames = 0 if pixels is None else len(pixels)
        inputs = self.processor(text=[self.prompt(question.text, num_frames) for question in questions])
        made = self.model.generate(
            inputs["input_ids"].to(self.device),
            pixel_values_videos=None if pixels is None else [pixels],
            attention_mask=inputs["attention_mask"].to(self.device),
            tokenizer=self.processor,
            return_dict=True,
            **sampling_options(questions[0].settings),
            **({} if pixels is None else self.merging),
        )
        assert isinstance(made, GenerateOutput)
        texts = [
            self.processor.decode(ids[:length], skip_special_tokens=True)
            for ids, length in zip(made.sequences, made.num_generated, strict=True)
        ]
        stops = stop_strings(questions[0].settings)
        return [
            text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)].strip() for text in texts
        ]

    @torch.inference_mode()
    def score(self, question: str, answer: str, visuals: tuple[Any, ...]) -> tuple[float, bool]:
        """Mean negative log-likelihood of an answer's tokens, and whether each is the most likely one.

        Args:
            question: Without the visuals.
            answer: What to score; a space is put before it where there is none.
            visuals: See `Question`.

        Returns:
            Both.

        Raises:
            ValueError: if visuals cannot be read.
        """
        pixels = self.read(visuals)
        prompt = self.prompt(question, 0 if pixels is None else len(pixels))
        joined = prompt + answer if answer[:1].isspace() or prompt[-1:].isspace() else f"{prompt} {answer}"
        before: list[int] = self.processor(text=prompt)["input_ids"][0].tolist()
        ids: list[int] = self.processor(text=joined)["input_ids"][0].tolist()
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids)))
        targets = torch.tensor(ids[shared:], device=self.device)
        out = self.model(
            torch.tensor([ids], device=self.device),
            pixel_values_videos=None if pixels is None else [pixels],
            **({} if pixels is None else self.merging),
        )
        logits = out.logits[0, -len(targets) - 1 : -1].float()  # visual tokens stand before the answer
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return float(loss), bool((logits.argmax(dim=-1) == targets).all())

    def prompt(self, question: str, num_frames: int) -> str:
        """A question with the checkpoint's own template; placeholders of the task's are taken out."""
        return self.processor.build_prompt(question.replace(_PLACEHOLDER, "").strip(), num_frames)

    def read(self, visuals: tuple[Any, ...]) -> Tensor | None:
        """Normalised frames, (F, 3, H, W), of a video, an image or several images; None where there is nothing.

        Raises:
            ValueError: for another kind of visual, or a file that cannot be read.
        """
        if not visuals:
            return None
        frames: list[Tensor] = []
        for visual in visuals:
            if isinstance(visual, Image.Image):
                picture = np.asarray(visual.convert("RGB"))[None]
            elif isinstance(visual, str | Path):
                picture = load_visual(visual, self.num_frames, strict=False).frames
            else:
                raise ValueError(
                    f"visual: got {type(visual).__name__}, want a PIL image or the path of an image or video"
                )
            frames.append(self.processor.image_processor.preprocess_frames(picture))
        return torch.cat(frames).to(self.device, self.model.dtype)

    def _questions(self, requests: Sequence[Instance]) -> Iterator[Question]:
        """One after the other, so that not all visuals are in memory at once."""
        for text, settings, to_visuals, doc_id, task, split in (request.args for request in requests):
            yield Question(text, self._visuals(to_visuals, doc_id, task, split), settings)

    def _visuals(self, to_visuals: Callable[[Any], Any] | None, doc_id: int, task: str, split: str) -> tuple[Any, ...]:
        found = None if to_visuals is None else to_visuals(self.task_dict[task][split][doc_id])
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list | tuple) else (found,)


def sampling_options(settings: Mapping[str, Any]) -> SamplingOptions:
    """Generation settings of a task in our names.

    Args:
        settings: Such as max_new_tokens, do_sample, temperature, top_p, num_beams, until; None means the default.

    Returns:
        Options of `generate`; a setting that is not known is named in a warning once it turns up.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    options: SamplingOptions = {"max_new_tokens": int(given.pop("max_new_tokens", 1024)), "temperature": 0.0}
    stops, sampling = stop_strings(settings), given.pop("do_sample", None)
    given.pop("until", None)
    if stops:
        options["stop"] = stops
    if sampling or sampling is None:
        options["temperature"] = float(given.pop("temperature", 0.0))
    given.pop("temperature", None)
    if options["temperature"] > 0:
        for key in ("top_p", "top_k"):
            if key in given:
                options[key] = given[key]
    for key in ("num_beams", "repetition_penalty", "length_penalty"):
        if key in given:
            options[key] = given.pop(key)  # type: ignore[literal-required]
    left = sorted(set(given) - _IGNORED - {"top_p", "top_k"})
    if left:
        logger.warning(f"aurora: generation settings without a meaning here: {', '.join(left)}")
    return options


def stop_strings(settings: Mapping[str, Any]) -> list[str]:
    """Where a task wants answers to end."""
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _alike(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Neighbouring questions about the same files with the same settings, which one call can answer."""
    group: list[Question] = []
    for question in questions:
        files = all(isinstance(visual, str | Path) for visual in question.visuals)
        if group and not (files and question.visuals and question[1:] == group[0][1:]):
            yield group
            group = []
        group.append(question)
    if group:
        yield group
