"""A tiny captioner on disk, a few conversations about noise images, and recipes of the three published stages."""

import functools
from dataclasses import replace
from pathlib import Path

import torch

from aurora.checkpoint.pretrained import save_model
from aurora.data.records import DataConfig
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergeConfig
from aurora.model.vision import VisionConfig
from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer
from aurora.training.config import Objective, Parallel, Precision, StageConfig, TrainConfig
from aurora.training.distributed import World
from aurora.training.init import init_llama, init_tower
from aurora.training.logger import LoggerConfig
from aurora.training.optim import LRSchedule, OptimConfig
from aurora.training.run import run_part
from tests.data.datasets import write_dataset

TOKENIZER = Path(__file__).parents[2] / "aurora" / "assets" / "aurora-tiny"
TRAINABLE = {"pretrain": ["projector."], "vision": ["vision_tower.", "projector."], "language": [""]}
RATIOS = {"pretrain": 1.0, "vision": 1.0, "language": 0.4}
STAGES = tuple(TRAINABLE)


def small_model() -> AuroraModel:
    torch.manual_seed(3)
    tokenizer = Tokenizer.from_pretrained(TOKENIZER)
    vision = VisionConfig(hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2, patch_size=7, image_size=28)
    text = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        max_seq_len=512,
    )
    model = AuroraModel(AuroraConfig(vision=vision, text=text))
    init_tower(model.vision_tower)
    init_llama(model.language_model)
    return model


def save_start(folder: Path, model: AuroraModel | None = None) -> Path:
    """Write a checkpoint to start from."""
    model = model or small_model()
    images = AuroraImageProcessor(ImageConfig(image_size=model.config.vision.image_size))
    save_model(model, folder, image_aspect_ratio="pad")
    AuroraProcessor(images, Tokenizer.from_pretrained(TOKENIZER)).save_pretrained(folder)
    return folder


@functools.cache
def stage_of(name: str) -> StageConfig:
    return StageConfig(
        objective=Objective.conversations,
        num_steps=4,
        batch_size=4,
        accumulation_steps=2,
        precision=Precision.fp32,
        trainable=TRAINABLE[name],
        merge=MergeConfig(token_kept_ratio=RATIOS[name]),
        optim=OptimConfig(lr=1e-2, schedule=LRSchedule.cosine, warmup_share=0.25, final_lr_share=0.0, weight_decay=0.0),
        checkpoint_every=2,
        validate_every=100,
        log_every=1,
    )


def recipe_of(folder: Path, name: str, run: str = "run", **changes: object) -> TrainConfig:
    """A recipe of one stage in `folder`, which gets a start and data if it has none."""
    if not (folder / "start").exists():
        save_start(folder / "start")
        write_dataset(folder)
    return TrainConfig(
        run_dir=str(folder / run),
        model_path=str(folder / "start"),
        data=DataConfig(path=str(folder / "data.jsonl"), max_length=256),
        stages={name: replace(stage_of(name), **changes)},  # type: ignore[arg-type]
        device="cpu",
        logger=LoggerConfig(progress=False),
        workers=2,
    )


def run_alone(config: TrainConfig, name: str) -> None:
    """Run a stage in this process."""
    run_part(World(), config, name)


__all__ = ["STAGES", "Parallel", "Precision", "recipe_of", "run_alone", "save_start", "small_model", "stage_of"]
