"""Small models of this code that hold the golden weights."""

from typing import Any

from torch import Tensor

from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergeConfig, MergePlan, plan_merge
from aurora.model.projector import ProjectorConfig
from aurora.model.vision import Activation, VisionConfig, VisionTower
from tests.golden import load_index, load_tensors

CLIP_RENAMES = (
    ("vision_model.embeddings.class_embedding", "cls_token"),
    ("vision_model.embeddings.patch_embedding.weight", "patch_embed.weight"),
    ("vision_model.embeddings.position_embedding.weight", "pos_embed"),
    ("vision_model.pre_layrnorm.", "norm_pre."),
    ("vision_model.post_layernorm.", "norm_post."),
    ("vision_model.encoder.layers.", "blocks."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)


def clip_state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face CLIPVisionModel keys -> VisionTower keys (the tests' own map, independent of aurora.checkpoint)."""
    out = {}
    for key, tensor in tensors.items():
        for old, new in CLIP_RENAMES:
            key = key.replace(old, new)
        out[key] = tensor
    return out


def _vision_config(raw: dict[str, Any]) -> VisionConfig:
    return VisionConfig(
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        patch_size=raw["patch_size"],
        image_size=raw["image_size"],
        num_channels=raw["num_channels"],
        hidden_act=Activation[raw["hidden_act"]],
        norm_eps=raw["layer_norm_eps"],
    )


def vision_tower(name: str) -> VisionTower:
    """Tower with the weights of `vit_<name>`, fp32, eval mode."""
    tower = VisionTower(_vision_config(load_index("vit_index")["configs"][name]))
    tower.load_state_dict(clip_state_dict(load_tensors(f"vit_{name}_weights")))
    return tower.eval()


def tower_plan(tower: VisionTower, pixels: Tensor, config: MergeConfig, *, feature_layer: int = -2) -> MergePlan:
    """The plan for frames of the size of `pixels` (B, 3, H, W)."""
    return plan_merge(
        config,
        height_px=pixels.shape[-2],
        width_px=pixels.shape[-1],
        vision=tower.config,
        num_active_layers=tower.config.num_layers + 1 + feature_layer,
    )


def captioner(name: str) -> AuroraModel:
    """Whole model with the weights of `full_<name>` (name is kv2 or kv4), fp32, eval mode."""
    index = load_index("full_index")[name]
    text, projector = index["llm_config"], index["projector_config"]
    config = AuroraConfig(
        vision=_vision_config(index["vision_config"]),
        text=LlamaConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            norm_eps=text["rms_norm_eps"],
            rope_theta=text["rope_theta"],
            max_seq_len=text["max_position_embeddings"],
            tie_word_embeddings=text["tie_word_embeddings"],
        ),
        projector=ProjectorConfig(hidden_act=Activation[projector["hidden_act"]]),
    )
    state = {f"vision_tower.{k}": v for k, v in clip_state_dict(load_tensors(f"full_{name}_visual_encoder")).items()}
    for ours, theirs in (("linear_1", "model.0"), ("linear_2", "model.2")):
        for part in ("weight", "bias"):
            state[f"projector.{ours}.{part}"] = load_tensors(f"full_{name}_projector")[f"{theirs}.{part}"]
    for key, tensor in load_tensors(f"full_{name}_llm").items():
        state[f"language_model.{key.removeprefix('model.')}"] = tensor
    model = AuroraModel(config)
    model.load_state_dict(state)
    return model.eval()
