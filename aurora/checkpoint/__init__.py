"""Checkpoints: safetensors files, the layouts they come in, loading and saving whole models."""

from aurora.checkpoint.layouts import LAYOUTS
from aurora.checkpoint.pretrained import (
    Loaded,
    load_model,
    load_pretrained,
    read_config,
    resolve_checkpoint,
    save_model,
)
from aurora.checkpoint.store import CheckpointError

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Loaded",
    "load_model",
    "load_pretrained",
    "read_config",
    "resolve_checkpoint",
    "save_model",
]
