"""The verb `caption`: an image, a video, a folder or a glob in; captions out, on the terminal and as JSON lines."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
import torch
from omegaconf import MISSING, DictConfig
from torch import Tensor

from aurora.config import load_config, register_schema
from aurora.generation.engine import Streamer
from aurora.generation.memory import available_bytes, row_bytes
from aurora.generation.sampling import SamplingConfig
from aurora.generation.streaming import TextCallback, cut_at_stop
from aurora.loading import BUNDLED_MODEL as BUNDLED_MODEL
from aurora.loading import ModelConfig
from aurora.model.merge import MergeConfig
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from aurora.processing.chat import IMAGE_TOKEN
from aurora.processing.inputs import find_inputs
from aurora.processing.prefetch import read_ahead
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import SampledVideo, load_visual
from aurora.records import JsonLines
from aurora.runtime import describe_error

if TYPE_CHECKING:
    from rich.progress import Progress

MAX_AUTO_BATCH = 16
"""Inputs in a batch with batch_size=auto: more gain little, and captions would come in ever larger bursts."""
READ_AHEAD = 2
"""Files that are read while others are captioned, and threads that read them."""
PROMPT_TOKENS = 512
"""What the memory estimate allows for the text of a prompt."""


@dataclass(kw_only=True, slots=True)
class CaptionConfig(ModelConfig):
    """Describe images and videos."""

    visual_input: str = MISSING
    """An image, a video, a folder of them or a glob such as "clips/*.mp4"."""
    prompt: str = "Describe the video in detail."
    """What to ask about each input."""
    num_frm: int = 8
    """Frames sampled from a video, evenly over its length; an image is one frame."""
    max_new_tokens: int = 2048
    """At most so many new tokens; generation stops at the end-of-text token."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this probability, in (0, 1]."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 is no limit."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens already written by this; 1 is no penalty."""
    num_beams: int = 1
    """Beams of a beam search; 1 is none."""
    length_penalty: float = 1.0
    """Beams are compared by log-probability / length to this power: above 0 favours long captions."""
    early_stopping: bool = False
    """End a beam search with its first num_beams captions, even where a better one seems possible."""
    min_new_tokens: int = 0
    """No caption ends before so many tokens."""
    stop: list[str] = field(default_factory=list)
    """A caption ends before the first of these texts."""
    batch_size: int | str = "auto"
    """Inputs captioned together: a number, or auto for as many as memory allows, up to 16; captions are the same."""
    stream: bool = True
    """Print the caption of a single input while it is written."""
    output: str | None = None
    """JSON-lines file for the results; a run that finds rows of the same settings there continues behind them."""
    overwrite: bool = False
    """Begin the output file anew."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ModelConfig.__post_init__(self)
        if self.num_frm < 1:
            raise ValueError(f"num_frm={self.num_frm}: want at least 1 frame")
        if IMAGE_TOKEN in self.prompt:
            raise ValueError(
                f"prompt: holds {self.prompt.count(IMAGE_TOKEN)} {IMAGE_TOKEN} of its own; want none, one is placed "
                "for each frame"
            )
        if self.visual_input == "":
            raise ValueError("visual_input='': want an image, a video, a folder or a glob")
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise ValueError(f"batch_size={self.batch_size}: want auto or a number of at least 1")
        _ = self.sampling  # checks the rest

    @property
    def sampling(self) -> SamplingConfig:
        """How the next token is chosen."""
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            min_new_tokens=self.min_new_tokens,
            stop=self.stop,
            seed=self.seed,
        )


register_schema("caption_schema", CaptionConfig)


class Clip(NamedTuple):
    """One input, read and preprocessed."""

    path: Path
    """Its file."""
    visual: SampledVideo
    """Where its frames come from; the frames themselves are in `pixels`."""
    pixels: Tensor
    """(F, 3, S, S)."""
    seconds: dict[str, float]
    """How long reading took: load_video and preprocess."""


class Captioner:
    """A loaded model that answers one prompt about one file after another."""

    def __init__(
        self, model: AuroraForConditionalGeneration, processor: AuroraProcessor, config: CaptionConfig
    ) -> None:
        """Keep a model with its processor; `config` says what to ask and how."""
        self.model = model
        self.processor = processor
        self.config = config
        if config.image_aspect_ratio is not None:
            images = processor.image_processor
            images.config = dataclasses.replace(images.config, aspect_ratio=config.image_aspect_ratio)

    @classmethod
    def load(cls, config: CaptionConfig) -> Captioner:
        """Load what `config.model_path` names, onto its device.

        Raises:
            ValueError: if the device does not exist or the checkpoint cannot be read.
        """
        model, processor = config.load()
        return cls(model, processor, config)

    def caption(self, path: Path, *, streamer: Streamer | None = None) -> dict[str, Any]:
        """Describe one image or video.

        Args:
            path: The file.
            streamer: Gets the tokens as they come.

        Returns:
            A row for the results: caption, frames, tokens and seconds; see `CaptionConfig` for the settings it repeats.

        Raises:
            ValueError: if the file is not an image or a video, or its tokens do not fit the model.
        """
        return self.caption_together([self.read(path)], streamer=streamer)[0]

    def caption_all(self, paths: Sequence[Path]) -> Generator[dict[str, Any], None, None]:
        """Describe many files, several at a time, while the next ones are read.

        Args:
            paths: The files.

        Yields:
            A row for each in their order, that of a bad file with `error` instead of a caption; captions are those of
            `caption`.
        """
        most = MAX_AUTO_BATCH if isinstance(self.config.batch_size, str) else self.config.batch_size
        room = available_bytes(self.model.device) if self.config.batch_size == "auto" else None
        batch: list[tuple[Path, Clip | Exception]] = []
        used = 0
        with closing(read_ahead(paths, self.read, depth=most + READ_AHEAD, num_threads=READ_AHEAD)) as clips:
            for path, clip in clips:
                needed = self._bytes_of(clip) if isinstance(clip, Clip) else 0
                if batch and (len(batch) == most or (room is not None and used + needed > room)):
                    yield from self._rows_of(batch)
                    batch, used = [], 0
                batch.append((path, clip))
                used += needed
            yield from self._rows_of(batch)

    def read(self, path: Path) -> Clip:
        """Decode and preprocess one image or video; of a clip shorter than num_frm all frames are taken.

        Raises:
            ValueError: if the file is not an image or a video.
        """
        started = time.perf_counter()
        visual = load_visual(path, self.config.num_frm, strict=False)
        loaded = time.perf_counter()
        pixels = self.processor.image_processor.preprocess_frames(visual.frames)  # (F, 3, S, S)
        seconds = {"load_video": loaded - started, "preprocess": time.perf_counter() - loaded}
        return Clip(path, dataclasses.replace(visual, frames=visual.frames[:0]), pixels, seconds)

    def caption_together(self, clips: Sequence[Clip], *, streamer: Streamer | None = None) -> list[dict[str, Any]]:
        """Describe clips in one call of the model.

        Args:
            clips: What `read` returned; they may differ in length.
            streamer: Gets the tokens of each step.

        Returns:
            A row for each. `seconds` of the model's phases are a clip's share of the batch's.

        Raises:
            ValueError: if the tokens of one do not fit the model.
        """
        config = self.config
        inputs = self.processor(text=[self.processor.build_prompt(config.prompt, len(clip.pixels)) for clip in clips])
        made = self.model.generate(
            inputs["input_ids"].to(self.model.device),
            pixel_values_videos=[clip.pixels.to(self.model.device, self.model.dtype) for clip in clips],
            attention_mask=inputs["attention_mask"].to(self.model.device),
            streamer=streamer,
            tokenizer=self.processor,
            return_dict=True,
            **_columns(config.effective_merge),
            **dataclasses.asdict(config.sampling),
        )
        assert isinstance(made, GenerateOutput)
        phases = {phase: seconds / len(clips) for phase, seconds in made.seconds.items()}
        rows = []
        for number, clip in enumerate(clips):
            ids = made.sequences[number, : made.num_generated[number]]
            per_frame = made.visual_token_counts[number]
            text = self.processor.decode(ids, skip_special_tokens=True)
            row = {
                "file": str(clip.path),
                "caption": cut_at_stop(text, config.sampling.stop_strings).strip(),
                "frames": [int(index) for index in clip.visual.indices],
                "total_frames": int(clip.visual.total_frames),
                "visual_tokens": sum(per_frame),
                "visual_tokens_per_frame": per_frame,
                "patches": sum(plan.num_patches for plan in made.plans[number]),
                "new_tokens": made.num_generated[number],
                "stopped_by": made.stopped_by[number],
                "seconds": {phase: round(value, 4) for phase, value in (clip.seconds | phases).items()},
            }
            if len(clip.pixels) < config.num_frm and not clip.visual.is_image:
                row["note"] = f"num_frm={config.num_frm}, but the clip has {_frames(len(clip.pixels))}; all are taken"
            rows.append(row)
        return rows

    def _rows_of(self, batch: Sequence[tuple[Path, Clip | Exception]]) -> Iterator[dict[str, Any]]:
        """Rows of files that were read or were not; if one spoils the batch, each is captioned alone."""
        clips = [clip for _, clip in batch if isinstance(clip, Clip)]
        rows: dict[Path, dict[str, Any]] = {}
        if len(clips) > 1:
            with suppress(ValueError, torch.OutOfMemoryError):
                rows = {Path(row["file"]): row for row in self.caption_together(clips)}
        for path, clip in batch:
            try:
                if isinstance(clip, Exception):
                    raise clip
                yield rows[path] if path in rows else self.caption_together([clip])[0]
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                # The only row of the call is this file's.
                yield {"file": str(path), "error": describe_error(error).replace("row 0: ", f"{path}: ", 1)}

    def _bytes_of(self, clip: Clip) -> int:
        """Estimate the memory of a clip's row; text is little beside frames."""
        num_frames, _, height, width = clip.pixels.shape
        try:
            plans = self.model.model.plan(num_frames, height, width, self.config.effective_merge)
        except ValueError:
            return 0  # it will be refused
        return row_bytes(
            self.model.model,
            prompt_tokens=sum(plan.num_visual_tokens for plan in plans) + PROMPT_TOKENS,
            new_tokens=self.config.max_new_tokens,
            num_pixels=clip.pixels.numel(),
            num_beams=self.config.num_beams,
        )


