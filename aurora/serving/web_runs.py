"""What the web page does when it is asked: load a model, read a file, encode, caption. No page in here.

A client's wishes are checked here too, since it can send what the page's sliders do not allow.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aurora.captioning import BUNDLED_MODEL
from aurora.checkpoint.pretrained import resolve_checkpoint
from aurora.data.tinyworld import Category, caption_prompts
from aurora.generation.outputs import GenerateOutput, VisualPrefix
from aurora.generation.sampling import SamplingConfig
from aurora.generation.streaming import TextStream
from aurora.model.merge import MergeConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.chat import IMAGE_TOKEN
from aurora.processing.image import AspectRatio, AuroraImageProcessor
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import SampledVideo, load_visual
from aurora.runtime import RuntimeConfig, process_bytes, resolve_device, resolve_dtype
from aurora.serving.limits import Limits
from aurora.visualization.film import TracedRun, seen_pictures
from aurora.visualization.merge_map import Picture, traces_of_clip

BUNDLED = BUNDLED_MODEL.name
"""Name of the model that comes with the package, in the chooser."""
FOLDER, HUB_ID = "a folder on this machine", "a Hugging Face hub id"
"""Choices that need a text beside them."""
MAX_PROMPT_LETTERS = 4000
PIECE_S = 0.04
"""A caption is shown this often at most: a small model writes faster than a page needs to change."""
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

GENERAL_PROMPTS = {
    Category.short: "Describe the video in one sentence.",
    Category.detailed: "Describe the video in detail.",
    Category.background: "Describe the background of the video: the place, the time of day, the weather and what is "
    "around the main subject.",
    Category.camera: "Describe the camera work of the video: shot, angle, movement and cuts.",
    Category.main_object: "Describe the main subject of the video: how it looks, what it does and how it moves.",
}
"""The five structured captions of VDC, asked of a model of everyday videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What to do with a file."""

    path: Path
    """An image or a video."""
    prompt: str = ""
    """What to ask about it."""
    num_frames: int = 8
    """Frames of a video, evenly over its length."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """How to merge."""
    aspect_ratio: AspectRatio | None = None
    """How frames become square; None is the checkpoint's choice."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How to decode."""

    def check(self, limits: Limits) -> None:
        """Compare with what a visitor may ask.

        Raises:
            ValueError: if something is beyond a limit.
        """
        if not 1 <= self.num_frames <= limits.max_frames:
            raise ValueError(f"frames={self.num_frames}: want 1 to {limits.max_frames}")
        if self.sampling.max_new_tokens > limits.max_new_tokens:
            raise ValueError(f"new tokens={self.sampling.max_new_tokens}: want at most {limits.max_new_tokens}")
        if len(self.prompt) > MAX_PROMPT_LETTERS:
            raise ValueError(f"prompt: got {len(self.prompt)} letters, want at most {MAX_PROMPT_LETTERS}")
        if IMAGE_TOKEN in self.prompt:
            raise ValueError(f"prompt: holds {IMAGE_TOKEN}, want none: one is placed for each frame")
        if not self.prompt.strip():
            raise ValueError("prompt: is empty, want a question or an instruction")


class Loaded(NamedTuple):
    """A model that is ready."""

    path: str
    model: AuroraForConditionalGeneration
    processor: AuroraProcessor


