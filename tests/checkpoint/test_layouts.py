"""Key maps and config maps of the layouts: complete, one to one, the same both ways."""

import dataclasses
import warnings

import pytest
import torch

from aurora.checkpoint.hf_config import (
    aurora_config_json,
    config_from_aurora,
    config_from_xtuner,
    xtuner_config_json,
)
from aurora.checkpoint.layouts import ALL_LAYOUTS, LAYOUTS, get_layout, recognise
from aurora.checkpoint.store import CheckpointError
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig, RopeScaling
from aurora.model.merge import MergeConfig, Schedule, SizeBias
from aurora.model.projector import ProjectorConfig
from aurora.model.vision import Activation, VisionConfig
from tests.checkpoint.xtuner_files import encoder_config, projector_config, root_config
from tests.golden import load_tensors

SMALL = AuroraConfig(
    vision=VisionConfig(
        hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2, patch_size=8, image_size=32,
        hidden_act=Activation.gelu, norm_eps=1e-6,
    ),
    text=LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, norm_eps=1e-6,
        rope_theta=5e5, rope_scaling=RopeScaling(rope_type="linear", factor=4.0), max_seq_len=512,
    ),
    projector=ProjectorConfig(hidden_act=Activation.quick_gelu),
    merge=MergeConfig(
        token_kept_ratio=0.3, schedule=Schedule.linear, inflection=-0.5, size_bias=SizeBias.keys, slowfast=True
    ),
    feature_layer=-1, feature_select_strategy="full", image_token_index=60,
    bos_token_id=5, eos_token_id=6, pad_token_id=7,
)  # fmt: skip


NO_CLASS_TOKEN = dataclasses.replace(SMALL.vision, class_token=False, pre_norm=False, patch_bias=True)


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, vision=NO_CLASS_TOKEN)], ids=["clip", "other"])
def test_every_tensor_of_the_model_has_one_place_and_comes_back(name: str, config: AuroraConfig) -> None:
    layout = LAYOUTS[name]
    with torch.device("meta"):
        keys = list(AuroraModel(config).state_dict())
    places = [layout.place(key) for key in keys]
    assert len({(part.folder, foreign) for part, foreign in places}) == len(keys)
    assert [part.keys.to_ours(foreign) for part, foreign in places] == keys


def test_foreign_names_are_those_of_the_published_weights() -> None:
    xtuner = LAYOUTS["xtuner"]
    for part, golden in zip(xtuner.parts, ("llm", "visual_encoder", "projector"), strict=True):
        names = list(load_tensors(f"full_kv4_{golden}"))
        ours = [part.keys.to_ours(name) for name in names]
        assert None not in ours
        assert [part.keys.to_foreign(str(key)) for key in ours] == names
    aurora = LAYOUTS["aurora"]
    place = {
        "vision_tower.norm_pre.weight": "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.blocks.11.attn.q_proj.bias": "vision_tower.vision_model.encoder.layers.11.self_attn.q_proj.bias",
        "projector.linear_2.weight": "multi_modal_projector.linear_2.weight",
        "language_model.layers.0.mlp.up_proj.weight": "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "language_model.lm_head.weight",
    }
    assert {ours: aurora.place(ours)[1] for ours in place} == place


def test_a_foreign_key_no_table_knows_maps_to_nothing() -> None:
    keys = LAYOUTS["xtuner"].parts[1].keys
    assert keys.to_ours("vision_model.encoder.layers.x.mlp.fc1.weight") is None
    assert keys.to_ours("visual_encoder.vision_model.pre_layrnorm.weight") is None
    assert keys.is_ignored("vision_model.embeddings.position_ids")
    with pytest.raises(CheckpointError, match=r"no place for tensor value_head\.weight"):
        LAYOUTS["aurora"].place("value_head.weight")


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        AuroraConfig(),
        dataclasses.replace(SMALL, eos_token_id=-1),
        dataclasses.replace(
            SMALL,
            text=LlamaConfig(
                rope_scaling=RopeScaling(rope_type="llama3", factor=8.0, original_max_seq_len=4096),
                max_seq_len=131072,
                tie_word_embeddings=True,
            ),
            merge=MergeConfig(visual_token_budget=2048, schedule=Schedule.exact),
        ),
        dataclasses.replace(SMALL, merge=MergeConfig(schedule=Schedule.list, r=[3, 0, 1])),
        dataclasses.replace(SMALL, vision=VisionConfig(class_token=False, pre_norm=False, patch_bias=True)),
    ],
    ids=["small", "7b", "never_stops", "llama3_tied", "list", "no_class_token"],
)
def test_config_comes_back_from_json(name: str, config: AuroraConfig) -> None:
    layout = LAYOUTS[name]
    if name == "llava":  # its projector is mlp2x_gelu and nothing else
        config = dataclasses.replace(config, projector=ProjectorConfig())
    if name == "llava_hf" and not config.vision.class_token:  # transformers' "default" would drop a patch
        config = dataclasses.replace(config, feature_select_strategy="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that we write is unknown to us
        assert layout.read_config(layout.write_config(config, "pad")) == config


def test_select_strategy_is_written_always_and_its_absence_means_what_each_layout_means() -> None:
    for name, absent in (("aurora", "full"), ("xtuner", "default")):
        written = LAYOUTS[name].write_config(AuroraConfig(), None)
        assert written[""]["vision_feature_select_strategy"] == "default"
        del written[""]["vision_feature_select_strategy"]
        assert LAYOUTS[name].read_config(written).feature_select_strategy == absent


def test_merge_defaults_and_aspect_ratio_stand_in_the_config_by_name() -> None:
    written = aurora_config_json(SMALL, "pad")[""]
    assert written["image_aspect_ratio"] == "pad"
    assert written["merge"]["token_kept_ratio"] == 0.3
    assert written["merge"]["schedule"] == "linear"
    assert "image_aspect_ratio" not in aurora_config_json(SMALL)[""]


VICUNA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"factor": 4.0, "type": "linear"}},
        {"rope_scaling": {"factor": 4.0, "rope_type": "linear", "type": "linear"}, "max_sequence_length": 16384},
        {"rope_parameters": {"factor": 4.0, "rope_theta": 10000.0, "rope_type": "linear", "type": "linear"}},
    ],
    ids=["vicuna", "published", "transformers5"],
)
def test_every_spelling_of_linear_scaling_is_read(rope: dict[str, object]) -> None:
    parts = {"": VICUNA | rope, "visual_encoder": encoder_config("kv4"), "projector": {"hidden_act": "gelu"}}
    text = config_from_xtuner(parts).text
    assert text == LlamaConfig(rope_scaling=RopeScaling(rope_type="linear", factor=4.0), max_seq_len=16384)


