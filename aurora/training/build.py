"""What a stage of conversations is built from: model, processor, data, and what a finished one left."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from aurora.checkpoint.pretrained import load_pretrained, resolve_checkpoint
from aurora.data.datasets import ConversationData, open_data
from aurora.data.prepare import frame_tokens
from aurora.data.records import DataConfig
from aurora.model.captioner import AuroraModel
from aurora.processing.image import AspectRatio
from aurora.processing.processor import AuroraProcessor
from aurora.training.config import Parallel, StageConfig, TrainConfig
from aurora.training.conversations import AnswerLoss, ConversationTask
from aurora.training.distributed import World, shard
from aurora.training.frames_task import freeze_unused
from aurora.training.loop import freeze
from aurora.training.lora import apply_lora, merge_lora
from aurora.training.state import latest_checkpoint, load_weights

BUNDLED_MODEL = Path(__file__).parents[1] / "assets" / "aurora-tiny"
"""Where training starts if no checkpoint is named."""


class Start(NamedTuple):
    """What a stage starts from."""

    model: AuroraModel
    processor: AuroraProcessor
    image_aspect_ratio: str
    """How frames become square in this training."""


def load_start(config: TrainConfig, *, dtype: torch.dtype | str | None = None) -> Start:
    """Load the checkpoint a recipe of conversations starts from, on the CPU.

    Args:
        config: The recipe.
        dtype: Of the weights; None is float32, "auto" the stored one, mapped from the files without a copy.

    Raises:
        ValueError: if it cannot be loaded.
    """
    folder = resolve_checkpoint(config.model_path if config.model_path is not None else BUNDLED_MODEL)
    loaded = load_pretrained(folder, dtype=dtype, attn_implementation=config.model.attn_implementation)
    processor = AuroraProcessor.from_pretrained(folder)
    image = processor.image_processor.config
    if config.image_aspect_ratio is not None:
        image.aspect_ratio = config.image_aspect_ratio
    elif loaded.image_aspect_ratio is not None:
        with suppress(KeyError):
            image.aspect_ratio = AspectRatio[loaded.image_aspect_ratio]
    image.patch_size = loaded.model.config.vision.patch_size
    return Start(loaded.model, processor, image.aspect_ratio.value)


def load_stage(config: TrainConfig, name: str, start: Start | None = None) -> Start:
    """Load what stage `name` has learned so far: averaged weights where it keeps any, adapters folded in.

    Args:
        config: The recipe.
        name: The stage.
        start: What `load_start` returned, in float32; its model is changed. None loads it.

    Raises:
        ValueError: if the stage is unknown or has no checkpoint.
    """
    if name not in config.stages:
        raise ValueError(f"stage.init_from={name}: want names of stages ({', '.join(config.stages)})")
    start = start or load_start(config)
    stage = config.stages[name]
    if stage.lora is not None:
        apply_lora(start.model, stage.lora)
    start.model.load_state_dict(load_weights(latest_checkpoint(Path(config.run_dir) / name), averaged=True))
    merge_lora(start.model)
    start.model.requires_grad_(True)
    return start


def open_conversations(config: DataConfig, start: Start, stage: StageConfig) -> ConversationData:
    """Open data with the tokenizer, frames and merging of a stage, cut to the model's context.

    Raises:
        ValueError: as `open_data`.
    """
    return open_data(
        replace(config, max_length=min(config.max_length, start.model.config.text.max_seq_len)),
        start.processor.tokenizer,
        start.processor.image_processor,
        image_token_index=start.processor.image_token_index,
        frame_template=start.processor.frame_template,
        tokens_per_placeholder_fn=frame_tokens(start.model.config, stage.merge),
    )


def build_conversation_task(config: TrainConfig, name: str, world: World) -> ConversationTask:
    """Build what stage `name` learns, with the weights it starts from, frozen and sharded as it is to be.

    Raises:
        ValueError: if a setting does not fit the ranks, or model or data cannot be opened.
    """
    stage = config.stages[name]
    check_ranks(stage, world.size)
    shares_model = stage.parallel is Parallel.fsdp and world.size > 1
    # Ranks that share a model map the files, and copy only their own part.
    mapped = shares_model and not stage.init_from
    start = load_start(config, dtype="auto" if mapped else None)
    for earlier in stage.init_from:
        start = load_stage(config, earlier, start)
    data = open_conversations(config.data, start, stage)
    held_out = None
    if config.validation.path is not None:
        wanted = replace(config.data, path=config.validation.path, media=config.validation.media, sources={})
        held_out = open_conversations(wanted, start, stage)
    model = prepare_model(start.model, stage, seed=config.seed)
    learner = AnswerLoss(model, merge=stage.merge, row_length=data.config.max_length if stage.packing else None)
    if shares_model:
        shard(learner, model.language_model.layers, world=world, precision=stage.precision)
    learner.to(device=world.device, dtype=torch.float32)
    if stage.compile:
        model.vision_tower.compile_blocks()
        for layer in model.language_model.layers:
            layer.compile(dynamic=True)
    return ConversationTask(
        learner,
        data,
        start.processor,
        stage,
        seed=config.seed,
        held_out=held_out,
        validation=config.validation,
    )


def prepare_model(model: AuroraModel, stage: StageConfig, *, seed: int = 0) -> AuroraModel:
    """Freeze what a stage does not train, add its adapters and settings; in place, also on the meta device.

    Raises:
        ValueError: if a prefix or a target matches nothing.
    """
    model.requires_grad_(True)
    freeze_unused(model.vision_tower, model.config.feature_layer)
    adapters: list[str] = []
    if stage.lora is not None:
        torch.manual_seed(seed)  # every rank draws the same adapters
        adapters = apply_lora(model, stage.lora)
    freeze(model, stage.trainable)
    if frozen := [name for name in adapters if not model.get_parameter(name).requires_grad]:
        raise ValueError(
            f"stage.trainable={stage.trainable}: freezes adapters, such as {frozen[0]}; want their part in it"
        )
    model.vision_tower.activation_checkpointing = stage.activation_checkpointing
    model.language_model.activation_checkpointing = stage.activation_checkpointing
    return model


def check_ranks(stage: StageConfig, num_ranks: int) -> None:
    """Refuse a number of ranks that cannot share a stage.

    Raises:
        ValueError: if the model is not to be shared, or the batch cannot be.
    """
    if stage.parallel is Parallel.none and num_ranks > 1:
        raise ValueError(f"stage.parallel=none: got {num_ranks} ranks, want parallel=ddp or fsdp")
    if stage.batch_size % num_ranks:
        raise ValueError(f"stage.batch_size={stage.batch_size}: want a multiple of the {num_ranks} ranks")
