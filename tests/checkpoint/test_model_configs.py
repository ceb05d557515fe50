"""configs/model: each file composes, builds, and is the model that its checkpoints are."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from aurora.checkpoint.layouts import ALL_LAYOUTS
from aurora.config import load_config
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.training.tiny import TrainConfig
from tests.checkpoint.test_contract import AURORACAP_7B

FOLDER = Path(__file__).parents[2] / "configs/model"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))


def composed(*overrides: str) -> TrainConfig:
    with initialize_config_module("aurora.configs", version_base="1.3"):
        return load_config(compose("train", overrides=list(overrides)), TrainConfig)


def test_the_three_models_are_there() -> None:
    assert NAMES == ["aurora_tiny", "auroracap_7b", "smollm2_135m"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_composes_and_builds(name: str) -> None:
    config = composed(f"+model={name}").model
    assert isinstance(config, AuroraConfig)
    with torch.device("meta"):
        model = AuroraModel(config)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx({"aurora_tiny": 3.7, "auroracap_7b": 7391, "smollm2_135m": 221}[name], rel=0.02)
    # No field is misspelt into a default: every value in the file is in the config.
    written: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))  # type: ignore[assignment]
    whole = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    for key, value in written.items():
        for inner, wanted in value.items() if isinstance(value, dict) else [(None, value)]:
            got = whole[key] if inner is None else whole[key][inner]  # type: ignore[index,call-overload]
            assert wanted.items() <= got.items() if isinstance(wanted, dict) else got == wanted, f"{key}.{inner}"


def test_auroracap_7b_is_the_published_model() -> None:
    assert dataclasses.asdict(composed("+model=auroracap_7b").model) == dataclasses.asdict(AURORACAP_7B)


def test_aurora_tiny_is_what_its_experiment_trains() -> None:
    experiment = composed("experiment=aurora_tiny").model
    assert dataclasses.asdict(composed("+model=aurora_tiny").model) == dataclasses.asdict(experiment)


def test_smollm2_is_what_its_parts_say() -> None:
    """config.json of SmolLM2-135M-Instruct and of OpenAI's CLIP ViT-B/16 as published."""
    words = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "vocab_size": 49152, "attention_bias": False,
    }  # fmt: skip
    tower = {"model_type": "clip", "vision_config": {"patch_size": 16}}
    got = composed("+model=smollm2_135m").model
    text, vision = ALL_LAYOUTS["llama"].read_config({"": words}), ALL_LAYOUTS["clip"].read_config({"": tower})
    assert (got.text, got.vision) == (text.text, vision.vision)
    assert (got.bos_token_id, got.eos_token_id, got.pad_token_id) == (1, 2, 2)