def test_absent_fields_mean_the_defaults_of_their_classes() -> None:
    config = config_from_aurora({"": {"model_type": "aurora"}})
    assert config.vision == VisionConfig()
    assert (config.feature_layer, config.image_token_index) == (-2, -200)
    assert (config.text.norm_eps, config.text.max_seq_len) == (1e-6, 2048)
    config = config_from_aurora({"": {"vision_config": {"model_type": "clip_vision_model"}}})
    assert (config.vision.hidden_size, config.vision.patch_size, config.vision.image_size) == (768, 32, 224)


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("", {"hidden_act": "gelu"}, "config.json: hidden_act='gelu': want 'silu'"),
        ("", {"attention_bias": True}, "attention_bias=True: want False"),
        ("", {"head_dim": 99}, "head_dim=99: want 16"),
        ("", {"num_hidden_layers": "2"}, "num_hidden_layers='2': want a positive integer"),
        ("", {"num_hidden_layers": 0}, "num_hidden_layers=0: want a positive integer"),
        ("", {"num_key_value_heads": 3}, "text.num_kv_heads=3: want a divisor"),
        (
            "",
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_type='yarn': want one of default, linear, llama3",
        ),
        ("", {"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling: factor=-1: want a positive number"),
        ("", {"rope_scaling": "linear"}, "rope_scaling='linear': want an object"),
        ("", {"vision_feature_select_strategy": "patch"}, "feature_select_strategy='patch': want default or full"),
        ("", {"eos_token_id": [2, 3]}, r"eos_token_id=\[2, 3\]: want one id"),
        ("", {"merge": {"ratio": 1}}, "merge={'ratio': 1}: want an object with some of"),
        ("", {"merge": {"token_kept_ratio": 2.0}}, r"merge.token_kept_ratio=2.0: want a number in \(0, 1\]"),
        ("visual_encoder", {"hidden_act": "relu"}, "hidden_act='relu': want one of quick_gelu, gelu"),
        ("visual_encoder", {"image_size": None, "patch_size": 1.5}, "patch_size=1.5: want a positive integer"),
        ("projector", {"depth": 3}, "projector/config.json: depth=3: want 2"),
        ("projector", {"llm_hidden_size": 65}, "llm_hidden_size=65: want 64"),
    ],
)
def test_values_that_would_compute_something_else_are_refused(
    folder: str, changes: dict[str, object], message: str
) -> None:
    parts = {"": root_config("kv4"), "visual_encoder": encoder_config("kv4"), "projector": projector_config("kv4")}
    parts[folder] |= changes
    with pytest.raises(CheckpointError, match=message):
        config_from_xtuner(parts)


def test_unknown_fields_are_named_in_one_warning() -> None:
    parts = {"": root_config("kv4"), "visual_encoder": encoder_config("kv4"), "projector": projector_config("kv4")}
    parts[""] |= {"sliding_window": 4096, "quantum": True}
    with pytest.warns(UserWarning, match="config.json: fields.*quantum, sliding_window") as record:
        config_from_xtuner(parts)
    assert len(record) == 1


def test_layout_is_recognised_from_the_files_never_from_model_type_alone() -> None:
    assert recognise(aurora_config_json(SMALL), where="x").name == "aurora"
    assert recognise(xtuner_config_json(SMALL), where="x").name == "xtuner"
    time_series = {"": {"model_type": "aurora", "architectures": ["AuroraForPrediction"], "hidden_size": 256}}
    with pytest.raises(CheckpointError, match="AuroraForPrediction"):
        recognise(time_series, where="x")
    with pytest.raises(CheckpointError, match="no architectures"):
        recognise({"": {"model_type": "aurora"}}, where="x")


def test_unknown_folder_names_what_was_looked_for() -> None:
    with pytest.raises(CheckpointError) as caught:
        recognise({"": root_config("kv4") | {"architectures": ["GPT2"], "model_type": "gpt2"}}, where="somewhere")
    message = str(caught.value)
    assert message.startswith("somewhere: no known checkpoint layout; looked for aurora (")
    assert "xtuner (no visual_encoder/config.json, no projector/config.json)" in message


def test_unknown_layout_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"layout='timm': want one of aurora, xtuner, llava_hf, llava$"):
        get_layout("timm")
    assert get_layout("timm", among=ALL_LAYOUTS).holds == ("vision_tower.",)
