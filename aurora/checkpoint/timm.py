"""Configs of timm and open_clip towers to `VisionConfig` and back. Pure functions on parsed JSON; timm is not needed.

timm's config.json names an architecture, and sizes only where they differ from it, so the architectures of plain ViTs
are listed here (timm 1.0, models/vision_transformer.py). The activation is the one of the training: the CLIP weights
of OpenAI, MetaCLIP and DFN used QuickGELU where their timm architecture says GELU (timm notes it in the config), and
SigLIP the tanh approximation, which some of timm's architectures replace by the exact GELU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from aurora.checkpoint.hf_config import build, check_size
from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.model.vision import Activation, VisionConfig

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


class _Size(NamedTuple):
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_ratio: float = 4.0


_SIZES = {
    "tiny": _Size(192, 12, 3),
    "small": _Size(384, 12, 6),
    "medium": _Size(512, 12, 8),
    "base": _Size(768, 12, 12),
    "large": _Size(1024, 24, 16),
    "huge": _Size(1280, 32, 16),
    "giant": _Size(1408, 40, 16, 48 / 11),
    "gigantic": _Size(1664, 48, 16, 64 / 13),
    "so400m": _Size(1152, 27, 16, 3.7362),
    "giantopt": _Size(1536, 40, 16),
}
_ARCHITECTURE = re.compile(
    r"vit_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)_(?P<clip>clip_)?(?P<quick>quickgelu_)?(?P<siglip>siglip_)?(?P<gap>gap_)?(?P<image>\d+)"
)
_ACTIVATIONS = {"quick_gelu": Activation.quick_gelu, "gelu": Activation.gelu, "gelu_tanh": Activation.gelu_tanh}
_LARGEST_RATIO = 64
_MODEL_ARGS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "hidden_size",
    "depth": "num_layers",
    "num_heads": "num_heads",
    "in_chans": "num_channels",
    "class_token": "class_token",
    "pre_norm": "pre_norm",
}
# What leads to the same tower: only the pooling, the classifier or the training differ.
_HARMLESS = {"num_classes", "global_pool", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "fc_norm"}


def vision_from_timm(config: JsonDict, *, where: str = "config.json") -> VisionConfig:
    """Read the config.json of a timm model.

    Args:
        config: Parsed JSON with `architecture`, and perhaps `model_args` and `pretrained_cfg`.
        where: Name for messages.

    Returns:
        The tower.

    Raises:
        CheckpointError: for an architecture or argument that this version does not know.
    """
    name = str(config.get("architecture"))
    found = _ARCHITECTURE.fullmatch(name.partition(".")[0])
    if found is None or found["size"] not in _SIZES:
        kinds = ", ".join(_SIZES)
        raise CheckpointError(
            f"{where}: architecture={name!r}: want a plain ViT such as vit_huge_patch14_clip_378; sizes: {kinds}"
        )
    size = _SIZES[found["size"]]
    pretrained = _object(config, "pretrained_cfg", where)
    is_clip, is_siglip = found["clip"] is not None, found["siglip"] is not None
    fields: dict[str, Any] = {
        "hidden_size": size.hidden_size,
        "num_layers": size.num_layers,
        "num_heads": size.num_heads,
        "patch_size": int(found["patch"]),
        "image_size": _image_size(pretrained, int(found["image"]), where),
        "class_token": not is_siglip,
        "pre_norm": is_clip,
        "norm_eps": 1e-5 if is_clip else 1e-6,
        "hidden_act": Activation.gelu,
    }
    notes = str(pretrained.get("notes") or "")
    if found["quick"] or "natively QuickGELU" in notes:
        fields["hidden_act"] = Activation.quick_gelu
    elif is_siglip:
        fields["hidden_act"] = Activation.gelu_tanh
    args = _object(config, "model_args", where)
    mlp_ratio = _apply_args(args, fields, where, default_ratio=size.mlp_ratio)
    fields["intermediate_size"] = int(fields["hidden_size"] * mlp_ratio)
    # timm leaves the bias of the patch embedding out where a norm follows it.
    fields["patch_bias"] = not fields["pre_norm"]
    return _build(fields, where)


def timm_config_json(config: VisionConfig, image_aspect_ratio: str | None = None) -> JsonDict:
    """Write a config.json that timm reads (`timm.create_model("local-dir:...")`), every size spelt out.

    Args:
        config: The tower.
        image_aspect_ratio: pad, crop or squash, or None.

    Returns:
        The content.

    Raises:
        CheckpointError: for a tower that timm's VisionTransformer cannot be.
    """
    if config.patch_bias == config.pre_norm:
        raise CheckpointError(
            f"layout timm: vision.patch_bias={config.patch_bias} with pre_norm={config.pre_norm}: timm has one of them"
        )
    if config.norm_eps not in (1e-5, 1e-6):
        raise CheckpointError(f"layout timm: vision.norm_eps={config.norm_eps}: want 1e-05 or 1e-06, timm's choices")
    # The architecture brings the epsilon, which model_args cannot carry: CLIP's is 1e-5.
    family = "clip_" if config.norm_eps == 1e-5 else ""
    side = config.image_size
    args = {theirs: getattr(config, ours) for theirs, ours in _MODEL_ARGS.items()}
    args["mlp_ratio"] = _exact_ratio(config)
    args["act_layer"] = next(name for name, kind in _ACTIVATIONS.items() if kind is config.hidden_act)
    args["global_pool"] = "token" if config.class_token else "avg"
    args["fc_norm"] = False
    is_clip = config.class_token
    preprocess: JsonDict = {
        "input_size": [config.num_channels, side, side],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": {"squash": "squash", "pad": "border"}.get(image_aspect_ratio or "", "center"),
        "mean": list(OPENAI_MEAN if is_clip else SIGLIP_MEAN),
        "std": list(OPENAI_STD if is_clip else SIGLIP_STD),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": f"vit_base_patch16_{family}224",
        "num_classes": 0,
        "num_features": config.hidden_size,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": preprocess,
    }


def vision_from_open_clip(config: JsonDict, *, where: str = "open_clip_config.json") -> VisionConfig:
    """Read an open_clip_config.json.

    Args:
        config: Parsed JSON with `model_cfg`.
        where: Name for messages.

    Returns:
        The tower.

    Raises:
        CheckpointError: for a tower that is no plain ViT.
    """
    model = _object(config, "model_cfg", where)
    vision = _object(model, "vision_cfg", where)
    trunk = vision.get("timm_model_name")
    if trunk is not None:
        args = {**_object(vision, "timm_model_kwargs", where)}
        if isinstance(vision.get("image_size"), int):
            args["img_size"] = vision["image_size"]
        return vision_from_timm({"architecture": trunk, "model_args": args}, where=where)
    refused = {"attentional_pool", "patch_dropout", "no_ln_pre", "ls_init_value", "block_type", "qk_norm"}
    for key in sorted(refused & vision.keys()):
        if vision[key] not in (None, False, 0, 0.0):
            raise CheckpointError(f"{where}: model_cfg.vision_cfg.{key}={vision[key]!r}: want a plain ViT")
    numbers = {"width": 768, "layers": 12, "head_width": 64, "patch_size": 16, "image_size": 224}
    got = {key: vision.get(key, default) for key, default in numbers.items()}
    for key, value in got.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{where}: model_cfg.vision_cfg.{key}={value!r}: want a positive integer")
    ratio = vision.get("mlp_ratio", 4.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= _LARGEST_RATIO:
        raise CheckpointError(f"{where}: model_cfg.vision_cfg.mlp_ratio={ratio!r}: want a number in (0, 64]")
    fields = {
        "hidden_size": got["width"],
        "intermediate_size": int(got["width"] * ratio),
        "num_layers": got["layers"],
        "num_heads": got["width"] // got["head_width"],
        "patch_size": got["patch_size"],
        "image_size": got["image_size"],
        "hidden_act": Activation.quick_gelu if model.get("quick_gelu") else Activation.gelu,
    }
    return _build(fields, where)


def open_clip_config_json(config: VisionConfig, image_aspect_ratio: str | None = None) -> JsonDict:
    """Write the vision half of an open_clip_config.json.

    Args:
        config: The tower.
        image_aspect_ratio: pad, crop or squash, or None.

    Returns:
        The content.

    Raises:
        CheckpointError: for a tower that open_clip stores as a timm trunk, such as SigLIP's.
    """
    plain = (config.class_token, config.pre_norm, config.patch_bias, config.norm_eps) == (True, True, False, 1e-5)
    if not plain or config.hidden_act is Activation.gelu_tanh:
        raise CheckpointError("layout open_clip: want a CLIP tower; for another one, SigLIP's too, use layout=timm")
    return {
        "model_cfg": {
            "quick_gelu": config.hidden_act is Activation.quick_gelu,
            "vision_cfg": {
                "image_size": config.image_size,
                "layers": config.num_layers,
                "width": config.hidden_size,
                "head_width": config.head_dim,
                "patch_size": config.patch_size,
                "mlp_ratio": _exact_ratio(config),
            },
        },
        "preprocess_cfg": {
            "mean": list(OPENAI_MEAN),
            "std": list(OPENAI_STD),
            "interpolation": "bicubic",
            "resize_mode": {"squash": "squash", "pad": "longest"}.get(image_aspect_ratio or "", "shortest"),
        },
    }


def _build(fields: Mapping[str, Any], where: str) -> VisionConfig:
    """Build the config, of sizes that a machine can count with."""
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            check_size(name, value, f"{where}: {name}")
    return build(VisionConfig, where, **fields)


def _exact_ratio(config: VisionConfig) -> float:
    """A ratio whose product with the width, cut to an integer, is the MLP's width."""
    ratio = config.intermediate_size / config.hidden_size
    # The product of a rounded quotient may fall just below the integer; half a unit more is cut away again.
    return ratio if int(config.hidden_size * ratio) == config.intermediate_size else ratio + 0.5 / config.hidden_size


