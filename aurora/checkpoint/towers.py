"""Layouts of a vision tower or a language model alone, as Hugging Face, open_clip and timm store them.

* `clip`, `siglip`: CLIPVisionModel and SiglipVisionModel, also inside CLIPModel and SiglipModel.
* `open_clip`: the original CLIP naming, q, k and v in one matrix; SigLIP there is a timm trunk.
* `timm`: timm's VisionTransformer, q, k and v in one matrix.
* `llama`: LlamaForCausalLM.

What a checkpoint holds beside the tower (text encoder, pooling head, classifier) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from aurora.checkpoint.hf_config import (
    build,
    read_text,
    read_token_ids,
    read_vision,
    tower_section,
    vision_kind,
    write_text,
    write_token_ids,
    write_vision,
)
from aurora.checkpoint.keys import (
    CLIP_KEYS,
    IGNORED_CLIP,
    IGNORED_LLAMA,
    LLAMA_KEYS,
    FusedPairs,
    KeyMap,
    KeyPairs,
    Layout,
    Part,
    under,
)
from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.checkpoint.timm import (
    open_clip_config_json,
    timm_config_json,
    vision_from_open_clip,
    vision_from_timm,
)
from aurora.model.captioner import AuroraConfig
from aurora.model.vision import VisionConfig

TIMM_KEYS: KeyPairs = (
    ("cls_token", "cls_token"),
    ("pos_embed", "pos_embed"),
    ("patch_embed.proj.{p}", "patch_embed.{p}"),
    ("norm_pre.{p}", "norm_pre.{p}"),
    ("blocks.{i}.norm1.{p}", "blocks.{i}.norm1.{p}"),
    ("blocks.{i}.attn.proj.{p}", "blocks.{i}.attn.out_proj.{p}"),
    ("blocks.{i}.norm2.{p}", "blocks.{i}.norm2.{p}"),
    ("blocks.{i}.mlp.{p}", "blocks.{i}.mlp.{p}"),
    ("norm.{p}", "norm_post.{p}"),
)
TIMM_FUSED: FusedPairs = (("blocks.{i}.attn.qkv.{p}", tuple(f"blocks.{{i}}.attn.{n}_proj.{{p}}" for n in "qkv")),)
# Pooling and classifier behind the tower.
TIMM_IGNORED = ("head.{p}", "attn_pool.{p}", "fc_norm.{p}")
OPEN_CLIP_KEYS: KeyPairs = (
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("conv1.{p}", "patch_embed.{p}"),
    ("ln_pre.{p}", "norm_pre.{p}"),
    ("transformer.resblocks.{i}.ln_1.{p}", "blocks.{i}.norm1.{p}"),
    ("transformer.resblocks.{i}.attn.out_proj.{p}", "blocks.{i}.attn.out_proj.{p}"),
    ("transformer.resblocks.{i}.ln_2.{p}", "blocks.{i}.norm2.{p}"),
    ("transformer.resblocks.{i}.mlp.c_fc.{p}", "blocks.{i}.mlp.fc1.{p}"),
    ("transformer.resblocks.{i}.mlp.c_proj.{p}", "blocks.{i}.mlp.fc2.{p}"),
    ("ln_post.{p}", "norm_post.{p}"),
)
OPEN_CLIP_FUSED: FusedPairs = tuple(
    (
        f"transformer.resblocks.{{i}}.attn.in_proj_{kind}",
        tuple(f"blocks.{{i}}.attn.{n}_proj.{kind}" for n in "qkv"),
    )
    for kind in ("weight", "bias")
)
# The text encoder stands at the root in the original naming, and below "text." in newer files.
OPEN_CLIP_IGNORED = (
    "logit_scale",
    "logit_bias",
    "positional_embedding",
    "text_projection",
    "token_embedding.{p}",
    "transformer.{p}",
    "ln_final.{p}",
    "attn_mask",
    "text.{p}",
    "visual.proj",
    "visual.head.{p}",
    *(f"visual.trunk.{name}" for name in TIMM_IGNORED),
)
# Text encoder and projections of CLIPModel and SiglipModel.
CLIP_PAIR = ("text_model.{p}", "text_projection.{p}", "visual_projection.{p}", "logit_scale", "logit_bias")


def under_fused(fused: FusedPairs, foreign: str, ours: str) -> FusedPairs:
    """Put a table of fused keys below a prefix on both sides."""
    return tuple((foreign + theirs, tuple(ours + name for name in parts)) for theirs, parts in fused)


def _architecture(config: JsonDict) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _hf_tower_mismatch(name: str, configs: Mapping[str, JsonDict]) -> str | None:
    config = configs.get("")
    if config is None:
        return "no config.json"
    if len(configs.keys() & {"visual_encoder", "projector"}):
        return "it has the folders of a whole xtuner checkpoint"
    kind = str(config.get("model_type"))
    wanted = {"clip": ("clip", "clip_vision_model"), "siglip": ("siglip", "siglip_vision_model")}[name]
    if kind not in wanted:
        return f"config.json has model_type={config.get('model_type')!r}, want {' or '.join(wanted)}"
    return None


def _write_hf_tower(name: str, config: VisionConfig) -> dict[str, JsonDict]:
    kind = vision_kind(config)
    if kind != f"{name}_vision_model":
        raise CheckpointError(f"layout {name}: this tower is of kind {kind or 'neither clip nor siglip'}, want {name}")
    names = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
    head = {"vision_use_head": False} if name == "siglip" else {}
    return {"": {"architectures": [names[name]], **write_vision(config), **head}}


def _hf_tower(name: str) -> Layout:
    """CLIPVisionModel or SiglipVisionModel: written with the `vision_model.` level, read without it, too."""
    return Layout(
        name=name,
        parts=(
            Part(
                folder="",
                keys=KeyMap(
                    pairs=under(CLIP_KEYS, "vision_model.", "vision_tower."),
                    also=under(CLIP_KEYS, "", "vision_tower."),
                    ignored=(*CLIP_PAIR, *IGNORED_CLIP, *(f"vision_model.{key}" for key in IGNORED_CLIP)),
                ),
            ),
        ),
        mismatch=lambda configs: _hf_tower_mismatch(name, configs),
        read_config=lambda configs: AuroraConfig(vision=read_vision(*tower_section(configs[""], "config.json"))),
        write_config=lambda config, aspect: _write_hf_tower(name, config.vision),
        holds=("vision_tower.",),
    )


def _open_clip_mismatch(configs: Mapping[str, JsonDict]) -> str | None:
    config = configs.get("open_clip_config.json")
    if config is None:
        return "no open_clip_config.json"
    return None if isinstance(config.get("model_cfg"), dict) else "open_clip_config.json has no model_cfg"


def _timm_mismatch(configs: Mapping[str, JsonDict]) -> str | None:
    config = configs.get("")
    if config is None:
        return "no config.json"
    return None if isinstance(config.get("architecture"), str) else "config.json names no timm architecture"


def _llama_mismatch(configs: Mapping[str, JsonDict]) -> str | None:
    config = configs.get("")
    if config is None:
        return "no config.json"
    if configs.keys() & {"visual_encoder", "projector"}:
        return "it has folders of an xtuner checkpoint"
    if _architecture(config) not in ("LlamaForCausalLM", "") or config.get("model_type") != "llama":
        return f"config.json has model_type={config.get('model_type')!r}, architectures={config.get('architectures')!r}"
    return None


def _read_llama(configs: Mapping[str, JsonDict]) -> AuroraConfig:
    root = configs[""]
    return build(AuroraConfig, "config.json", text=read_text(root, "config.json"), **read_token_ids(root))


def _write_llama(config: AuroraConfig, image_aspect_ratio: str | None) -> dict[str, JsonDict]:
    root = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **write_text(config.text)}
    return {"": root | write_token_ids(config)}


CLIP = _hf_tower("clip")
SIGLIP = _hf_tower("siglip")
OPEN_CLIP = Layout(
    name="open_clip",
    parts=(
        Part(
            folder="",
            config_name="open_clip_config.json",
            weights_stem="open_clip_model",
            keys=KeyMap(
                pairs=under(OPEN_CLIP_KEYS, "visual.", "vision_tower."),
                also=under(TIMM_KEYS, "visual.trunk.", "vision_tower."),
                fused=under_fused(OPEN_CLIP_FUSED, "visual.", "vision_tower.")
                + under_fused(TIMM_FUSED, "visual.trunk.", "vision_tower."),
                ignored=OPEN_CLIP_IGNORED,
            ),
        ),
    ),
    mismatch=_open_clip_mismatch,
    read_config=lambda configs: AuroraConfig(vision=vision_from_open_clip(configs["open_clip_config.json"])),
    write_config=lambda config, aspect: {"open_clip_config.json": open_clip_config_json(config.vision, aspect)},
    holds=("vision_tower.",),
)
TIMM = Layout(
    name="timm",
    parts=(
        Part(
            folder="",
            keys=KeyMap(
                pairs=under(TIMM_KEYS, "", "vision_tower."),
                fused=under_fused(TIMM_FUSED, "", "vision_tower."),
                ignored=TIMM_IGNORED,
                unit_dims={"vision_tower.cls_token": 2, "vision_tower.pos_embed": 1},
            ),
        ),
    ),
    mismatch=_timm_mismatch,
    read_config=lambda configs: AuroraConfig(vision=vision_from_timm(configs[""])),
    write_config=lambda config, aspect: {"": timm_config_json(config.vision, aspect)},
    holds=("vision_tower.",),
)
LLAMA = Layout(
    name="llama",
    parts=(Part(folder="", keys=KeyMap(pairs=under(LLAMA_KEYS, "", "language_model."), ignored=IGNORED_LLAMA)),),
    mismatch=_llama_mismatch,
    read_config=_read_llama,
    write_config=_write_llama,
    holds=("language_model.",),
)
PARTS_ALONE = (CLIP, SIGLIP, OPEN_CLIP, TIMM, LLAMA)
