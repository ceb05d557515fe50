"""config.json of the known layouts to `AuroraConfig` and back. Pure functions on parsed JSON.

The fields are those of CLIPVisionConfig, LlamaConfig and the authors' AuroraConfig. An absent field means that class's
default, since such files leave out what equals a default. Fields unknown to this version are named in one warning.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.model.captioner import IGNORE_INDEX, AuroraConfig
from aurora.model.llama import LlamaConfig, RopeScaling
from aurora.model.merge import MERGE_CHOICES, MergeConfig
from aurora.model.projector import ProjectorConfig
from aurora.model.vision import Activation, VisionConfig

E = TypeVar("E", bound=Enum)
C = TypeVar("C")


def words(text: str) -> frozenset[str]:
    """Names of fields, separated by spaces."""
    return frozenset(text.split())


# Our field -> (Hugging Face's field, its default there).
_VISION_FIELDS: dict[str, tuple[str, int | float]] = {
    "hidden_size": ("hidden_size", 768),
    "intermediate_size": ("intermediate_size", 3072),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "patch_size": ("patch_size", 32),
    "image_size": ("image_size", 224),
    "num_channels": ("num_channels", 3),
    "norm_eps": ("layer_norm_eps", 1e-5),
}
CLIP_KIND, SIGLIP_KIND = "clip_vision_model", "siglip_vision_model"
# SigLIP's defaults where they differ from CLIP's.
_SIGLIP_FIELDS: dict[str, tuple[str, int | float]] = {
    "patch_size": ("patch_size", 16),
    "norm_eps": ("layer_norm_eps", 1e-6),
}
# Not Hugging Face's: towers that are built otherwise than their `model_type` says so; stored only where they differ.
_VISION_FLAGS = {"class_token": True, "pre_norm": True, "patch_bias": False}
_SIGLIP_FLAGS = {"class_token": False, "pre_norm": False, "patch_bias": True}
_TEXT_FIELDS: dict[str, tuple[str, int | float]] = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
# Far above any real model. A config is read before the tensors that prove it wrong, and a size that no machine can
# count with would overflow, or build layers for hours, before that.
_LARGEST = 2**31
_MOST = {"num_layers": 1000, "num_channels": 1024, "patch_size": 4096, "image_size": 2**16} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "vocab_size"), 2**24
)
# Python types of the fields of `merge` whose class does not check them.
_MERGE_TYPES: dict[str, tuple[type, ...]] = {
    "token_kept_ratio": (float, int),
    "inflection": (float, int),
    "r": (list,),
    "visual_token_budget": (int,),
    "slowfast": (bool,),
}
# What transformers, xtuner and training write and a model does not need.
_BOOKKEEPING = words(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path
    add_cross_attention architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout
    dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type projection_dim pruned_heads quantization_config remove_invalid_values
    repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    unsloth_version use_bfloat16 use_cache
    """
)
_TEXT_ONLY = words(
    """
    attention_bias head_dim hidden_act max_position_embeddings max_sequence_length mlp_bias num_key_value_heads
    rope_parameters rope_scaling rope_theta tie_word_embeddings
    """
)
_AURORA_ONLY = words(
    """
    feature_layer ignore_index image_aspect_ratio image_newline image_token_index merge projector_hidden_act
    text_config tie_word_embeddings vision_config vision_feature_layer vision_feature_select_strategy
    """
)


def config_from_aurora(configs: Mapping[str, JsonDict]) -> AuroraConfig:
    """Read the one config.json of the `aurora` layout.

    Args:
        configs: Content by folder; "" is the root.

    Returns:
        The config. An absent `vision_feature_select_strategy` means "full", the default of the authors' branch.

    Raises:
        CheckpointError: for a value this version cannot compute with; it names file, key, got and want.
    """
    root = configs[""]
    vision, text = _section(root, "vision_config"), _section(root, "text_config")
    warn_unknown("config.json", root, _AURORA_ONLY)
    if root.get("ignore_index") not in (None, IGNORE_INDEX):
        raise CheckpointError(f"config.json: ignore_index={root['ignore_index']!r}: want {IGNORE_INDEX}")
    return build(
        AuroraConfig,
        "config.json",
        # The branch's own default for a missing tower is ViT-H/14 at 378 px, not CLIP's.
        vision=read_vision(vision, "config.json: vision_config") if vision else VisionConfig(),
        text=read_text(text, "config.json: text_config"),
        projector=ProjectorConfig(hidden_act=choice(Activation, root, "projector_hidden_act", "gelu", "config.json")),
        **read_shared(root, default_select="full"),
        **read_token_ids({**text, **{k: v for k, v in root.items() if k.endswith("_token_id") and v is not None}}),
    )