def caption(config: CaptionConfig) -> list[dict[str, Any]]:
    """Caption every input, printing as it goes.

    One bad file among several is reported and the others are captioned.

    Args:
        config: What to caption and how.

    Returns:
        The rows of this run, in the order of the files; a bad file's row holds `error` instead of a caption.

    Raises:
        ValueError: if no input could be captioned.
        FileNotFoundError: if there is no input.
    """
    files = find_inputs(config.visual_input)
    shared = shared_columns(config)
    with ExitStack() as stack:
        log = None
        if config.output is not None:
            if Path(config.output).expanduser().resolve() in {file.resolve() for file in files}:
                raise ValueError(f"output={config.output}: is one of the inputs, want another file")
            log = stack.enter_context(JsonLines(config.output, overwrite=config.overwrite))
        todo = not_done(files, [] if log is None else log.rows, shared)
        if len(todo) < len(files):
            print(f"{len(files) - len(todo)} of {len(files)} are in {config.output} already", file=sys.stderr)
        if not todo:
            return []
        captioner = Captioner.load(config)
        if len(files) == 1:
            typewriter = _Typewriter()
            streamer = TextCallback(captioner.processor, typewriter.put, stop=config.stop) if config.stream else None
            row = captioner.caption(todo[0], streamer=streamer) | shared
            print("" if config.stream else row["caption"], flush=True)
            _print_note(row)
            print(summary(row), file=sys.stderr)
            if log is not None:
                log.append(row)
            return [row]
        return _caption_many(captioner, todo, log, shared)


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="caption")
def main(raw: DictConfig) -> None:
    """Caption what the command line names; called through `aurora.cli.run`."""
    caption(load_config(raw, CaptionConfig))


