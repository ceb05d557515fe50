"""The verb `caption`: an image, a video, a folder or a glob in; captions out, on the terminal and as JSON lines."""

from __future__ import annotations

import dataclasses
import glob
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from omegaconf import MISSING, DictConfig

from aurora.checkpoint.pretrained import resolve_checkpoint
from aurora.config import load_config, register_schema
from aurora.generation.sampling import SamplingConfig
from aurora.model.merge import MergeConfig
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from aurora.processing.chat import IMAGE_TOKEN
from aurora.processing.image import AspectRatio
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import load_visual
from aurora.records import JsonLines
from aurora.runtime import RuntimeConfig, describe_error, resolve_device, resolve_dtype, set_threads

if TYPE_CHECKING:
    from rich.progress import Progress

BUNDLED_MODEL = Path(__file__).parent / "assets" / "aurora-tiny"
"""The checkpoint that comes with the package."""
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"})
"""With the image suffixes: what is taken from a folder."""


@dataclass(kw_only=True, slots=True)
class CaptionConfig(RuntimeConfig):
    """Describe images and videos."""

    visual_input: str = MISSING
    """An image, a video, a folder of them or a glob such as "clips/*.mp4"."""
    prompt: str = "Describe the video in detail."
    """What to ask about each input."""
    model_path: str | None = None
    """Checkpoint folder or hub id; null is the bundled aurora-tiny."""
    num_frm: int = 8
    """Frames sampled from a video, evenly over its length; an image is one frame."""
    token_kept_ratio: float | None = None
    """Share of visual tokens to keep, in (0, 1]; short for merge.token_kept_ratio."""
    merge: MergeConfig = field(default_factory=lambda: MergeConfig(token_kept_ratio=0.2))
    """How visual tokens are merged."""
    image_aspect_ratio: AspectRatio | None = None
    """How frames become square: pad, crop or squash; null is the checkpoint's choice."""
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
    output: str | None = None
    """JSON-lines file for the results; a run that finds rows of the same settings there continues behind them."""
    overwrite: bool = False
    """Begin the output file anew."""

    def __post_init__(self) -> None:
        """Check ranges."""
        RuntimeConfig.__post_init__(self)
        if self.num_frm < 1:
            raise ValueError(f"num_frm={self.num_frm}: want at least 1 frame")
        if self.token_kept_ratio is not None and not 0 < self.token_kept_ratio <= 1:
            raise ValueError(f"token_kept_ratio={self.token_kept_ratio}: want a number in (0, 1]")
        if IMAGE_TOKEN in self.prompt:
            raise ValueError(
                f"prompt: holds {self.prompt.count(IMAGE_TOKEN)} {IMAGE_TOKEN} of its own; want none, one is placed "
                "for each frame"
            )
        if self.visual_input == "":
            raise ValueError("visual_input='': want an image, a video, a folder or a glob")

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
            seed=self.seed,
        )

    @property
    def effective_merge(self) -> MergeConfig:
        """The merge settings with the short key applied."""
        if self.token_kept_ratio is None:
            return self.merge
        return dataclasses.replace(self.merge, token_kept_ratio=self.token_kept_ratio)