def _apply_args(args: JsonDict, fields: dict[str, Any], where: str, *, default_ratio: float) -> float:
    """Put `model_args` into the fields; returns the MLP ratio."""
    ratio = default_ratio
    for key, value in args.items():
        if key in _MODEL_ARGS:
            wanted = bool if key in ("class_token", "pre_norm") else int
            square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
            side = value[0] if key == "img_size" and square else value
            if type(side) is not wanted:
                raise CheckpointError(f"{where}: model_args.{key}={value!r}: want {wanted.__name__}")
            fields[_MODEL_ARGS[key]] = side
        elif key == "mlp_ratio" and isinstance(value, int | float) and 0 < value <= _LARGEST_RATIO:
            ratio = float(value)
        elif key == "act_layer" and isinstance(value, str) and value in _ACTIVATIONS:
            fields["hidden_act"] = _ACTIVATIONS[value]
        elif key not in _HARMLESS:
            raise CheckpointError(f"{where}: model_args.{key}={value!r}: this version does not know it")
    return ratio


def _image_size(pretrained: JsonDict, default: int, where: str) -> int:
    shape = pretrained.get("input_size")
    if shape is None:
        return default
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) for n in shape) or shape[1] < 1:
        raise CheckpointError(f"{where}: pretrained_cfg.input_size={shape!r}: want [channels, height, width]")
    return int(shape[1])


def _object(source: JsonDict, key: str, where: str) -> JsonDict:
    value = source.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key}={value!r}: want an object")
    return value
