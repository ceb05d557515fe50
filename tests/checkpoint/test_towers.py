"""Configs of towers alone: sizes of timm and open_clip, and what is no plain ViT."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from aurora.checkpoint.convert import convert
from aurora.checkpoint.layouts import ALL_LAYOUTS, recognise
from aurora.checkpoint.pretrained import load_language_model, load_vision_tower, save_model
from aurora.checkpoint.store import CheckpointError
from aurora.checkpoint.timm import open_clip_config_json, timm_config_json, vision_from_open_clip, vision_from_timm
from aurora.model.vision import Activation, VisionConfig
from tests.checkpoint import gguf_files
from tests.checkpoint.tiny_models import CLIP_TOWER, SIGLIP_TOWER, tiny_model


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("vit_base_patch32_224", (768, 12, 12, 3072, 32, 224, Activation.gelu, True, False, True, 1e-6)),
        ("vit_large_patch14_clip_336.openai", (1024, 24, 16, 4096, 14, 336, Activation.gelu, True, True, False, 1e-5)),
        (
            "vit_so400m_patch14_siglip_gap_448",
            (1152, 27, 16, 4304, 14, 448, Activation.gelu_tanh, False, False, True, 1e-6),
        ),
        (
            "vit_gigantic_patch14_clip_quickgelu_224",
            (1664, 48, 16, 8192, 14, 224, Activation.quick_gelu, True, True, False, 1e-5),
        ),
    ],
)
def test_architectures_by_name(name: str, want: tuple[object, ...]) -> None:
    c = vision_from_timm({"architecture": name})
    got = (c.hidden_size, c.num_layers, c.num_heads, c.intermediate_size, c.patch_size, c.image_size, c.hidden_act)
    assert (*got, c.class_token, c.pre_norm, c.patch_bias, c.norm_eps) == want


def test_any_plain_tower_survives_timms_json() -> None:
    for width, mlp in ((8, 12), (48, 100), (768, 3072), (1152, 4304), (1664, 8192), (40, 77)):
        for base in (CLIP_TOWER, SIGLIP_TOWER):
            config = VisionConfig(
                hidden_size=width, intermediate_size=mlp, num_layers=3, num_heads=2, patch_size=4, image_size=12,
                hidden_act=base.hidden_act, norm_eps=base.norm_eps, class_token=base.class_token,
                pre_norm=base.pre_norm, patch_bias=base.patch_bias,
            )  # fmt: skip
            assert vision_from_timm(json.loads(json.dumps(timm_config_json(config)))) == config
            if base is CLIP_TOWER:
                assert vision_from_open_clip(json.loads(json.dumps(open_clip_config_json(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet50"}, "architecture='resnet50': want a plain ViT"),
        ({"architecture": "vit_enormous_patch16_224"}, "want a plain ViT.*sizes: tiny, small"),
        ({"model_args": {"qk_norm": True}}, "model_args.qk_norm=True: this version does not know it"),
        ({"model_args": {"depth": "3"}}, "model_args.depth='3': want int"),
        ({"model_args": {"depth": 10**9}}, "num_layers=1000000000: want at most"),
        ({"model_args": {"depth": 0}}, "num_layers=0: want a positive number"),
        ({"model_args": {"mlp_ratio": 1e308}}, "model_args.mlp_ratio="),
        ({"model_args": {"act_layer": ["gelu"]}}, "model_args.act_layer="),
        ({"model_args": [1]}, r"model_args=\[1\]: want an object"),
        ({"model_args": {"img_size": [224, 196]}}, r"model_args.img_size=\[224, 196\]: want int"),
        ({"model_args": {"num_heads": 7}}, "vision.num_heads=7: want a divisor"),
        ({"pretrained_cfg": {"input_size": [3, 0, 0]}}, r"pretrained_cfg.input_size=\[3, 0, 0\]"),
    ],
)
def test_what_is_no_plain_vit_for_timm(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}|config.json: {message}"):
        vision_from_timm({"architecture": "vit_base_patch16_clip_224"} | changes)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"attentional_pool": True}, "vision_cfg.attentional_pool=True: want a plain ViT"),
        ({"layers": [3, 4, 6, 3]}, r"vision_cfg.layers=\[3, 4, 6, 3\]: want a positive integer"),
        ({"layers": 10**9}, "num_layers=1000000000: want at most"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4': want a number"),
        ({"head_width": 100}, "vision.num_heads=7: want a divisor"),
        ({"timm_model_name": "convnext_base"}, "architecture='convnext_base': want a plain ViT"),
    ],
)
def test_what_is_no_plain_vit_for_open_clip(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        vision_from_open_clip({"model_cfg": {"vision_cfg": vision}})


def test_towers_that_a_layout_cannot_store_are_refused() -> None:
    odd = VisionConfig(class_token=False)
    for layout in ("clip", "siglip", "open_clip"):
        with pytest.raises(CheckpointError, match=rf"layout {layout}: \w"):
            ALL_LAYOUTS[layout].write_config(_around(odd), None)
    with pytest.raises(CheckpointError, match=r"layout timm: vision\.norm_eps=0\.01"):
        ALL_LAYOUTS["timm"].write_config(_around(VisionConfig(norm_eps=0.01)), None)
    with pytest.raises(CheckpointError, match=r"layout timm: vision\.patch_bias=True with pre_norm=True"):
        ALL_LAYOUTS["timm"].write_config(_around(VisionConfig(patch_bias=True)), None)


def _around(vision: VisionConfig) -> Any:
    from tests.checkpoint.tiny_models import tiny_config

    return tiny_config(vision)


def test_each_layout_is_recognised_as_itself_alone() -> None:
    for name, layout in ALL_LAYOUTS.items():
        tower = SIGLIP_TOWER if name == "siglip" else CLIP_TOWER
        configs = json.loads(json.dumps(layout.write_config(_around(tower), None)))
        assert recognise(configs, where="x").name == name
        fitting = [other.name for other in ALL_LAYOUTS.values() if other.mismatch(configs) is None]
        assert fitting == [name]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that we write is unknown to us
            layout.read_config(configs)


def test_pairs_of_clip_and_siglip_are_recognised_by_their_model_type() -> None:
    for kind in ("clip", "siglip"):
        config = {"model_type": kind, "vision_config": {"hidden_size": 32, "num_attention_heads": 4}}
        layout = recognise({"": config}, where="x")
        assert layout.name == kind
        assert layout.read_config({"": config}).vision.class_token == (kind == "clip")


def test_a_gguf_file_converts_and_starts_a_captioner(tmp_path: Path) -> None:
    model = gguf_files.tiny_llama()
    tokens = ["<s>", "</s>", "<p>", *(chr(65 + number) for number in range(model.config.vocab_size - 4)), "AB"]
    words: dict[str, gguf_files.Value] = {
        "tokenizer.ggml.model": (gguf_files.STRING, "gpt2"),
        "tokenizer.ggml.tokens": (gguf_files.ARRAY, gguf_files.STRING, tokens),
        "tokenizer.ggml.token_type": (gguf_files.ARRAY, 5, [3, 3, 3, *[1] * (len(tokens) - 3)]),
        "tokenizer.ggml.merges": (gguf_files.ARRAY, gguf_files.STRING, ["A B"]),
        "tokenizer.ggml.bos_token_id": (gguf_files.U32, 0),
        "tokenizer.ggml.eos_token_id": (gguf_files.U32, 1),
    }
    file = gguf_files.write_gguf(tmp_path / "words.gguf", model, words)
    done = convert(file, tmp_path / "llama", layout="llama")
    assert (done.source, done.target) == ("gguf", "llama")
    got, want = load_language_model(tmp_path / "llama"), load_language_model(file, dtype="float16")
    assert got.config == want.config
    for name, tensor in want.state_dict().items():
        assert got.state_dict()[name].equal(tensor.float()), name
    save_model(tiny_model(), tmp_path / "whole", "xtuner")
    done = convert(file, tmp_path / "new", layout="aurora", vision_path=tmp_path / "whole")
    assert done.new_projector
    assert load_vision_tower(tmp_path / "new").config == CLIP_TOWER