def config_from_xtuner(configs: Mapping[str, JsonDict]) -> AuroraConfig:
    """Read the three config.json files of the `xtuner` layout.

    Args:
        configs: Content by folder: "" (Llama), "visual_encoder" (CLIP), "projector".

    Returns:
        The config. An absent `vision_feature_select_strategy` means "default": xtuner drops the class token.

    Raises:
        CheckpointError: for a value this version cannot compute with.
    """
    root, projector = configs[""], configs["projector"]
    where = "projector/config.json"
    vision = read_vision(*tower_section(configs["visual_encoder"], "visual_encoder/config.json"))
    text = read_text(root, "config.json", also_known=_AURORA_ONLY)
    warn_unknown(where, projector, frozenset(("bias", "depth", "hidden_act", "llm_hidden_size", "visual_hidden_size")))
    for key, want in (
        ("depth", 2),
        ("bias", True),
        ("visual_hidden_size", vision.hidden_size),
        ("llm_hidden_size", text.hidden_size),
    ):
        if projector.get(key, want) != want:
            raise CheckpointError(f"{where}: {key}={projector[key]!r}: want {want}")
    return build(
        AuroraConfig,
        "config.json",
        vision=vision,
        text=text,
        projector=ProjectorConfig(hidden_act=choice(Activation, projector, "hidden_act", "gelu", where)),
        **read_shared(root, default_select="default"),
        **read_token_ids(root),
    )


def aurora_config_json(config: AuroraConfig, image_aspect_ratio: str | None = None) -> dict[str, JsonDict]:
    """Write the config.json of the `aurora` layout.

    Args:
        config: The model.
        image_aspect_ratio: pad, crop or squash: how its frames were prepared; None leaves it out.

    Returns:
        Content by folder.
    """
    return {
        "": {
            "architectures": ["AuroraForConditionalGeneration"],
            "model_type": "aurora",
            **write_shared(config, image_aspect_ratio),
            "projector_hidden_act": config.projector.hidden_act.value,
            "ignore_index": IGNORE_INDEX,
            **write_token_ids(config),
            "tie_word_embeddings": config.text.tie_word_embeddings,
            "text_config": {"model_type": "llama", **write_text(config.text), **write_token_ids(config)},
            "vision_config": write_vision(config.vision),
        }
    }


def xtuner_config_json(config: AuroraConfig, image_aspect_ratio: str | None = None) -> dict[str, JsonDict]:
    """Write the three config.json files of the `xtuner` layout.

    The root file also carries what xtuner keeps in code (feature layer, placeholder id, merge defaults), so that
    nothing is lost on the way back; other readers pass over those fields.

    Args:
        config: The model.
        image_aspect_ratio: pad, crop or squash, or None.

    Returns:
        Content by folder.
    """
    return {
        "": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **write_text(config.text),
            **write_token_ids(config),
            **write_shared(config, image_aspect_ratio),
        },
        "visual_encoder": {
            "architectures": ["SiglipVisionModel" if vision_kind(config.vision) == SIGLIP_KIND else "CLIPVisionModel"],
            **write_vision(config.vision),
        },
        "projector": {
            "model_type": "projector",
            "visual_hidden_size": config.vision.hidden_size,
            "llm_hidden_size": config.text.hidden_size,
            "depth": 2,
            "hidden_act": config.projector.hidden_act.value,
            "bias": True,
        },
    }


def read_vision(source: JsonDict, where: str) -> VisionConfig:
    """Read a vision config; `model_type` tells SigLIP's defaults from CLIP's.

    Args:
        source: Fields of CLIPVisionConfig or SiglipVisionConfig.
        where: File, for messages.

    Returns:
        The tower.

    Raises:
        CheckpointError: for a value this version cannot compute with.
    """
    known = {hf for hf, _ in _VISION_FIELDS.values()}
    warn_unknown(where, source, frozenset({*known, "hidden_act", "vision_use_head", *_VISION_FLAGS}))
    siglip = source.get("model_type") == SIGLIP_KIND
    flags = {key: source.get(key, default) for key, default in (_SIGLIP_FLAGS if siglip else _VISION_FLAGS).items()}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise CheckpointError(f"{where}: {key}={value!r}: want true or false")
    activation = choice(Activation, source, "hidden_act", "gelu_pytorch_tanh" if siglip else "quick_gelu", where)
    fields = _VISION_FIELDS | (_SIGLIP_FIELDS if siglip else {})
    return build(VisionConfig, where, hidden_act=activation, **_numbers(source, fields, where), **flags)


def vision_kind(config: VisionConfig) -> str:
    """`model_type` of the Hugging Face tower that is built like this one, empty where there is none."""
    flags = {key: getattr(config, key) for key in _VISION_FLAGS}
    return CLIP_KIND if flags == _VISION_FLAGS else SIGLIP_KIND if flags == _SIGLIP_FLAGS else ""


