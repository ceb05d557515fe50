"""LoRA adapters in peft's format, merged into the weights they were trained on (Hu et al., 2021).

xtuner exports them as `llm_adapter/` and `visual_encoder_adapter/`, and then leaves the frozen weights out: those are
taken from the folder or hub id that `adapter_config.json` names. W becomes W + scale * B @ A, scale = alpha / r.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aurora.checkpoint.lazy import LazyTensor
from aurora.checkpoint.store import CheckpointError, JsonDict, read_json

ADAPTER_FOLDERS = {"llm_adapter": "", "visual_encoder_adapter": "visual_encoder"}
"""Folder of an adapter -> folder of the part it belongs to."""
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
# What changes the formula; anything else in adapter_config.json concerns training.
_REFUSED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "use_qalora": (None, False),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter folder: low-rank factors by the foreign name of the weight they change."""

    folder: Path
    factors: Mapping[str, tuple[LazyTensor, LazyTensor, float]]
    """Foreign name of a weight -> A (r, in), B (out, r), scale."""


def adapter_config(folder: Path) -> JsonDict:
    """Read adapter_config.json.

    Args:
        folder: Folder of the adapter.

    Returns:
        Its content.

    Raises:
        CheckpointError: if it is missing, or asks for something other than plain LoRA.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    for key, accepted in _REFUSED.items():
        if config.get(key, accepted[0]) not in accepted:
            raise CheckpointError(f"{path}: {key}={config[key]!r}: want {accepted[-1]!r}; only plain LoRA is merged")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{path}: {key}={value!r}: want a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{path}: {key}={config[key]!r}: want an object")
    return config


def base_of(folder: Path) -> str:
    """Folder or hub id of the weights an adapter was trained on.

    Raises:
        CheckpointError: if adapter_config.json names none.
    """
    base = adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path={base!r}: want a folder or a hub id"
        )
    return base


def pair_factors(folder: Path, tensors: Mapping[str, LazyTensor]) -> Adapter:
    """Pair the factors of an adapter.

    Args:
        folder: Folder with adapter_config.json.
        tensors: Content of its weight file, by name.

    Returns:
        The adapter.

    Raises:
        CheckpointError: if a tensor is no LoRA factor, lacks its partner, or their shapes do not fit.
    """
    config = adapter_config(folder)
    found: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None or len(tensor.shape) != 2:
            raise CheckpointError(f"{tensor.file}: {key} is no LoRA factor, want ...lora_A.weight and ...lora_B.weight")
        found.setdefault(match["module"], {})[match["which"]] = tensor
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (config.get(key) or {}).items():
            known = any(f".{module}".endswith(f".{pattern}") for module in found)
            if not known or isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise CheckpointError(
                    f"{folder / 'adapter_config.json'}: {key}.{pattern}={value!r}: want a positive number for the end "
                    "of a module's name"
                )
    factors: dict[str, tuple[LazyTensor, LazyTensor, float]] = {}
    for module, pair in found.items():
        if len(pair) != 2:
            raise CheckpointError(f"{folder}: {module} has lora_{next(iter(pair))} alone, want lora_A and lora_B")
        a, b = pair["A"], pair["B"]
        rank = _for_module(config, "rank_pattern", module, config["r"])
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise CheckpointError(f"{folder}: {module} has rank {a.shape[0]} and {b.shape[1]}, want {rank}")
        alpha = float(_for_module(config, "alpha_pattern", module, config["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[f"{module}.weight"] = (a, b, scale)
    return Adapter(folder=folder, factors=factors)


def merge_adapter(
    adapter: Adapter, tensors: dict[str, LazyTensor], to_ours: Callable[[str], str | None]
) -> dict[str, LazyTensor]:
    """Replace the weights an adapter changes by merged ones, in their own dtype.

    Args:
        adapter: The adapter.
        tensors: Our name -> weight.
        to_ours: Foreign name -> our name.

    Returns:
        All tensors.

    Raises:
        CheckpointError: if the adapter changes a weight that is not there, or of another shape.
    """
    merged = dict(tensors)
    for foreign, (a, b, scale) in adapter.factors.items():
        name = to_ours(foreign)
        if name is None or name not in merged:
            raise CheckpointError(f"{adapter.folder}: it changes {foreign}, which the model does not have")
        base = merged[name]
        shape = (b.shape[0], a.shape[1])
        if shape != base.shape:
            raise CheckpointError(f"{adapter.folder}: {foreign}: got {shape} from the factors, want {base.shape}")
        merged[name] = replace(base, read=_merged(base, a, b, scale), view=None)
    return merged


def _merged(base: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> Callable[[], Tensor]:
    def read() -> Tensor:
        change = scale * (b.read().float() @ a.read().float())
        weight = base.read()
        return (weight.to(torch.float32) + change).to(weight.dtype)

    return read


def _for_module(config: JsonDict, key: str, module: str, default: float) -> float:
    """Value for one module; a pattern is the end of its name."""
    for pattern, value in (config.get(key) or {}).items():
        if f".{module}".endswith(f".{pattern}"):
            return float(value)
    return float(default)
