"""Key contract: every layout's exact names and shapes for AuroraCap-7B, spelt out from the published listings."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aurora.checkpoint.layouts import ALL_LAYOUTS, config_files
from aurora.checkpoint.lazy import LazyTensor
from aurora.checkpoint.writing import arrange
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig, RopeScaling
from aurora.model.vision import Activation, VisionConfig

Shapes = dict[str, tuple[int, ...]]

AURORACAP_7B = AuroraConfig(text=LlamaConfig(rope_scaling=RopeScaling(factor=4.0), max_seq_len=16384))
SO400M = VisionConfig(
    hidden_size=1152, intermediate_size=4304, num_layers=27, num_heads=16, patch_size=14, image_size=378, norm_eps=1e-6,
    hidden_act=Activation.gelu_tanh, class_token=False, pre_norm=False, patch_bias=True,
)  # fmt: skip


def llama(prefix: str, head: str, vocabulary: int = 32000) -> Shapes:
    """LlamaForCausalLM of 7B; `prefix` stands before the layers, `head` before lm_head."""
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocabulary, 4096), f"{prefix}norm.weight": (4096,)}
    for i in range(32):
        layer = f"{prefix}layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (4096, 4096) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (11008, 4096) for n in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (4096, 11008)
        shapes |= {f"{layer}{n}_layernorm.weight": (4096,) for n in ("input", "post_attention")}
    return shapes | {f"{head}lm_head.weight": (vocabulary, 4096)}


def clip(prefix: str) -> Shapes:
    """CLIPVisionModel of ViT-H/14 at 378 px: 519 tensors."""
    shapes: Shapes = {
        "embeddings.class_embedding": (1280,),
        "embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        "embeddings.position_embedding.weight": (730, 1280),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (1280,), f"{norm}.bias": (1280,)}
    for i in range(32):
        layer = f"encoder.layers.{i}."
        for n in ("q", "k", "v", "out"):
            shapes |= {f"{layer}self_attn.{n}_proj.weight": (1280, 1280), f"{layer}self_attn.{n}_proj.bias": (1280,)}
        for n in ("1", "2"):
            shapes |= {f"{layer}layer_norm{n}.weight": (1280,), f"{layer}layer_norm{n}.bias": (1280,)}
        shapes |= {f"{layer}mlp.fc1.weight": (5120, 1280), f"{layer}mlp.fc1.bias": (5120,)}
        shapes |= {f"{layer}mlp.fc2.weight": (1280, 5120), f"{layer}mlp.fc2.bias": (1280,)}
    return {prefix + key: shape for key, shape in shapes.items()}


def projector(first: str, second: str) -> Shapes:
    """Two linear layers, 1280 to 4096 to 4096."""
    shapes: Shapes = {f"{first}.weight": (4096, 1280), f"{first}.bias": (4096,)}
    return shapes | {f"{second}.weight": (4096, 4096), f"{second}.bias": (4096,)}


def fused(
    block: str, names: tuple[str, ...], rename: dict[str, str], qkv: str, width: int, mlp: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A block with q, k and v in one tensor, norms and MLP named by `rename`."""
    yield f"{block}{qkv}weight", (3 * width, width)
    yield f"{block}{qkv}bias", (3 * width,)
    for name in names:
        out, into = {"fc1": (mlp, width), "fc2": (width, mlp), "proj": (width, width)}.get(name, (width, 0))
        yield f"{block}{rename[name]}.weight", (out, into) if into else (out,)
        yield f"{block}{rename[name]}.bias", (out,)


