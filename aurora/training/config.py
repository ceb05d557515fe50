"""The schema of `configs/train.yaml`: what a stage is, and a recipe as a list of stages."""

from dataclasses import dataclass, field
from enum import Enum

from aurora.model.captioner import AuroraConfig
from aurora.training.optim import OptimConfig


class Precision(Enum):
    """Arithmetic of the forward pass; weights, moments and losses are always float32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Objective(Enum):
    """What a stage learns from."""

    frames = "frames"
    """The vision tower on single rendered frames: attribute heads on CLS, coverage heads on the patch tokens."""
    storyboard = "storyboard"
    """The language model on captions and answers about symbolic frames."""
    clips = "clips"
    """The whole captioner on rendered clips, with token merging inside the step."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage of a recipe."""

    objective: Objective = Objective.clips
    """What it learns from."""
    num_steps: int = 1000
    """Optimizer steps at `scale=1`."""
    batch_size: int = 4
    """Frames or clips of one step, over all ranks together."""
    max_ranks: int = 1
    """Processes that share one step's batch; at most `workers`."""
    precision: Precision = Precision.bf16
    """Arithmetic of the forward pass."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    init_from: list[str] = field(default_factory=list)
    """Earlier stages whose final weights this stage starts from; a later entry overrides an earlier one."""
    trainable: list[str] = field(default_factory=lambda: [""])
    """Prefixes of the parameters that learn; an empty prefix is all of them."""
    token_kept_ratios: list[float] = field(default_factory=lambda: [1.0])
    """Kept ratios the steps draw from (objective clips)."""
    num_captions: int = 2
    """Captions of a clip in one step, of the five; every question is always asked (storyboard, clips)."""
    slot_weight: float = 3.0
    """Loss weight of answer words that carry a fact (storyboard, clips)."""
    task_weights: dict[str, float] | None = None
    """Loss weight of a frame attribute or of `mask`; 1 where absent (objective frames)."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    validate_every: int = 1000
    """Steps between validations; the last step always validates."""
    log_every: int = 20
    """Steps between progress lines and records of the curve."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_steps", "batch_size", "max_ranks", "checkpoint_every", "validate_every", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"stage.{name}={value}: want at least 1")
        if bad := [ratio for ratio in self.token_kept_ratios if not 0 < ratio <= 1]:
            raise ValueError(f"stage.token_kept_ratios={bad}: want numbers in (0, 1]")
        if not 0 <= self.num_captions <= 5:
            raise ValueError(f"stage.num_captions={self.num_captions}: want 0 to 5")


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """The sentencepiece tokenizer trained before the first stage."""

    vocab_size: int = 1024
    """Pieces, with three special ones and 256 bytes."""
    num_scenes: int = 2000
    """Scenes of the text corpus it is trained on."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """A recipe: the stages, the world they learn from and where the result goes."""

    run_dir: str = "outputs/train"
    """Folder of checkpoints and curves; a run found there is continued."""
    export_dir: str | None = None
    """Folder for the finished model; none writes no export."""
    export_only: bool = False
    """Run no stage; export the newest captioner of `run_dir`, finished or not."""
    bank_dir: str = "outputs/tinyworld"
    """Folder of the rendered clips, shared by runs."""
    parts: list[str] = field(default_factory=list)
    """Stages to run, in order; all of `stages` when empty. Stages that start from nothing run side by side."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stage name -> stage."""
    model: AuroraConfig = field(default_factory=AuroraConfig)
    """The model that is trained; the vocabulary size is the tokenizer's."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer training."""
    num_frames: int = 8
    """Frames of a clip."""
    num_clips: int = 12000
    """Rendered clips at `scale=1`."""
    num_validation_clips: int = 64
    """Held-out clips of a validation."""
    frame_template: str = "{index} <image>"
    """Text around each frame's placeholder."""
    scale: float = 1.0
    """Factor on all step counts and on the number of clips; 0.01 is a smoke run."""
    workers: int = 2
    """Processes to use; each computes with one thread."""
    seed: int = 0
    """Seed of weights and data order; a batch is a function of (seed, stage, step)."""
    resume: bool = True
    """Continue an unfinished run in `run_dir`; false refuses to start there."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept of each stage."""

    def __post_init__(self) -> None:
        """Check ranges and names."""
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale}: want a positive number")
        if self.export_only and self.export_dir is None:
            raise ValueError("export_only=true: want export_dir=..., the folder to write")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}: want at least 1")
        if unknown := [part for part in self.parts if self.stages and part not in self.stages]:
            raise ValueError(f"parts={unknown}: want names of stages ({', '.join(self.stages)})")
