"""config.json of the known layouts to `AuroraConfig` and back. Pure functions on parsed JSON.

The fields are those of CLIPVisionConfig, LlamaConfig and the authors' AuroraConfig. An absent field means that class's
default, since such files leave out what equals a default. Fields unknown to this version are named in one warning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.model.captioner import AuroraConfig
from aurora.model.llama import LlamaConfig, RopeScaling
from aurora.model.merge import MergeConfig, Schedule, SizeBias
from aurora.model.projector import ProjectorConfig
from aurora.model.vision import Activation, VisionConfig

E = TypeVar("E", bound=Enum)
C = TypeVar("C")


def _words(text: str) -> frozenset[str]:
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
# Not Hugging Face's: towers that are built otherwise than CLIP's say so; stored only where they differ from it.
_VISION_FLAGS = {"class_token": True, "pre_norm": True, "patch_bias": False}
_TEXT_FIELDS: dict[str, tuple[str, int | float]] = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
# What transformers, xtuner and training write and a model does not need.
_BOOKKEEPING = _words(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path
    add_cross_attention architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout
    dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type projection_dim pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    unsloth_version use_bfloat16 use_cache
    """
)
_TEXT_ONLY = _words(
    """
    attention_bias head_dim hidden_act max_position_embeddings max_sequence_length mlp_bias num_key_value_heads
    rope_parameters rope_scaling rope_theta tie_word_embeddings
    """
)
_AURORA_ONLY = _words(
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
    _warn_unknown("config.json", root, _AURORA_ONLY)
    return _build(
        AuroraConfig,
        "config.json",
        # The branch's own default for a missing tower is ViT-H/14 at 378 px, not CLIP's.
        vision=_vision_from(vision, "config.json: vision_config") if vision else VisionConfig(),
        text=_text_from(text, "config.json: text_config"),
        projector=ProjectorConfig(hidden_act=_choice(Activation, root, "projector_hidden_act", "gelu", "config.json")),
        **_shared_from(root, default_select="full"),
        **_token_ids({**text, **{k: v for k, v in root.items() if k.endswith("_token_id") and v is not None}}),
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
    vision = _vision_from(configs["visual_encoder"], "visual_encoder/config.json")
    text = _text_from(root, "config.json", also_known=_AURORA_ONLY)
    _warn_unknown(where, projector, frozenset(("bias", "depth", "hidden_act", "llm_hidden_size", "visual_hidden_size")))
    for key, want in (
        ("depth", 2),
        ("bias", True),
        ("visual_hidden_size", vision.hidden_size),
        ("llm_hidden_size", text.hidden_size),
    ):
        if projector.get(key, want) != want:
            raise CheckpointError(f"{where}: {key}={projector[key]!r}: want {want}")
    return _build(
        AuroraConfig,
        "config.json",
        vision=vision,
        text=text,
        projector=ProjectorConfig(hidden_act=_choice(Activation, projector, "hidden_act", "gelu", where)),
        **_shared_from(root, default_select="default"),
        **_token_ids(root),
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
            **_shared_to(config, image_aspect_ratio),
            "projector_hidden_act": config.projector.hidden_act.value,
            **_token_ids_to(config),
            "tie_word_embeddings": config.text.tie_word_embeddings,
            "text_config": {"model_type": "llama", **_text_to(config.text), **_token_ids_to(config)},
            "vision_config": {"model_type": "clip_vision_model", **_vision_to(config.vision)},
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
            **_text_to(config.text),
            **_token_ids_to(config),
            **_shared_to(config, image_aspect_ratio),
        },
        "visual_encoder": {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            **_vision_to(config.vision),
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


def _vision_from(source: JsonDict, where: str) -> VisionConfig:
    _warn_unknown(where, source, frozenset(hf for hf, _ in _VISION_FIELDS.values()) | {"hidden_act", *_VISION_FLAGS})
    flags = {key: source.get(key, default) for key, default in _VISION_FLAGS.items()}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise CheckpointError(f"{where}: {key}={value!r}: want true or false")
    activation = _choice(Activation, source, "hidden_act", "quick_gelu", where)
    return _build(VisionConfig, where, hidden_act=activation, **_numbers(source, _VISION_FIELDS, where), **flags)


def _vision_to(config: VisionConfig) -> JsonDict:
    fields = {hf: getattr(config, ours) for ours, (hf, _) in _VISION_FIELDS.items()}
    flags = {key: getattr(config, key) for key, default in _VISION_FLAGS.items() if getattr(config, key) != default}
    return {**fields, "hidden_act": config.hidden_act.value, "attention_dropout": 0.0, **flags}


def _text_from(source: JsonDict, where: str, also_known: frozenset[str] = frozenset()) -> LlamaConfig:
    _warn_unknown(where, source, _TEXT_ONLY | {hf for hf, _ in _TEXT_FIELDS.values()} | also_known)
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
    max_seq_len = source.get("max_sequence_length") or int(more["max"] * stretch)
    return _build(
        LlamaConfig,
        where,
        num_kv_heads=more["num_kv_heads"],
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=max_seq_len,
        tie_word_embeddings=bool(source.get("tie_word_embeddings", False)),
        **fields,
    )


def _text_to(config: LlamaConfig) -> JsonDict:
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
    theta = float(source.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    kinds = {rope[name] for name in ("rope_type", "type") if rope.get(name) is not None}
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
    return _build(RopeScaling, where, rope_type=kinds.pop(), **_numbers(rope, fields, f"{where}: {key}")), theta


def _shared_from(root: JsonDict, *, default_select: str) -> dict[str, Any]:
    """The fields that concern the whole captioner and stand in the root config of either layout."""
    merge = root.get("merge") or {}
    names = {field.name for field in dataclasses.fields(MergeConfig)}
    if not isinstance(merge, dict) or not set(merge) <= names:
        raise CheckpointError(f"config.json: merge={merge!r}: want an object with some of {', '.join(sorted(names))}")
    wish = dict(merge)
    for key, kind in (("schedule", Schedule), ("size_bias", SizeBias)):
        if key in wish:
            wish[key] = _choice(kind, wish, key, "", "config.json: merge")
    return {
        "feature_layer": _integer(root, "vision_feature_layer", -2),
        "feature_select_strategy": root.get("vision_feature_select_strategy") or default_select,
        "image_token_index": _integer(root, "image_token_index", -200),
        "merge": _build(MergeConfig, "config.json", **wish),
    }


def _shared_to(config: AuroraConfig, image_aspect_ratio: str | None) -> JsonDict:
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


def _token_ids(source: JsonDict) -> dict[str, int]:
    """Special token ids; a null end-of-text id means that generation never stops by itself."""
    eos = source.get("eos_token_id", 2)
    if isinstance(eos, list):
        if len(eos) != 1:
            raise CheckpointError(f"config.json: eos_token_id={eos!r}: want one id")
        eos = eos[0]
    source = {**source, "eos_token_id": -1 if eos is None else eos}
    return {key: _integer(source, key, default) for key, default in _TOKEN_DEFAULTS.items()}


_TOKEN_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _token_ids_to(config: AuroraConfig) -> JsonDict:
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
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            noun = "number" if float in kinds else "integer"
            raise CheckpointError(f"{where}: {key}={value!r}: want a positive {noun}")
        numbers[ours] = float(value) if isinstance(default, float) else value
    return numbers


def _choice(kind: type[E], source: JsonDict, key: str, default: str, where: str) -> E:
    value = default if source.get(key) is None else source[key]
    names = [member.value for member in kind]
    if value not in names:
        raise CheckpointError(f"{where}: {key}={value!r}: want one of {', '.join(names)}")
    return kind(value)


def _build(kind: type[C], where: str, **fields: Any) -> C:
    """Build a config dataclass; what it refuses is reported with the file."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _warn_unknown(where: str, source: JsonDict, known: frozenset[str]) -> None:
    unknown = sorted(set(source) - known - _BOOKKEEPING)
    if unknown:
        warnings.warn(f"{where}: fields this version does not know are passed over: {', '.join(unknown)}", stacklevel=4)