register_schema("caption_schema", CaptionConfig)


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
        device = resolve_device(config.device)
        set_threads(config.threads)
        path = resolve_checkpoint(config.model_path if config.model_path is not None else BUNDLED_MODEL)
        processor = AuroraProcessor.from_pretrained(path)
        model = AuroraForConditionalGeneration.from_pretrained(
            path, torch_dtype=resolve_dtype(config.dtype, device), device_map=device
        )
        return cls(model, processor, config)

    def caption(self, path: Path) -> dict[str, Any]:
        """Describe one image or video.

        Args:
            path: The file.

        Returns:
            A row for the results: caption, frames, tokens and seconds; see `CaptionConfig` for the settings it repeats.

        Raises:
            ValueError: if the file is not an image or a video, or its tokens do not fit the model.
        """
        config = self.config
        started = time.perf_counter()
        visual = load_visual(path, config.num_frm)
        loaded = time.perf_counter()
        pixels = self.processor.image_processor.preprocess_frames(visual.frames)[None]  # (1, F, 3, S, S)
        inputs = self.processor(text=self.processor.build_prompt(config.prompt, len(visual.frames)))
        preprocessed = time.perf_counter()
        made = self.model.generate(
            input_ids=inputs["input_ids"].to(self.model.device),
            pixel_values_videos=pixels.to(self.model.device, self.model.dtype),
            return_dict=True,
            **_columns(config.effective_merge),
            **dataclasses.asdict(config.sampling),
        )
        assert isinstance(made, GenerateOutput)
        seconds = {"load_video": loaded - started, "preprocess": preprocessed - loaded, **made.seconds}
        per_frame = made.visual_token_counts[0]
        return {
            "file": str(path),
            "caption": self.processor.decode(made.sequences[0], skip_special_tokens=True).strip(),
            "frames": [int(index) for index in visual.indices],
            "total_frames": int(visual.total_frames),
            "visual_tokens": sum(per_frame),
            "visual_tokens_per_frame": per_frame,
            "patches": sum(plan.num_patches for plan in made.plans),
            "new_tokens": made.num_generated[0],
            "stopped_by": made.stopped_by[0],
            "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
        }


def find_inputs(visual_input: str) -> list[Path]:
    """Turn what the user named into files.

    Args:
        visual_input: A file, a folder (its images and videos, one level) or a glob; a path that exists as it stands
            is never read as a glob.

    Returns:
        The files, sorted; at least one.

    Raises:
        ValueError: if a folder holds no image or video.
        FileNotFoundError: if nothing is there.
    """
    path = Path(visual_input).expanduser()
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and file.is_file()
        )
        if not files:
            raise ValueError(f"visual_input={visual_input}: no image or video in this folder, want at least one")
        return files
    if path.exists():
        return [path]
    if glob.has_magic(visual_input):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not Path(name).is_dir())  # noqa: PTH207
        if not files:
            raise FileNotFoundError(f"visual_input={visual_input}: no file matches this pattern")
        return files
    raise FileNotFoundError(f"visual_input={visual_input}: no such file or folder")


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
    shared = _shared_columns(config)
    with ExitStack() as stack:
        log = None
        if config.output is not None:
            if Path(config.output).expanduser().resolve() in {file.resolve() for file in files}:
                raise ValueError(f"output={config.output}: is one of the inputs, want another file")
            log = stack.enter_context(JsonLines(config.output, overwrite=config.overwrite))
        todo = _not_done(files, log, shared)
        if len(todo) < len(files):
            print(f"{len(files) - len(todo)} of {len(files)} are in {config.output} already", file=sys.stderr)
        if not todo:
            return []
        captioner = Captioner.load(config)
        if len(files) == 1:
            row = captioner.caption(todo[0]) | shared
            print(row["caption"], flush=True)
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
    for number, file in enumerate(_with_progress(files), start=1):
        try:
            row = captioner.caption(file) | shared
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            row = {"file": str(file), "error": describe_error(error)} | shared
            print(f"[{number}/{len(files)}] error: {row['error']}", file=sys.stderr)
        else:
            print(f"{file}: {row['caption']}", flush=True)
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


def _with_progress(files: Sequence[Path]) -> Iterator[Path]:
    """Go through the files behind a bar, where somebody watches."""
    if not sys.stderr.isatty():
        yield from files
        return
    from rich.console import Console
    from rich.progress import Progress

    # Lines printed meanwhile go above the bar; where stdout is a file they stay there.
    progress: Progress = Progress(console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())
    with progress:
        yield from progress.track(files, description="captioning")


def _shared_columns(config: CaptionConfig) -> dict[str, Any]:
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
            **merge,
            **dataclasses.asdict(config.sampling),
        },
    }


def _columns(merge: MergeConfig) -> dict[str, Any]:
    """Fields of the merge settings by name, choices as words."""
    values = dataclasses.asdict(merge)
    return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}


def _not_done(files: Sequence[Path], log: JsonLines | None, shared: dict[str, Any]) -> list[Path]:
    """Leave out the files that have a caption with the same settings."""
    rows = log.rows if log is not None else []
    done = {row.get("file") for row in rows if "caption" in row and all(row.get(key) == shared[key] for key in shared)}
    return [file for file in files if str(file) not in done]
