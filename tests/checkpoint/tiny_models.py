"""Tiny captioners with random weights, each tensor in its own dtype, so that a conversion cannot confuse two."""

import torch
from torch import Tensor

from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig, RopeScaling
from aurora.model.vision import Activation, VisionConfig

TEXT = LlamaConfig(
    vocab_size=70, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, norm_eps=1e-6,
    rope_scaling=RopeScaling(rope_type="linear", factor=4.0), max_seq_len=512,
)  # fmt: skip
CLIP_TOWER = VisionConfig(
    hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, patch_size=4, image_size=12,
    hidden_act=Activation.quick_gelu,
)  # fmt: skip
SIGLIP_TOWER = VisionConfig(
    hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, patch_size=4, image_size=12, norm_eps=1e-6,
    hidden_act=Activation.gelu_tanh, class_token=False, pre_norm=False, patch_bias=True,
)  # fmt: skip


def tiny_config(tower: VisionConfig = CLIP_TOWER, text: LlamaConfig = TEXT) -> AuroraConfig:
    """Config of a captioner of a few thousand parameters."""
    return AuroraConfig(vision=tower, text=text, feature_select_strategy="default" if tower.class_token else "full")


def tiny_model(config: AuroraConfig | None = None, seed: int = 0) -> AuroraModel:
    """Random model; neighbouring tensors differ in dtype (float32, float16, bfloat16) unless one layer fuses them."""
    model = AuroraModel(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        dtype = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
        if name.startswith("vision_tower.blocks.") and "_proj" in name:
            dtype = torch.float16  # q, k and v are one tensor in some layouts
        state[name] = torch.randn(tensor.shape, generator=generator).to(dtype)
    model.load_state_dict(state, assign=True)
    return model