def write_vision(config: VisionConfig) -> JsonDict:
    """Write a vision config, its `model_type` included; a tower that is neither CLIP's nor SigLIP's says how."""
    fields = {hf: getattr(config, ours) for ours, (hf, _) in _VISION_FIELDS.items()}
    kind = vision_kind(config)
    usual = _SIGLIP_FLAGS if kind == SIGLIP_KIND else _VISION_FLAGS
    flags = {key: getattr(config, key) for key, default in usual.items() if getattr(config, key) != default}
    common = {"model_type": kind or CLIP_KIND, **fields, "hidden_act": config.hidden_act.value}
    return {**common, "attention_dropout": 0.0, **flags}


def tower_section(config: JsonDict, where: str) -> tuple[JsonDict, str]:
    """The tower's own config, and its name for messages: that of a CLIPModel or SiglipModel stands inside."""
    nested = config.get("vision_config")
    if not isinstance(nested, dict):
        return config, where
    # The whole model's file may leave the tower's model_type out.
    kind = SIGLIP_KIND if config.get("model_type") == "siglip" else CLIP_KIND
    return {"model_type": kind, **nested}, f"{where}: vision_config"


def read_text(source: JsonDict, where: str, also_known: frozenset[str] = frozenset()) -> LlamaConfig:
    """Read the config of a Llama-family model.

    Args:
        source: Fields of LlamaConfig.
        where: File, for messages.
        also_known: Further fields that are not to be reported.

    Returns:
        The language model.

    Raises:
        CheckpointError: for a value this version cannot compute with.
    """
    warn_unknown(where, source, _TEXT_ONLY | {hf for hf, _ in _TEXT_FIELDS.values()} | also_known)
    fields = _numbers(source, _TEXT_FIELDS, where)
    width = int(fields["hidden_size"]) // max(1, int(fields["num_heads"]))
    for key, want in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("head_dim", width)):
        if source.get(key) not in (want, None):
            raise CheckpointError(f"{where}: {key}={source[key]!r}: want {want!r}")
    scaling, theta = _rope_from(source, where)
    numbers = {"num_kv_heads": ("num_key_value_heads", fields["num_heads"]), "max": ("max_position_embeddings", 2048)}
    more = _numbers(source, numbers, where)
    # Linear scaling stretches the context beyond max_position_embeddings; llama3 files state the stretched one.
    stretch = scaling.factor if scaling is not None and scaling.rope_type == "linear" else 1.0
    longest = {"max_seq_len": ("max_sequence_length", int(more["max"] * stretch))}
    max_seq_len = _numbers(source, longest, where)["max_seq_len"]
    return build(
        LlamaConfig,
        where,
        num_kv_heads=more["num_kv_heads"],
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=max_seq_len,
        tie_word_embeddings=bool(source.get("tie_word_embeddings", False)),
        **fields,
    )


