"""The schema of `configs/train.yaml`: what a stage is, and a recipe as a list of stages."""

from dataclasses import dataclass, field
from enum import Enum

from aurora.data.records import DataConfig
from aurora.model.captioner import AuroraConfig
from aurora.model.merge import MergeConfig
from aurora.processing.image import AspectRatio
from aurora.training.logger import LoggerConfig
from aurora.training.lora import LoraConfig
from aurora.training.optim import OptimConfig


class Precision(Enum):
    """Arithmetic of the forward pass; weights, moments and losses are always float32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    """With a loss scale that halves when a gradient overflows; the step is then skipped and counted."""


class Objective(Enum):
    """What a stage learns from."""

    frames = "frames"
    """The vision tower on single rendered frames: attribute heads on CLS, coverage heads on the patch tokens."""
    storyboard = "storyboard"
    """The language model on captions and answers about symbolic frames."""
    clips = "clips"
    """The whole captioner on rendered clips, with token merging inside the step."""
    conversations = "conversations"
    """The whole captioner on the user's conversations about images and videos (`data`), merging inside the step."""


class Parallel(Enum):
    """How the ranks of a stage share the model."""

    none = "none"
    """One process; more are refused."""
    ddp = "ddp"
    """Each rank holds a whole replica; gradients are averaged once a step."""
    fsdp = "fsdp"
    """Weights, gradients and moments are sharded over the ranks (FSDP2), gathered layer by layer."""