def open_clip() -> Shapes:
    """The `visual.` half of open_clip's ViT-H-14-378-quickgelu, without its projection."""
    shapes: Shapes = {
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (730, 1280),
        "visual.conv1.weight": (1280, 3, 14, 14),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (1280,), f"visual.{norm}.bias": (1280,)}
    rename = {"norm1": "ln_1", "proj": "attn.out_proj", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    for i in range(32):
        shapes |= dict(fused(f"visual.transformer.resblocks.{i}.", tuple(rename), rename, "attn.in_proj_", 1280, 5120))
    return shapes


def timm(config: VisionConfig) -> Shapes:
    """timm's VisionTransformer without a classifier."""
    width = config.hidden_size
    shapes: Shapes = {"patch_embed.proj.weight": (width, 3, 14, 14), "norm.weight": (width,), "norm.bias": (width,)}
    if config.class_token:
        shapes |= {"cls_token": (1, 1, width), "pos_embed": (1, 730, width)}
        shapes |= {"norm_pre.weight": (width,), "norm_pre.bias": (width,)}
    else:
        shapes |= {"pos_embed": (1, 729, width), "patch_embed.proj.bias": (width,)}
    rename = {"norm1": "norm1", "proj": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for i in range(config.num_layers):
        shapes |= dict(fused(f"blocks.{i}.", tuple(rename), rename, "attn.qkv.", width, config.intermediate_size))
    return shapes


WANTED: dict[str, dict[str, Shapes]] = {
    "aurora": {
        "": clip("vision_tower.vision_model.")
        | projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
        | llama("language_model.model.", "language_model.")
    },
    "xtuner": {
        "": llama("model.", ""),
        "visual_encoder": clip("vision_model."),
        "projector": projector("model.0", "model.2"),
    },
    # The vocabulary grows to a multiple of 64: <image>, <pad>, and 62 unused rows.
    "llava_hf": {
        "": clip("vision_tower.vision_model.")
        | projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
        | llama("language_model.model.", "language_model.", 32064)
    },
    "llava": {
        "": clip("model.vision_tower.vision_tower.vision_model.")
        | projector("model.mm_projector.0", "model.mm_projector.2")
        | llama("model.", "")
    },
    "clip": {"": clip("vision_model.")},
    "open_clip": {"": open_clip()},
    "timm": {"": timm(AURORACAP_7B.vision)},
    "llama": {"": llama("model.", "")},
}  # fmt: skip


def lazy_model(config: AuroraConfig) -> dict[str, LazyTensor]:
    """The model's tensors, none of them real."""
    with torch.device("meta"):
        state = AuroraModel(config).state_dict()
    nowhere = Path("nowhere")
    return {
        name: LazyTensor(shape=tuple(t.shape), dtype=torch.float16, read=lambda t=t: t, file=nowhere, key=name)
        for name, t in state.items()
    }


def arranged(layout: str, config: AuroraConfig) -> dict[str, Shapes]:
    placed = arrange(ALL_LAYOUTS[layout], config, lazy_model(config))
    return {folder: {key: tensor.shape for key, tensor in part.items()} for folder, part in placed.items()}


@pytest.mark.parametrize("layout", list(WANTED))
def test_names_and_shapes_of_auroracap_7b(layout: str) -> None:
    assert arranged(layout, AURORACAP_7B) == WANTED[layout]


def test_siglip_so400m_under_its_own_names_and_timms() -> None:
    config = AuroraConfig(vision=SO400M, text=AURORACAP_7B.text)
    got = arranged("siglip", config)[""]
    assert len(got) == 3 + 2 + 27 * 16
    assert got["vision_model.embeddings.patch_embedding.bias"] == (1152,)
    assert got["vision_model.embeddings.position_embedding.weight"] == (729, 1152)
    assert got["vision_model.encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)
    assert not any("class_embedding" in key or "pre_layrnorm" in key for key in got)
    assert arranged("timm", config)[""] == timm(SO400M)


def test_every_layout_is_pinned() -> None:
    assert {*WANTED, "siglip"} == set(ALL_LAYOUTS)
    assert sum(map(len, WANTED["xtuner"].values())) == 519 + 4 + 291
    assert config_files().keys() == {"", "visual_encoder", "projector", "open_clip_config.json"}


def test_published_configs_read_as_auroracap_7b() -> None:
    """The three config.json files of wchai/AuroraCap-7B-VID-xtuner."""
    root = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "max_sequence_length": 16384, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {"factor": 4.0, "rope_type": "linear", "type": "linear"}, "tie_word_embeddings": False,
        "torch_dtype": "float16", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    encoder = {
        "architectures": ["PikaVidEncoder"], "hidden_act": "quick_gelu", "hidden_size": 1280, "image_size": 378,
        "intermediate_size": 5120, "layer_norm_eps": 1e-5, "model_type": "clip_vision_model", "num_attention_heads": 16,
        "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 512, "attention_dropout": 0.0,
    }  # fmt: skip
    part = {"visual_hidden_size": 1280, "llm_hidden_size": 4096, "depth": 2, "hidden_act": "gelu", "bias": True}
    configs = {"": root, "visual_encoder": encoder, "projector": {"model_type": "projector", **part}}
    assert ALL_LAYOUTS["xtuner"].read_config(configs) == AURORACAP_7B
    # The same model survives the JSON of every whole layout.
    for layout in ALL_LAYOUTS.values():
        if layout.is_whole:
            written = json.loads(json.dumps(layout.write_config(AURORACAP_7B, "pad")))
            assert layout.read_config(written) == AURORACAP_7B, layout.name


def test_dfn5b_in_every_dress_is_auroracaps_tower() -> None:
    open_clip_config = {
        "model_cfg": {
            "embed_dim": 1024,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 378, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
        },
        "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "squash"},
    }
    timm_config = {
        "architecture": "vit_huge_patch14_clip_378",
        "num_classes": 1024,
        "num_features": 1280,
        "pretrained_cfg": {
            "tag": "dfn5b",
            "input_size": [3, 378, 378],
            "notes": ["natively QuickGELU, use quickgelu model variant for original results"],
        },
    }
    assert ALL_LAYOUTS["open_clip"].read_config({"open_clip_config.json": open_clip_config}).vision == VisionConfig()
    assert ALL_LAYOUTS["timm"].read_config({"": timm_config}).vision == VisionConfig()
    quick = {"architecture": "vit_huge_patch14_clip_quickgelu_378"}
    assert ALL_LAYOUTS["timm"].read_config({"": quick}).vision == VisionConfig()
    so400m = {"architecture": "vit_so400m_patch14_siglip_378.v2_webli", "pretrained_cfg": {"input_size": [3, 378, 378]}}
    assert ALL_LAYOUTS["timm"].read_config({"": so400m}).vision == SO400M
    trunk = {"timm_model_name": "vit_so400m_patch14_siglip_378", "image_size": 378}
    siglip = {"open_clip_config.json": {"model_cfg": {"vision_cfg": trunk}}}
    assert ALL_LAYOUTS["open_clip"].read_config(siglip).vision == SO400M
    for layout in ("clip", "open_clip", "timm"):
        assert (
            ALL_LAYOUTS[layout].read_config(ALL_LAYOUTS[layout].write_config(AURORACAP_7B, None)).vision
            == VisionConfig()
        )