def write_text(config: LlamaConfig) -> JsonDict:
    """Write the fields of LlamaConfig."""
    scaling = config.rope_scaling
    rope: JsonDict | None = None
    stretch = 1.0
    if scaling is not None:
        # Readers differ in whether they look for "type" or "rope_type".
        rope = {"type": scaling.rope_type, "rope_type": scaling.rope_type, "factor": scaling.factor}
        if scaling.rope_type == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
        else:
            stretch = scaling.factor
    return {
        **{hf: getattr(config, ours) for ours, (hf, _) in _TEXT_FIELDS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": int(config.max_seq_len / stretch),
        "max_sequence_length": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _rope_from(source: JsonDict, where: str) -> tuple[RopeScaling | None, float]:
    """Scaling and theta from `rope_scaling` (either spelling) or the newer `rope_parameters`."""
    key = "rope_parameters" if source.get("rope_parameters") else "rope_scaling"
    rope = source.get(key) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: {key}={rope!r}: want an object")
    stated = {"rope_theta": source.get("rope_theta") or rope.get("rope_theta")}
    theta = float(_numbers(stated, {"rope_theta": ("rope_theta", 10000.0)}, where)["rope_theta"])
    kinds = {str(rope[name]) for name in ("rope_type", "type") if rope.get(name) is not None}
    if not rope or kinds == {"default"} or (not kinds and "factor" not in rope):
        return None, theta
    if len(kinds) != 1 or not kinds <= {"linear", "llama3"}:
        found = ", ".join(sorted(map(str, kinds)))
        raise CheckpointError(f"{where}: {key}.rope_type={found!r}: want one of default, linear, llama3")
    fields = {
        "factor": ("factor", 1.0),
        "low_freq_factor": ("low_freq_factor", 1.0),
        "high_freq_factor": ("high_freq_factor", 4.0),
        "original_max_seq_len": ("original_max_position_embeddings", 8192),
    }
    return build(RopeScaling, where, rope_type=kinds.pop(), **_numbers(rope, fields, f"{where}: {key}")), theta


def read_shared(root: JsonDict, *, default_select: str) -> dict[str, Any]:
    """The fields that concern the whole captioner and stand in the root config."""
    merge = root.get("merge") or {}
    names = {field.name for field in dataclasses.fields(MergeConfig)}
    if not isinstance(merge, dict) or not set(merge) <= names:
        raise CheckpointError(f"config.json: merge={merge!r}: want an object with some of {', '.join(sorted(names))}")
    wish = dict(merge)
    for key, kind in MERGE_CHOICES.items():
        if key in wish:
            wish[key] = choice(kind, wish, key, "", "config.json: merge")
    for key, kinds in _MERGE_TYPES.items():
        value = wish.get(key)
        if key in wish and not (type(value) in kinds or (value is None and key == "visual_token_budget")):
            want = " or ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(f"config.json: merge: {key}={value!r}: want {want}")
    if not all(type(count) is int for count in wish.get("r", [])):
        raise CheckpointError(f"config.json: merge: r={wish['r']!r}: want whole numbers")
    return {
        "feature_layer": _integer(root, "vision_feature_layer", -2),
        "feature_select_strategy": root.get("vision_feature_select_strategy") or default_select,
        "image_token_index": _integer(root, "image_token_index", -200),
        "merge": build(MergeConfig, "config.json", **wish),
    }


def write_shared(config: AuroraConfig, image_aspect_ratio: str | None) -> JsonDict:
    """Write the fields that concern the whole captioner."""
    merge = {
        field.name: value.value if isinstance(value := getattr(config.merge, field.name), Enum) else value
        for field in dataclasses.fields(MergeConfig)
    }
    aspect = {} if image_aspect_ratio is None else {"image_aspect_ratio": image_aspect_ratio}
    return {
        "image_token_index": config.image_token_index,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": config.feature_select_strategy,
        "merge": merge,
        **aspect,
    }


def read_token_ids(source: JsonDict) -> dict[str, int]:
    """Special token ids; a null end-of-text id means that generation never stops by itself."""
    eos = source.get("eos_token_id", 2)
    if isinstance(eos, list):
        if len(eos) != 1:
            raise CheckpointError(f"config.json: eos_token_id={eos!r}: want one id")
        eos = eos[0]
    source = {**source, "eos_token_id": -1 if eos is None else eos}
    return {key: _integer(source, key, default) for key, default in _TOKEN_DEFAULTS.items()}


_TOKEN_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def write_token_ids(config: AuroraConfig) -> JsonDict:
    """Write the special token ids; an end-of-text id of -1 is null."""
    ids = {key: getattr(config, key) for key in _TOKEN_DEFAULTS}
    return {key: None if value == -1 else value for key, value in ids.items()}


def _section(root: JsonDict, key: str) -> JsonDict:
    value = root.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key}={value!r}: want an object")
    return value


def _integer(source: JsonDict, key: str, default: int) -> int:
    value = source.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json: {key}={value!r}: want an integer")
    return value


def _numbers(source: JsonDict, fields: Mapping[str, tuple[str, int | float]], where: str) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for ours, (key, default) in fields.items():
        value = default if source.get(key) is None else source[key]
        kinds = (int, float) if isinstance(default, float) else (int,)
        noun = "number" if float in kinds else "integer"
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise CheckpointError(f"{where}: {key}={value!r}: want a positive {noun}")
        check_size(ours, value, f"{where}: {key}")
        numbers[ours] = float(value) if isinstance(default, float) else value
    return numbers


def check_size(ours: str, value: float, label: str) -> None:
    """Refuse a size of the model that is not positive, or far above any real one.

    Raises:
        CheckpointError: with the label and the bound.
    """
    most = _MOST.get(ours, _LARGEST)
    if not 0 < value <= most:
        want = "a positive number" if value <= 0 else f"at most {most}"
        raise CheckpointError(f"{label}={value!r}: want {want}")


def choice(kind: type[E], source: JsonDict, key: str, default: str, where: str) -> E:
    """Read one of the values of an enumeration; an absent or null field is the default."""
    value = default if source.get(key) is None else source[key]
    names = [member.value for member in kind]
    if value not in names:
        raise CheckpointError(f"{where}: {key}={value!r}: want one of {', '.join(names)}")
    return kind(value)


def build(kind: type[C], where: str, **fields: Any) -> C:
    """Build a config dataclass; what it refuses is reported with the file."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def warn_unknown(where: str, source: JsonDict, known: frozenset[str]) -> None:
    """Name the fields that are neither known nor bookkeeping in one warning."""
    unknown = sorted(set(source) - known - _BOOKKEEPING)
    if unknown:
        warnings.warn(f"{where}: fields this version does not know are passed over: {', '.join(unknown)}", stacklevel=4)