def summary(row: dict[str, Any]) -> str:
    """Say on one line what a row's caption was made from and how long it took."""
    phases = ", ".join(f"{phase.replace('_', ' ')} {seconds:.2f}" for phase, seconds in row["seconds"].items())
    return (
        f"{row['file']}: {len(row['frames'])} of {row['total_frames']} frames, "
        f"{row['visual_tokens']} of {row['patches']} visual tokens, {row['new_tokens']} new tokens, "
        f"{sum(row['seconds'].values()):.2f} s ({phases})"
    )


def _caption_many(
    captioner: Captioner, files: Sequence[Path], log: JsonLines | None, shared: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    with closing(captioner.caption_all(files)) as made:
        for number, row in enumerate(_with_progress(made, len(files)), start=1):
            row |= shared
            if "error" in row:
                print(f"[{number}/{len(files)}] error: {row['error']}", file=sys.stderr)
            else:
                print(f"{row['file']}: {row['caption']}", flush=True)
                _print_note(row)
                print(f"[{number}/{len(files)}] {summary(row)}", file=sys.stderr)
            if log is not None:
                log.append(row)
            rows.append(row)
    errors = [row["error"] for row in rows if "error" in row]
    if len(errors) == len(rows):
        raise ValueError(f"all {len(rows)} inputs failed, the first: {errors[0]}")
    if errors:
        print(f"{len(errors)} of {len(rows)} failed", file=sys.stderr)
    return rows


def _with_progress(rows: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """Go through the rows behind a bar, where somebody watches."""
    if not sys.stderr.isatty():
        yield from rows
        return
    from rich.console import Console
    from rich.progress import Progress

    # Lines printed meanwhile go above the bar; where stdout is a file they stay there.
    progress: Progress = Progress(console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())
    with progress:
        yield from progress.track(rows, total=total, description="captioning")


def _frames(count: int) -> str:
    return f"{count} frame" + "s" * (count != 1)


def _print_note(row: dict[str, Any]) -> None:
    if "note" in row:
        print(f"{row['file']}: {row['note']}", file=sys.stderr)


class _Typewriter:
    """Prints a text piece by piece, without the blanks around it."""

    def __init__(self) -> None:
        self._blanks = ""
        self._begun = False

    def put(self, row: int, text: str) -> None:
        """Print the next piece of the only row."""
        assert row == 0
        text = self._blanks + text if self._begun else text.lstrip()
        known = text.rstrip()
        self._blanks = text[len(known) :]
        self._begun = self._begun or bool(known)
        print(known, end="", flush=True)


def shared_columns(config: CaptionConfig) -> dict[str, Any]:
    """Settings that the captions depend on, as they stand in each row."""
    merge = _columns(config.effective_merge)
    return {
        "prompt": config.prompt,
        "token_kept_ratio": merge.pop("token_kept_ratio"),
        "schedule": merge.pop("schedule"),
        "settings": {
            "model_path": config.model_path or BUNDLED_MODEL.name,
            "num_frm": config.num_frm,
            "image_aspect_ratio": config.image_aspect_ratio and config.image_aspect_ratio.value,
            "dtype": config.dtype.value,
            "quantization": config.quantization,
            **merge,
            **dataclasses.asdict(config.sampling),
        },
    }


def _columns(merge: MergeConfig) -> dict[str, Any]:
    """Fields of the merge settings by name, choices as words."""
    values = dataclasses.asdict(merge)
    return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}


def not_done(files: Sequence[Path], rows: Sequence[dict[str, Any]], shared: dict[str, Any]) -> list[Path]:
    """Leave out the files that have a caption with the same settings.

    Args:
        files: All.
        rows: Of earlier runs.
        shared: From `shared_columns`.

    Returns:
        What is left to do, in order.
    """
    done = {row.get("file") for row in rows if "caption" in row and all(row.get(key) == shared[key] for key in shared)}
    return [file for file in files if str(file) not in done]
