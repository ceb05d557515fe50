"""Settings of the verb `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from aurora.config import register_schema
from aurora.data.tinyworld.dataset import DatasetConfig
from aurora.evaluation.judge import JudgeConfig
from aurora.evaluation.report import Point
from aurora.evaluation.tinyvdc import CATEGORIES
from aurora.evaluation.vdcscore import Averaging
from aurora.model.merge import Schedule
from aurora.runtime import RuntimeConfig


class Benchmark(Enum):
    """What is measured."""

    tinyvdc = "tinyvdc"
    """Facts of TinyWorld clips, which are rendered where they are missing."""
    vdc = "vdc"
    """A folder in the published format of VDC, with VDCscore and caption metrics."""


@dataclass(kw_only=True, slots=True)
class VdcConfig:
    """Clips, reference captions and questions as VDC is published."""

    root: str | None = None
    """Folder with VDC_1k.jsonl, the five question files and the videos; folders in it are searched."""
    categories: list[str] = field(default_factory=lambda: list(CATEGORIES))
    """Of short, detailed, background, camera and main_object."""
    allow_missing: bool = False
    """Leave out clips whose file is missing or cannot be read, and say so, instead of stopping."""
    prompts_file: str | None = None
    """Lists of caption prompts, from which the seed chooses for each clip: JSON of category -> texts, or the published
    .py, of which only the texts are read. Null asks one prompt of our own for each category."""

    def __post_init__(self) -> None:
        """Check ranges."""
        unknown = [name for name in self.categories if name not in CATEGORIES]
        if unknown or not self.categories or len(set(self.categories)) < len(self.categories):
            raise ValueError(f"data.categories={self.categories}: want some of {', '.join(CATEGORIES)}, each once")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(RuntimeConfig):
    """Caption clips in the five categories of VDC and count what is right.

    benchmark=tinyvdc renders TinyWorld clips and reads the facts out of the captions; experiment=vdc runs VDC on
    data.root with a judge. On a CPU as many single-threaded processes run as `threads` says.
    """

    benchmark: Benchmark = Benchmark.tinyvdc
    """tinyvdc (facts of TinyWorld clips) or vdc (VDCscore on a folder in the published format)."""
    model_path: str | None = None
    """Checkpoint folder or hub id; null is the bundled aurora-tiny."""
    num_clips: int | None = 500
    """Clips to caption: of TinyWorld with seeds seed, seed + 1, ..., of VDC the first of the captions file; null takes
    all of VDC."""
    ratios: list[float] = field(default_factory=lambda: [1.0])
    """Shares of visual tokens to keep, each in (0, 1]; the first is what the others are compared with."""
    schedules: list[Schedule] = field(default_factory=lambda: [Schedule.exact])
    """How the merges are spread over the layers: exact, constant, linear; each ratio below 1 runs with each."""
    noise: bool = False
    """Also caption noise instead of the clips, at the first ratio: what is right by chance."""
    batch_size: int = 4
    """Clips captioned together."""
    max_new_tokens: int = 160
    """At most so many tokens for a caption."""
    num_frm: int | None = None
    """Frames of a clip, evenly over its length, all of a shorter one; null takes the model's own number."""
    output: str = "outputs/tinyvdc"
    """Folder for captions.jsonl, report.json and report.md; VDC also writes verdicts.jsonl and replies.sqlite."""
    overwrite: bool = False
    """Caption anew what captions.jsonl holds."""
    split: str = "test"
    """Of TinyWorld: train, val, test or heldout; training never draws from the last two."""
    clip_frames: int = 8
    """Frames of a TinyWorld clip on disk; the model takes its own number of them, evenly."""
    clip_px: int = 96
    """Side of a frame of a TinyWorld clip on disk, pixels, even."""
    data_dir: str = "outputs/tinyvdc/clips"
    """Folder of TinyWorld's mp4 files, which are rendered where they are missing."""
    data: VdcConfig = field(default_factory=VdcConfig)
    """The folder of VDC."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges VDC's captions."""
    averaging: Averaging = Averaging.all
    """Which average of VDCscore leads the tables, all (zeros kept) or reference (the published script's); both are
    computed."""

    def __post_init__(self) -> None:
        """Check ranges."""
        RuntimeConfig.__post_init__(self)
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise ValueError(f"ratios={self.ratios}: want numbers in (0, 1]")
        for key in ("ratios", "schedules"):
            if not getattr(self, key):
                raise ValueError(f"{key}=[]: want at least one")
        if Schedule.list in self.schedules:
            raise ValueError("schedules: got list, which needs r for each layer; want exact, constant or linear")
        for key in ("num_clips", "batch_size", "max_new_tokens", "num_frm"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: want at least 1")
        if self.num_clips is None and self.benchmark is Benchmark.tinyvdc:
            raise ValueError("num_clips=null: want a number, TinyWorld has no end")
        _ = self.dataset  # checks the rest

    @property
    def dataset(self) -> DatasetConfig:
        """What is rendered for TinyVDC."""
        return DatasetConfig(
            folder=self.data_dir,
            split=self.split,
            num_clips=self.num_clips or 1,
            first_seed=self.seed,
            num_frames=self.clip_frames,
            image_size=self.clip_px,
        )

    @property
    def points(self) -> list[Point]:
        """The operating points, the one that the others are compared with first."""
        points = []
        for schedule in self.schedules:
            for ratio in self.ratios:
                point = Point(ratio=ratio, schedule="none" if ratio == 1.0 else schedule.value)
                if point not in points:
                    points.append(point)
        first = points[0]
        return [*points, Point(ratio=first.ratio, schedule=first.schedule, noise=True)] if self.noise else points


register_schema("evaluate_schema", EvaluateConfig)