class Models:
    """The models a visitor may choose; the one used last is kept."""

    def __init__(self, runtime: RuntimeConfig, listed: Sequence[str] = (), *, any_model: bool = False) -> None:
        """Keep what may be loaded.

        Args:
            runtime: Device and dtype.
            listed: Folders and hub ids to offer beside the bundled model, the first as the default.
            any_model: Also load what a visitor names.

        Raises:
            ValueError: if an offer is neither a folder nor a hub id.
        """
        for path in listed:
            if path != BUNDLED and not Path(path).expanduser().is_dir() and not _HUB_ID.fullmatch(path):
                raise ValueError(f"model {path}: no such folder; want one, or a hub id owner/name")
        self.choices = [*dict.fromkeys([*listed, BUNDLED]), *([FOLDER, HUB_ID] if any_model else [])]
        self._runtime = runtime
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None

    def path_of(self, choice: str, typed: str) -> str:
        """Turn what was chosen into a folder or a hub id.

        Args:
            choice: One of `choices`.
            typed: The text beside it.

        Raises:
            ValueError: if it may not be loaded, or the text does not name one.
        """
        if choice not in self.choices:
            raise ValueError(f"model={choice}: want one of {', '.join(self.choices)}")
        typed = typed.strip()
        if choice == BUNDLED:
            return str(BUNDLED_MODEL)
        if choice == FOLDER:
            if not typed or not Path(typed).expanduser().is_dir():
                raise ValueError(f"model folder {typed or '(empty)'}: no such folder on this machine")
            return str(Path(typed).expanduser())
        if choice == HUB_ID:
            if not _HUB_ID.fullmatch(typed):
                raise ValueError(f"hub id {typed or '(empty)'}: want owner/name")
            return typed
        return choice

    def ready(self, path: str) -> Loaded | None:
        """Return the model of `path_of` if it is loaded."""
        loaded = self._loaded
        return loaded if loaded is not None and loaded.path == path else None

    def load(self, path: str) -> Loaded:
        """Load a model, in place of the one before.

        Args:
            path: From `path_of`.

        Raises:
            ValueError: if it cannot be read.
        """
        with self._lock:
            if (ready := self.ready(path)) is not None:
                return ready
            folder = resolve_checkpoint(path)
            device = resolve_device(self._runtime.device)
            processor = AuroraProcessor.from_pretrained(folder)
            self._loaded = None  # both may not fit; what has no processor did not get here
            model = AuroraForConditionalGeneration.from_pretrained(
                folder, torch_dtype=resolve_dtype(self._runtime.dtype, device), device_map=device
            )
            self._loaded = Loaded(path, model, processor)
            return self._loaded


def prompts_for(choice: str) -> dict[Category, str]:
    """One prompt for each of the five structured captions, as the chosen model knows them."""
    if choice == BUNDLED:
        return {category: caption_prompts(category)[0] for category in Category}
    return GENERAL_PROMPTS


class Merged(NamedTuple):
    """An encoder run over the frames of a file."""

    visual: SampledVideo
    pictures: list[Picture]
    """What the tower saw of each frame."""
    run: TracedRun
    prefix: VisualPrefix
    seconds: dict[str, float]
    """read, preprocess and encode."""

    @property
    def num_tokens(self) -> int:
        """Visual tokens of all frames."""
        return int(self.run.token_counts()[:, -1].sum())

    @property
    def num_patches(self) -> int:
        """The same without merging."""
        return int(self.run.token_counts()[:, 0].sum())


def encode(loaded: Loaded, wish: Wish) -> Merged:
    """Read a file and encode it, with a record of what merged.

    Args:
        loaded: The model.
        wish: File, frames and merging; the rest is not looked at.

    Returns:
        What the pictures are drawn from and the caption is made with.

    Raises:
        ValueError: if the file is not an image or a video, or the merging is impossible.
    """
    started = time.perf_counter()
    visual = load_visual(wish.path, wish.num_frames, strict=False)
    was_read = time.perf_counter()
    images = _image_processor(loaded.processor, wish.aspect_ratio)
    pixels: Tensor = images.preprocess_frames(visual.frames)  # (F, 3, H, W)
    preprocess_s = time.perf_counter() - was_read
    prefix = loaded.model.encode(
        pixel_values_videos=pixels[None].to(loaded.model.device, loaded.model.dtype),
        trace=True,
        **{key.name: getattr(wish.merge, key.name) for key in dataclasses.fields(wish.merge)},
    )
    return Merged(
        visual,
        seen_pictures(pixels, images, loaded.model.config.vision.patch_size),
        TracedRun(name_of(wish.merge), traces_of_clip(prefix.features)),
        prefix,
        {"read": was_read - started, "preprocess": preprocess_s, "encode": prefix.seconds},
    )


def name_of(merge: MergeConfig) -> str:
    """Say what was asked of merging."""
    if merge.visual_token_budget is not None:
        return f"budget {merge.visual_token_budget}"
    return f"kept ratio {merge.token_kept_ratio:g}"


class Figures(NamedTuple):
    """What a caption took."""

    seconds: dict[str, float]
    """Of each phase."""
    new_tokens: int
    cache_bytes: int
    """Keys and values of the visual tokens in the language model."""
    cache_bytes_unmerged: int
    memory_bytes: int | None
    """On CUDA the most that was allocated, on a CPU what the process has; None where it cannot be told."""


