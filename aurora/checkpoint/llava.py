"""The two LLaVA layouts: Hugging Face's (`llava_hf`) and the official repository's (`llava`).

`llava_hf` is written with the legacy key names (`vision_tower.vision_model.`, `language_model.model.`), which the most
readers know, and read with those of every transformers version: files of 4.52 to 5 begin with `model.`, and since 5.6
the tower has no `vision_model.` level. Its placeholder is a token of the vocabulary, so an export adds rows: `<image>`,
`<pad>`, and what fills up to a multiple of 64. They are recorded in config.json, and dropped on the way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aurora.checkpoint.hf_config import (
    build,
    choice,
    read_shared,
    read_text,
    read_token_ids,
    read_vision,
    warn_unknown,
    words,
    write_shared,
    write_text,
    write_token_ids,
    write_vision,
)
from aurora.checkpoint.keys import (
    CLIP_KEYS,
    HF_PROJECTOR_KEYS,
    IGNORED_CLIP,
    IGNORED_LLAMA,
    LLAMA_KEYS,
    KeyMap,
    Layout,
    Part,
    under,
)
from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.model.captioner import AuroraConfig
from aurora.model.projector import ProjectorConfig
from aurora.model.vision import Activation, VisionConfig

VOCABULARY_MULTIPLE = 64
"""An export pads the vocabulary to a multiple of this."""
ADDED_TOKENS = ("<image>", "<pad>")
"""Tokens an export puts behind the vocabulary, in this order."""
_RECORD = "aurora_added_rows"
# CLIP ViT-L/14 at 336 px: what LlavaConfig takes where a file describes no tower, and LLaVA 1.5's.
VIT_L_336 = VisionConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, patch_size=14, image_size=336
)
# Names under which readers of the official layout look for the tower's config.
_TOWER_NAMES: tuple[tuple[str, VisionConfig], ...] = (
    ("openai/clip-vit-large-patch14-336", VIT_L_336),
    ("apple/DFN5B-CLIP-ViT-H-14-378", VisionConfig()),
)
_HF_ONLY = words(
    f"""
    ignore_index image_seq_length image_token_index image_token_id multimodal_projector_bias projector_hidden_act
    text_config vision_config tie_word_embeddings vision_feature_layer vision_feature_select_strategy merge
    image_aspect_ratio vocab_size {_RECORD}
    """
)
_OFFICIAL_ONLY = words(
    """
    freeze_mm_mlp_adapter freeze_mm_vision_resampler image_aspect_ratio image_grid_pinpoints image_token_index merge
    mm_hidden_size mm_patch_merge_type mm_projector_lr mm_projector_type mm_resampler_type mm_use_im_patch_token
    mm_use_im_start_end mm_vision_select_feature mm_vision_select_layer mm_vision_tower mm_vision_tower_lr
    tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter tune_mm_vision_resampler
    unfreeze_mm_vision_tower use_mm_proj vision_config vision_feature_layer vision_feature_select_strategy
    """
)


def _hf_mismatch(configs: Mapping[str, JsonDict]) -> str | None:
    config = configs.get("")
    if config is None:
        return "no config.json"
    if config.get("model_type") != "llava" or not isinstance(config.get("text_config"), dict):
        return f"config.json has model_type={config.get('model_type')!r}, want llava with a text_config"
    return None


def _official_mismatch(configs: Mapping[str, JsonDict]) -> str | None:
    config = configs.get("")
    if config is None:
        return "no config.json"
    if config.get("model_type") not in ("llava", "llava_llama") or "mm_vision_tower" not in config:
        return f"config.json has model_type={config.get('model_type')!r}, want llava with mm_vision_tower"
    return None


def _added_rows(configs: Mapping[str, JsonDict]) -> int:
    record = configs[""].get(_RECORD)
    if record is None:
        return 0
    count = record.get("rows") if isinstance(record, dict) else None
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise CheckpointError(f"config.json: {_RECORD}={record!r}: want an object with rows, a number")
    return count


def rows_to_add(config: AuroraConfig) -> int:
    """Rows that an export to `llava_hf` adds: none where the placeholder is a token of the vocabulary already."""
    if config.image_token_index >= 0:
        return 0
    size = config.text.vocab_size
    return -(-(size + len(ADDED_TOKENS)) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE - size


def _read_hf(configs: Mapping[str, JsonDict]) -> AuroraConfig:
    root = dict(configs[""])
    vision, text = root.get("vision_config") or {}, root["text_config"]
    if not isinstance(vision, dict):
        raise CheckpointError(f"config.json: vision_config={vision!r}: want an object")
    warn_unknown("config.json", root, _HF_ONLY)
    if root.get("multimodal_projector_bias") is False:
        raise CheckpointError("config.json: multimodal_projector_bias=False: want True")
    added = _added_rows(configs)
    if added:
        record = root[_RECORD]
        root |= {key: record[key] for key in ("image_token_index", "pad_token_id") if key in record}
    elif root.get("image_token_index") is None:
        root["image_token_index"] = root.get("image_token_id", 32000)
    own_ids = {key: value for key, value in root.items() if key.endswith("_token_id") and value is not None}
    tower = read_vision(vision, "config.json: vision_config") if vision else VIT_L_336
    language = read_text(text, "config.json: text_config")
    if language.vocab_size <= added:
        raise CheckpointError(f"config.json: {_RECORD}.rows={added}: want less than vocab_size={language.vocab_size}")
    return build(
        AuroraConfig,
        "config.json",
        vision=tower,
        text=dataclasses.replace(language, vocab_size=language.vocab_size - added),
        projector=ProjectorConfig(hidden_act=choice(Activation, root, "projector_hidden_act", "gelu", "config.json")),
        **read_shared(root, default_select="default"),
        **read_token_ids({**text, **own_ids}),
    )


def _write_hf(config: AuroraConfig, image_aspect_ratio: str | None) -> dict[str, JsonDict]:
    rows, size = rows_to_add(config), config.text.vocab_size
    shared = write_shared(config, image_aspect_ratio)
    text = {"model_type": "llama", **write_text(config.text), **write_token_ids(config)}
    record: JsonDict = {}
    ids = write_token_ids(config)
    if rows:
        text |= {"vocab_size": size + rows, "pad_token_id": size + 1}
        # "pad_token_id" of None would read as the default.
        kept = {"image_token_index": config.image_token_index, "pad_token_id": config.pad_token_id}
        record = {_RECORD: {"rows": rows, "tokens": list(ADDED_TOKENS), **kept}}
        shared["image_token_index"] = size
        ids["pad_token_id"] = size + 1
    # SigLIP has no class token to drop, but transformers' "default" drops the first token whatever it is.
    keeps_all = config.feature_select_strategy == "full" or not config.vision.class_token
    patches = config.vision.grid_size**2
    return {
        "": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            **shared,
            "vision_feature_select_strategy": "full" if keeps_all else "default",
            "image_seq_length": patches + (config.vision.num_prefix_tokens if keeps_all else 0),
            "ignore_index": -100,
            "multimodal_projector_bias": True,
            "projector_hidden_act": config.projector.hidden_act.value,
            "tie_word_embeddings": config.text.tie_word_embeddings,
            **ids,
            "text_config": text,
            "vision_config": write_vision(config.vision),
            **record,
        }
    }


def _tower_of(root: JsonDict) -> VisionConfig:
    if isinstance(root.get("vision_config"), dict):
        return read_vision(root["vision_config"], "config.json: vision_config")
    name = root.get("mm_vision_tower")
    for known, tower in _TOWER_NAMES:
        if name == known:
            return tower
    names = ", ".join(known for known, _ in _TOWER_NAMES)
    raise CheckpointError(
        f"config.json: mm_vision_tower={name!r}: its sizes are not in this file; give vision_path=, or one of {names}"
    )


def _read_official(configs: Mapping[str, JsonDict]) -> AuroraConfig:
    root = dict(configs[""])
    kind = root.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise CheckpointError(f"config.json: mm_projector_type={kind!r}: want mlp2x_gelu")
    select = {"patch": "default", "cls_patch": "full"}
    feature = root.get("mm_vision_select_feature") or "patch"
    if not isinstance(feature, str) or feature not in select:
        raise CheckpointError(f"config.json: mm_vision_select_feature={feature!r}: want one of {', '.join(select)}")
    root["vision_feature_layer"] = root.get("mm_vision_select_layer", -2)
    root["vision_feature_select_strategy"] = select[feature]
    return build(
        AuroraConfig,
        "config.json",
        vision=_tower_of(root),
        text=read_text(root, "config.json", also_known=_OFFICIAL_ONLY),
        projector=ProjectorConfig(),
        **read_shared(root, default_select="default"),
        **read_token_ids(root),
    )


def _write_official(config: AuroraConfig, image_aspect_ratio: str | None) -> dict[str, JsonDict]:
    if config.projector.hidden_act is not Activation.gelu:
        got = config.projector.hidden_act.value
        raise CheckpointError(f"layout llava: projector.hidden_act={got}: want gelu, all that mlp2x_gelu can be")
    shared = write_shared(config, image_aspect_ratio or "pad")
    side, patch = config.vision.image_size, config.vision.patch_size
    names = [known for known, tower in _TOWER_NAMES if tower == config.vision]
    return {
        "": {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            **write_text(config.text),
            **write_token_ids(config),
            **shared,
            "mm_hidden_size": config.vision.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "cls_patch" if config.feature_select_strategy == "full" else "patch",
            "mm_vision_select_layer": config.feature_layer,
            "mm_vision_tower": names[0] if names else f"clip-vit-patch{patch}-{side}",
            "use_mm_proj": True,
            # The official code takes the tower's sizes from the folder or repository that mm_vision_tower names.
            "vision_config": write_vision(config.vision),
        }
    }


LLAVA_HF = Layout(
    name="llava_hf",
    parts=(
        Part(
            folder="",
            keys=KeyMap(
                pairs=under(CLIP_KEYS, "vision_tower.vision_model.", "vision_tower.")
                + under(HF_PROJECTOR_KEYS, "multi_modal_projector.", "projector.")
                + under(LLAMA_KEYS, "language_model.", "language_model."),
                also=under(CLIP_KEYS, "vision_tower.", "vision_tower.")
                + under(CLIP_KEYS, "model.vision_tower.vision_model.", "vision_tower.")
                + under(CLIP_KEYS, "model.vision_tower.", "vision_tower.")
                + under(HF_PROJECTOR_KEYS, "model.multi_modal_projector.", "projector.")
                + (
                    ("model.language_model.embed_tokens.weight", "language_model.embed_tokens.weight"),
                    ("model.language_model.layers.{i}.{p}", "language_model.layers.{i}.{p}"),
                    ("model.language_model.norm.weight", "language_model.norm.weight"),
                    ("lm_head.weight", "language_model.lm_head.weight"),
                ),
                ignored=(
                    *(f"vision_tower.vision_model.{key}" for key in IGNORED_CLIP),
                    *(f"vision_tower.{key}" for key in IGNORED_CLIP),
                    *(f"language_model.{key}" for key in IGNORED_LLAMA),
                ),
            ),
        ),
    ),
    mismatch=_hf_mismatch,
    read_config=_read_hf,
    write_config=_write_hf,
    rows_added=_added_rows,
    rows_to_add=rows_to_add,
)
LLAVA = Layout(
    name="llava",
    parts=(
        Part(
            folder="",
            keys=KeyMap(
                pairs=(
                    *under(CLIP_KEYS, "model.vision_tower.vision_tower.vision_model.", "vision_tower."),
                    ("model.mm_projector.0.{p}", "projector.linear_1.{p}"),
                    ("model.mm_projector.2.{p}", "projector.linear_2.{p}"),
                    *under(LLAMA_KEYS, "", "language_model."),
                ),
                ignored=(
                    "model.image_newline",
                    *(f"model.vision_tower.vision_tower.vision_model.{key}" for key in IGNORED_CLIP),
                    *IGNORED_LLAMA,
                ),
            ),
        ),
    ),
    mismatch=_official_mismatch,
    read_config=_read_official,
    write_config=_write_official,
)
