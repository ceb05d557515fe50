"""LLaVA checkpoints of others: the official layout that only names its tower, and fields both may have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora.checkpoint.convert import convert
from aurora.checkpoint.layouts import ALL_LAYOUTS
from aurora.checkpoint.llava import VIT_L_336
from aurora.checkpoint.pretrained import load_model, save_model
from aurora.checkpoint.store import CheckpointError
from tests.checkpoint.tiny_models import tiny_model
from tests.checkpoint.xtuner_files import edit_json

LLAVA_15 = {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "image_aspect_ratio": "pad", "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def test_published_configs_are_read() -> None:
    official = ALL_LAYOUTS["llava"].read_config({"": dict(LLAVA_15)})
    assert official.vision == VIT_L_336
    assert (official.feature_layer, official.feature_select_strategy, official.image_token_index) == (
        -2,
        "default",
        -200,
    )
    # llava-1.5-7b-hf leaves nearly everything to the defaults of its classes.
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    root = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000}
    theirs = ALL_LAYOUTS["llava_hf"].read_config({"": root | {"text_config": text, "pad_token_id": 32001}})
    assert (theirs.vision, theirs.text.vocab_size, theirs.text.hidden_size) == (VIT_L_336, 32064, 4096)
    assert (theirs.image_token_index, theirs.pad_token_id) == (32000, 32001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear': want mlp2x_gelu"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature='cls': want one of patch, cls_patch"),
        (
            {"mm_vision_tower": "openai/other"},
            "mm_vision_tower='openai/other': its sizes are not in this file; give vision",
        ),
    ],
)
def test_what_the_official_layout_may_say_and_we_cannot_compute(changes: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ALL_LAYOUTS["llava"].read_config({"": LLAVA_15 | changes})


def test_a_broken_record_of_added_rows_is_refused(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path, "llava_hf")
    for record in (3, {"rows": -1}, {"rows": True}, {"rows": 128}, {"rows": 10**6}):
        edit_json(tmp_path / "config.json", aurora_added_rows=record)
        with pytest.raises(CheckpointError):
            load_model(tmp_path)


def test_an_official_checkpoint_without_its_tower_takes_it_from_vision_path(tmp_path: Path) -> None:
    """LLaVA 1.5 is published so."""
    model = tiny_model()
    save_model(model, tmp_path / "whole", "llava")
    convert(tmp_path / "whole", tmp_path / "clip", layout="clip")
    file = tmp_path / "whole/model.safetensors"
    kept = {key: t.clone() for key, t in load_file(file).items() if "vision_tower" not in key}
    save_file(kept, file)
    edit_json(tmp_path / "whole/config.json", vision_config=..., mm_vision_tower="somewhere/tower")
    with pytest.raises(CheckpointError, match="mm_vision_tower='somewhere/tower': its sizes are not in this file"):
        load_model(tmp_path / "whole")
    done = convert(tmp_path / "whole", tmp_path / "out", layout="aurora", vision_path=tmp_path / "clip")
    assert not done.new_projector
    got, want = load_model(tmp_path / "out").state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor.float()) for name, tensor in want.items())


def test_another_tower_replaces_the_one_there_and_needs_a_fitting_projector(tmp_path: Path) -> None:
    save_model(tiny_model(seed=0), tmp_path / "a", "xtuner")
    save_model(tiny_model(seed=1), tmp_path / "b", "aurora")
    done = convert(tmp_path / "a", tmp_path / "out", layout="aurora", vision_path=tmp_path / "b")
    assert len(done.left_out) == sum(name.startswith("vision_tower.") for name in tiny_model().state_dict())
    got, a, b = (load_model(tmp_path / name).state_dict() for name in ("out", "a", "b"))
    for name, tensor in got.items():
        assert torch.equal(tensor, (b if name.startswith("vision_tower.") else a)[name]), name


def test_config_files_are_json_that_other_readers_know(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "hf", "llava_hf", image_aspect_ratio="pad")
    save_model(tiny_model(), tmp_path / "official", "llava")
    hf = json.loads((tmp_path / "hf/config.json").read_text())
    official = json.loads((tmp_path / "official/config.json").read_text())
    assert hf["architectures"] == ["LlavaForConditionalGeneration"]
    assert hf["vision_config"]["model_type"] == "clip_vision_model"
    assert hf["image_aspect_ratio"] == "pad"
    assert official["architectures"] == ["LlavaLlamaForCausalLM"]
    # SGLang takes anything else for "anyres", and looks for "clip" in the tower's name.
    assert official["image_aspect_ratio"] == "pad"
    assert "clip" in official["mm_vision_tower"]
