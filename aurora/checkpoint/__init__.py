"""Checkpoints: safetensors files, the layouts they come in, loading and saving whole models."""

from aurora.checkpoint.layouts import ALL_LAYOUTS, LAYOUTS
from aurora.checkpoint.pretrained import (
    Loaded,
    load_language_model,
    load_model,
    load_pretrained,
    load_vision_tower,
    read_config,
    resolve_checkpoint,
    save_model,
)
from aurora.checkpoint.store import CheckpointError

__all__ = [
    "ALL_LAYOUTS",
    "LAYOUTS",
    "CheckpointError",
    "Loaded",
    "load_language_model",
    "load_model",
    "load_pretrained",
    "load_vision_tower",
    "read_config",
    "resolve_checkpoint",
    "save_model",
]