class Debug(Enum):
    """What to do instead of training."""

    meta = "meta"
    """Check every setting, build each stage's model without memory, print the plan of its memory, and stop."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage of a recipe."""

    objective: Objective = Objective.clips
    """What it learns from."""
    num_steps: int = 1000
    """Optimizer steps at `scale=1`."""
    num_epochs: float | None = None
    """Passes over the data, instead of `num_steps` (objective conversations)."""
    batch_size: int = 4
    """Frames, clips or conversations of one optimizer step, over all ranks and micro-batches together."""
    accumulation_steps: int = 1
    """Forward passes that a rank's share of a step is cut into (objective conversations)."""
    max_ranks: int = 1
    """Processes started here to share one step's batch, at most `workers`; torchrun's count instead where it runs."""
    parallel: Parallel = Parallel.ddp
    """none | ddp | fsdp: how the ranks share the model."""
    precision: Precision = Precision.bf16
    """fp32 | bf16 | fp16: arithmetic of the forward pass."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward instead of keeping them (objective conversations)."""
    compile: bool = False
    """Fuse the code of the layers with torch.compile (objective conversations)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    ema_decay: float | None = None
    """Decay a step of the averaged weights that are validated and exported, in (0, 1); null keeps none."""
    init_from: list[str] = field(default_factory=list)
    """Earlier stages whose final weights this stage starts from; a later entry overrides an earlier one."""
    trainable: list[str] = field(default_factory=lambda: [""])
    """Prefixes of the parameters that learn; an empty prefix is all of them."""
    lora: LoraConfig | None = None
    """Adapters in place of whole weights (objective conversations); null trains the weights."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """How visual tokens merge in the step (objective conversations)."""
    packing: bool = True
    """Lay several conversations behind each other in one row, up to `data.max_length` or the model's context
    (objective conversations)."""
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
        counts = "num_steps batch_size accumulation_steps max_ranks checkpoint_every validate_every log_every"
        for name in counts.split():
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"stage.{name}={value}: want at least 1")
        if self.num_epochs is not None and self.num_epochs <= 0:
            raise ValueError(f"stage.num_epochs={self.num_epochs}: want a positive number, or null")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"stage.ema_decay={self.ema_decay}: want a number in (0, 1), or null")
        if bad := [ratio for ratio in self.token_kept_ratios if not 0 < ratio <= 1]:
            raise ValueError(f"stage.token_kept_ratios={bad}: want numbers in (0, 1]")
        if not 0 <= self.num_captions <= 5:
            raise ValueError(f"stage.num_captions={self.num_captions}: want 0 to 5")
        if self.parallel is Parallel.none and self.max_ranks > 1:
            raise ValueError(f"stage.max_ranks={self.max_ranks}: want 1 with parallel=none, or parallel=ddp or fsdp")
        if self.objective is not Objective.conversations:
            self._refuse_settings_of_conversations()

    def _refuse_settings_of_conversations(self) -> None:
        given = {
            "num_epochs": self.num_epochs is not None,
            "accumulation_steps": self.accumulation_steps > 1,
            "parallel": self.parallel is Parallel.fsdp,
            "activation_checkpointing": self.activation_checkpointing,
            "compile": self.compile,
            "lora": self.lora is not None,
        }
        if wrong := [name for name, is_given in given.items() if is_given]:
            value = getattr(self, wrong[0])
            shown = value.value if isinstance(value, Enum) else value
            raise ValueError(
                f"stage.{wrong[0]}={shown}: works with objective=conversations, got objective={self.objective.value}"
            )


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """The sentencepiece tokenizer trained before the first stage."""

    vocab_size: int = 1024
    """Pieces, with three special ones and 256 bytes."""
    num_scenes: int = 2000
    """Scenes of the text corpus it is trained on."""


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Held-out conversations that validations of objective conversations use."""

    path: str | None = None
    """Their `.jsonl` or `.json` file; null validates nothing."""
    media: str | None = None
    """Their media: a folder or tar shards; null is the folder of the file."""
    num_samples: int = 64
    """Samples of the validation loss, from the first on."""
    num_captions: int = 4
    """Samples whose first question is answered greedily, into the log; 0 answers none."""
    max_new_tokens: int = 128
    """Longest of these answers, tokens."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("num_samples", 1), ("num_captions", 0), ("max_new_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"validation.{name}={value}: want at least {least}")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """A recipe: the stages, what they learn from and where the result goes."""

    run_dir: str = "outputs/train"
    """Folder of checkpoints and curves; a run found there is continued."""
    export_dir: str | None = None
    """Folder for the finished model; none writes no export."""
    export_layout: str = "aurora"
    """Layout of the exported files, a name of `aurora convert --help` (conversations)."""
    export_only: bool = False
    """Run no stage; export the newest captioner of `run_dir`, finished or not."""
    model_path: str | None = None
    """Checkpoint that objective conversations starts from, of any known layout: a folder or a hub id; null is the
    bundled aurora-tiny."""
    data: DataConfig = field(default_factory=DataConfig)
    """What objective conversations learns from."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """What objective conversations is validated on."""
    image_aspect_ratio: AspectRatio | None = None
    """pad | crop | squash | native: how frames become square (conversations); null is the checkpoint's."""
    device: str = "auto"
    """Where objective conversations trains: auto, cpu, cuda. Rendered worlds are learned on the CPU."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Where the numbers of a run go."""
    plan: bool = False
    """Print the memory plan of each stage and stop."""
    debug: Debug | None = None
    """meta: check everything without memory for weights, print the plan and stop."""
    bank_dir: str = "outputs/tinyworld"
    """Folder of the rendered clips, shared by runs."""
    parts: list[str] = field(default_factory=list)
    """Stages to run, in order; all of `stages` when empty. Rendered stages that start from nothing run side by side."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stage name -> stage."""
    model: AuroraConfig = field(default_factory=AuroraConfig)
    """The model trained from nothing, or planned; `model_path` brings its own. The tokenizer sets the vocabulary."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer training."""
    num_frames: int = 8
    """Frames of a rendered clip."""
    num_clips: int = 12000
    """Rendered clips at `scale=1`."""
    num_validation_clips: int = 64
    """Held-out clips of a validation."""
    frame_template: str = "{index} <image>"
    """Text around each frame's placeholder in rendered clips."""
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
        if self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints={self.keep_checkpoints}: want at least 1")
        if unknown := [part for part in self.parts if self.stages and part not in self.stages]:
            raise ValueError(f"parts={unknown}: want names of stages ({', '.join(self.stages)})")