class Progress(NamedTuple):
    """How far a run is."""

    merged: Merged
    caption: str
    figures: Figures | None = None
    """Once the caption is whole."""
    stopped: str = ""
    """Why it is not whole."""


def caption(loaded: Loaded, wish: Wish, stop: Callable[[], str]) -> Iterator[Progress]:
    """Encode a file and caption it.

    Args:
        loaded: The model.
        wish: What to do.
        stop: Says why to stop, or nothing; looked at before each step and with each piece of text.

    Yields:
        First what merged, then the caption as it grows, at last with figures.

    Raises:
        ValueError: if the file cannot be used, or its tokens do not fit the model.
    """
    device = loaded.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    merged = encode(loaded, wish)
    yield Progress(merged, "", stopped=stop())
    if stop():
        return
    prompt = loaded.processor.build_prompt(wish.prompt, len(merged.pictures))
    inputs = loaded.processor(text=prompt).to(device)
    stream = TextStream(loaded.processor).start(
        loaded.model.generate,
        inputs["input_ids"],
        prefix=merged.prefix,
        return_dict=True,
        **dataclasses.asdict(wish.sampling),
    )
    text, shown_at = "", 0.0
    with stream:
        for piece in stream:
            text += piece
            if reason := stop():
                yield Progress(merged, text.strip(), stopped=reason)
                return
            if time.perf_counter() - shown_at >= PIECE_S:
                shown_at = time.perf_counter()
                yield Progress(merged, text.strip())
    made = stream.result
    if made is None:  # ended while its last piece was on the way
        yield Progress(merged, text.strip(), stopped=stop() or "cancelled")
        return
    assert isinstance(made, GenerateOutput)
    yield Progress(merged, text.strip(), _figures(loaded, merged, made))


def _image_processor(processor: AuroraProcessor, aspect_ratio: AspectRatio | None) -> AuroraImageProcessor:
    """The model's own, or one that differs in this: visitors share the model, so it is not changed."""
    if aspect_ratio is None:
        return processor.image_processor
    return AuroraImageProcessor(dataclasses.replace(processor.image_processor.config, aspect_ratio=aspect_ratio))


def _figures(loaded: Loaded, merged: Merged, made: GenerateOutput) -> Figures:
    text = loaded.model.config.text
    per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * loaded.model.dtype.itemsize
    return Figures(
        seconds={**merged.seconds, "prefill": made.seconds["prefill"], "decode": made.seconds["decode"]},
        new_tokens=made.num_generated[0],
        cache_bytes=per_token * merged.num_tokens,
        cache_bytes_unmerged=per_token * merged.num_patches,
        memory_bytes=_memory_bytes(loaded.model.device),
    )


def _memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return process_bytes("VmRSS") if device.type == "cpu" else None


@dataclass(slots=True)
class _Run:
    """A visitor's run that waits or works."""

    end: str = ""
    """Why it has to end, or nothing."""


class Sessions:
    """Who has a run that waits or works, so that it can be ended by its own visitor."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._runs: dict[str, _Run] = {}

    def begin(self, session: str, max_waiting: int) -> bool:
        """A visitor asks for a run, and gets one unless so many wait behind the one that works."""
        if len(self._runs.keys() - {session}) > max_waiting:
            return False
        self._runs[session] = _Run()
        return True

    def cancel(self, session: str, reason: str = "cancelled") -> bool:
        """End a visitor's run for a reason; returns whether there was one."""
        run = self._runs.get(session)
        if run is not None:
            run.end = reason
        return run is not None

    def busy(self, session: str) -> bool:
        """Whether a visitor's run waits or works."""
        return session in self._runs

    def end(self, session: str) -> None:
        """A visitor's run is over."""
        self._runs.pop(session, None)

    def stopper(self, session: str, max_seconds: float) -> Callable[[], str]:
        """What tells a run of this visitor, which starts now, whether to stop."""
        run = self._runs.setdefault(session, _Run())
        deadline = time.monotonic() + max_seconds

        def stop() -> str:
            if run.end or time.monotonic() <= deadline:
                return run.end
            return f"stopped after {max_seconds:g} s, the most that limits.max_seconds allows"

        return stop
