"""A recipe small enough for a test: 4 frames of 32 px, a tower of 3 blocks, a decoder of 2 layers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from aurora.model.captioner import AuroraConfig
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig
from aurora.training.config import Objective, Precision, StageConfig, TokenizerConfig, TrainConfig
from aurora.training.optim import OptimConfig
from aurora.training.tiny import prepare


def small_stage(objective: Objective, **changes: object) -> StageConfig:
    fields: dict[str, object] = {
        "objective": objective,
        "num_steps": 4,
        "batch_size": 2,
        "precision": Precision.fp32,
        "optim": OptimConfig(lr=1e-3, warmup_steps=2),
        "checkpoint_every": 2,
        "validate_every": 100,
        "log_every": 1,
        **changes,
    }
    return StageConfig(**fields)  # type: ignore[arg-type]


def small_recipe(run_dir: Path, bank_dir: Path) -> TrainConfig:
    clips = {"token_kept_ratios": [1.0, 0.4], "num_captions": 1}
    return TrainConfig(
        run_dir=str(run_dir),
        bank_dir=str(bank_dir),
        num_frames=4,
        num_clips=8,
        num_validation_clips=4,
        workers=1,
        model=AuroraConfig(
            vision=VisionConfig(
                hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, patch_size=8, image_size=32
            ),
            text=LlamaConfig(
                hidden_size=48, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2, max_seq_len=1024
            ),
            attn_implementation="eager",
        ),
        tokenizer=TokenizerConfig(vocab_size=700, num_scenes=60),
        stages={
            "tower": small_stage(Objective.frames),
            "decoder": small_stage(Objective.storyboard),
            "pretrain": small_stage(Objective.clips, init_from=["tower", "decoder"], trainable=["projector."], **clips),
            "vision": small_stage(
                Objective.clips, init_from=["pretrain"], trainable=["projector.", "vision_tower."], **clips
            ),
            "language": small_stage(Objective.clips, init_from=["vision"], **clips),
        },
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A recipe with tokenizer and clips, no stage run."""
    folder = tmp_path_factory.mktemp("recipe")
    config = small_recipe(folder / "run", folder / "bank")
    prepare(config)
    return config


@pytest.fixture
def recipe(prepared: TrainConfig, tmp_path: Path) -> Callable[[str], TrainConfig]:
    """Make a recipe with a run folder of its own, given a name, over the shared tokenizer and clips."""

    def make(name: str) -> TrainConfig:
        config = small_recipe(tmp_path / name, Path(prepared.bank_dir))
        tokenizer = Path(config.run_dir) / "tokenizer" / "tokenizer.model"
        tokenizer.parent.mkdir(parents=True)
        tokenizer.write_bytes((Path(prepared.run_dir) / "tokenizer" / "tokenizer.model").read_bytes())
        return config

    return make
