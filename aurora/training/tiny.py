"""The stages that learn from rendered worlds: tokenizer, clips, what each stage learns, and the scores of captions."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from aurora.data.tinyworld.scene import FRAME_TASKS, sample_scene
from aurora.evaluation import tinyvdc
from aurora.model.captioner import AuroraModel
from aurora.model.llama import Llama
from aurora.model.vision import VisionTower
from aurora.processing.image import ImageConfig
from aurora.processing.text import Tokenizer
from aurora.training.bank import ClipBank, open_bank
from aurora.training.config import Objective, StageConfig, TrainConfig
from aurora.training.export import caption_clips, pixel_table
from aurora.training.frames_task import FrameLearner, FramesTask
from aurora.training.init import init_llama, init_tower
from aurora.training.language_tasks import ClipsTask, StoryboardTask
from aurora.training.loop import Task
from aurora.training.state import checkpoint_steps, latest_checkpoint, load_weights
from aurora.training.tokenizer import train_tokenizer
from aurora.training.turn_book import TurnBook

_TOKENIZER_FILE = "tokenizer.model"
_STAGE_KEYS = {Objective.frames: "vision_tower.", Objective.storyboard: "", Objective.clips: ""}
_MODEL_KEYS = {Objective.frames: "vision_tower.", Objective.storyboard: "language_model.", Objective.clips: ""}


def prepare(config: TrainConfig) -> None:
    """Train the tokenizer and render the clips, where they are missing."""
    tokenizer_path = Path(config.run_dir) / "tokenizer" / _TOKENIZER_FILE
    if not tokenizer_path.exists():
        train_tokenizer(tokenizer_path, config.tokenizer, seed=config.seed)
    for split in ("train", "val"):
        clip_bank(config, split)


def clip_bank(config: TrainConfig, split: str) -> ClipBank:
    """Open the rendered clips of `split`, rendering them first where needed."""
    vision = config.model.vision
    wanted = config.num_validation_clips if split == "val" else max(8, round(config.num_clips * min(config.scale, 1.0)))
    return open_bank(
        Path(config.bank_dir),
        split=split,
        num_clips=wanted,
        num_frames=config.num_frames,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        workers=config.workers,
    )


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """Open the tokenizer of the run."""
    return Tokenizer.from_pretrained(Path(config.run_dir) / "tokenizer")


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> AuroraModel:
    """Build the captioner with its initial weights, a function of the seed."""
    torch.manual_seed(config.seed)
    model = AuroraModel(replace(config.model, text=replace(config.model.text, vocab_size=tokenizer.vocab_size)))
    init_tower(model.vision_tower)
    init_llama(model.language_model)
    return model


def build_task(config: TrainConfig, name: str) -> Task:
    """Build what stage `name` learns, with the weights it starts from."""
    stage = config.stages[name]
    torch.manual_seed(config.seed)
    pixels = pixel_table(ImageConfig())
    if stage.objective is Objective.frames:
        tower = VisionTower(config.model.vision, backend=config.model.attn_implementation)
        init_tower(tower)
        learner = FrameLearner(tower, FRAME_TASKS, feature_layer=config.model.feature_layer)
        return FramesTask(
            learner,
            clip_bank(config, "train"),
            clip_bank(config, "val"),
            pixels=pixels,
            batch_size=stage.batch_size,
            seed=config.seed,
            task_weights=stage.task_weights,
        )
    tokenizer = load_tokenizer(config)
    book = turn_book(config, tokenizer, stage)
    if stage.objective is Objective.storyboard:
        text = replace(config.model.text, vocab_size=tokenizer.vocab_size)
        decoder = Llama(text, backend=config.model.attn_implementation)
        init_llama(decoder)
        return StoryboardTask(
            decoder,
            book,
            batch_size=stage.batch_size,
            num_captions=stage.num_captions,
            num_frames=config.num_frames,
            num_validation=config.num_validation_clips,
            seed=config.seed,
        )
    model = build_model(config, tokenizer)
    model.load_state_dict(initial_weights(config, stage, model.state_dict()))
    return ClipsTask(
        model,
        book,
        clip_bank(config, "train"),
        clip_bank(config, "val"),
        pixels=pixels,
        batch_size=stage.batch_size,
        num_captions=stage.num_captions,
        token_kept_ratios=stage.token_kept_ratios,
        seed=config.seed + 1 + list(config.stages).index(name),
    )


def turn_book(config: TrainConfig, tokenizer: Tokenizer, stage: StageConfig | None = None) -> TurnBook:
    """Return the book that writes turns for this recipe's prompts."""
    weight = stage.slot_weight if stage is not None else 1.0
    return TurnBook(tokenizer, num_frames=config.num_frames, frame_template=config.frame_template, slot_weight=weight)


def initial_weights(config: TrainConfig, stage: StageConfig, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `fresh` with what the earlier stages of `init_from` learned.

    Raises:
        ValueError: if an earlier stage is unknown, has no checkpoint, or holds a key the model lacks.
    """
    weights = dict(fresh)
    for name in stage.init_from:
        if name not in config.stages:
            raise ValueError(f"stage.init_from={name}: want names of stages ({', '.join(config.stages)})")
        objective = config.stages[name].objective
        for key, tensor in load_weights(latest_checkpoint(Path(config.run_dir) / name), averaged=True).items():
            if not key.startswith(_STAGE_KEYS[objective]):
                continue  # a head that served the stage alone
            target = _MODEL_KEYS[objective] + key.removeprefix(_STAGE_KEYS[objective])
            if target not in weights:
                raise ValueError(f"stage.init_from={name}: its {key} has no place in the model")
            weights[target] = tensor
    return weights


def trained_model(config: TrainConfig) -> tuple[AuroraModel, Tokenizer]:
    """Load the captioner of the last stage that has a checkpoint, with its tokenizer.

    Raises:
        ValueError: if no stage of objective `clips` has one.
    """
    tokenizer = load_tokenizer(config)
    names = [name for name, stage in config.stages.items() if stage.objective is Objective.clips]
    started = [name for name in names if checkpoint_steps(Path(config.run_dir) / name)]
    if not started:
        raise ValueError(f"run_dir={config.run_dir}: no checkpoint of {', '.join(names)}; want a trained captioner")
    model = build_model(config, tokenizer)
    model.load_state_dict(load_weights(latest_checkpoint(Path(config.run_dir) / started[-1]), averaged=True))
    return model.eval(), tokenizer


def report_captions(config: TrainConfig, name: str, *, num_clips: int = 48, token_kept_ratio: float = 0.4) -> None:
    """Caption held-out clips with the newest captioner; print the scores and keep them in the folder of `name`."""
    model, tokenizer = trained_model(config)
    bank = clip_bank(config, "val")
    rows = range(min(num_clips, len(bank.frames)))
    written = caption_clips(
        model, tokenizer, bank, rows, frame_template=config.frame_template, token_kept_ratio=token_kept_ratio
    )
    scenes = [sample_scene(row, bank.split).to_dict() for row in rows]
    report = tinyvdc.score(written, scenes)
    record = {"token_kept_ratio": token_kept_ratio, "captions": written, **report.to_dict()}
    (Path(config.run_dir) / name / "captions.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: captions of {len(rows)} held-out clips at kept ratio {token_kept_ratio}", flush=True)
    print(tinyvdc.format_report(report), flush=True)
