"""LoRA exports of xtuner: adapters in peft's format, merged into the weights they were trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora.checkpoint.convert import convert
from aurora.checkpoint.pretrained import load_model, save_model
from aurora.checkpoint.store import CheckpointError
from tests.checkpoint.tiny_models import tiny_model

RANK, ALPHA = 3, 12
TARGETS = {
    "llm_adapter": {
        "model.layers.0.self_attn.q_proj": (16, 16),
        "model.layers.1.self_attn.k_proj": (8, 16),
        "model.layers.1.mlp.down_proj": (16, 24),
        "lm_head": (70, 16),
    },
    "visual_encoder_adapter": {
        "vision_model.encoder.layers.0.self_attn.out_proj": (8, 8),
        "vision_model.encoder.layers.1.mlp.fc1": (12, 8),
    },
}


def write_adapter(folder: Path, targets: dict[str, tuple[int, int]], seed: int, **changes: Any) -> dict[str, Tensor]:
    """Write random factors; returns them by name."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, into) in targets.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """xtuner's export of a run with two adapters: their bases lie elsewhere, the projector is whole."""
    save_model(tiny_model(), tmp_path / "whole", "xtuner")
    convert(tmp_path / "whole", tmp_path / "vicuna", layout="llama")
    convert(tmp_path / "whole", tmp_path / "run/clip", layout="clip")
    shutil.copytree(tmp_path / "whole/projector", tmp_path / "run/projector")
    write_adapter(
        tmp_path / "run/llm_adapter", TARGETS["llm_adapter"], 1, base_model_name_or_path=str(tmp_path / "vicuna")
    )
    # Beside the adapters, named relative to the checkpoint.
    write_adapter(
        tmp_path / "run/visual_encoder_adapter", TARGETS["visual_encoder_adapter"], 2, base_model_name_or_path="clip"
    )
    return tmp_path / "run"


def ours_of(name: str) -> str:
    """Our name of a weight, spelt out independently of the key maps."""
    if name.startswith("vision_model."):
        name = name.replace("vision_model.encoder.layers.", "vision_tower.blocks.").replace("self_attn", "attn")
    else:
        name = "language_model." + name.removeprefix("model.")
    return f"{name}.weight"


def test_adapters_are_merged_on_load_and_on_conversion(exported: Path, tmp_path: Path) -> None:
    before = tiny_model().state_dict()
    want = dict(before)
    for number, (folder, targets) in enumerate(TARGETS.items(), start=1):
        factors = load_file(exported / folder / "adapter_model.safetensors")
        for name in targets:
            a, b = (factors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            weight = before[ours_of(name)]
            want[ours_of(name)] = (weight.float() + ALPHA / RANK * (b @ a)).to(weight.dtype)
            assert not torch.equal(want[ours_of(name)], weight), number
    got = load_model(exported, dtype="float32").state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor.float()), name
    convert(exported, tmp_path / "merged", layout="aurora")
    save_model(tiny_model(), tmp_path / "want", "aurora")
    stored, keys = load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "want/model.safetensors")
    assert {key: t.dtype for key, t in stored.items()} == {key: t.dtype for key, t in keys.items()}


def test_a_merged_layer_computes_the_base_plus_the_scaled_adapter(exported: Path) -> None:
    factors = load_file(exported / "llm_adapter/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{which}.weight"] for which in "AB")
    base = tiny_model().float().language_model.layers[0].self_attn.q_proj
    merged = load_model(exported).language_model.layers[0].self_attn.q_proj
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    want = base(x) + ALPHA / RANK * torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
    # The base is stored in half precision, so the merged weight is rounded to it.
    assert (merged(x) - want).abs().max() < 0.02 * want.abs().max()


def test_bases_in_the_folder_itself_and_options_that_change_the_scale(exported: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_adapter(whole / "llm_adapter", TARGETS["llm_adapter"], 1, use_rslora=True, alpha_pattern={"lm_head": 6})
    got, before = load_model(whole).state_dict(), tiny_model().state_dict()
    factors = load_file(whole / "llm_adapter/adapter_model.safetensors")
    for name in TARGETS["llm_adapter"]:
        a, b = (factors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        scale = (6 if name == "lm_head" else ALPHA) / RANK**0.5
        weight = before[ours_of(name)]
        assert torch.equal(got[ours_of(name)], (weight.float() + scale * (b @ a)).to(weight.dtype).float()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True: want False; only plain LoRA is merged"),
        ({"peft_type": "IA3"}, "peft_type='IA3': want 'LORA'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save="),
        ({"r": 0}, "r=0: want a positive number"),
        ({"r": 4}, "has rank 3 and 3, want 4"),
        ({"rank_pattern": {"nowhere": 4}}, "rank_pattern.nowhere=4"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_model(tiny_model(), tmp_path, "xtuner")
    write_adapter(tmp_path / "llm_adapter", TARGETS["llm_adapter"], 1, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path, "xtuner")
    folder = tmp_path / "llm_adapter"
    tensors = write_adapter(folder, TARGETS["llm_adapter"], 1)
    key = "base_model.model.lm_head.lora_A.weight"
    a_of_v = torch.zeros(RANK, 16)
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({k: t for k, t in tensors.items() if k != key}, "lm_head has lora_B alone"),
        (tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "is no LoRA factor"),
        (tensors | {key: torch.zeros(RANK, 15)}, r"lm_head.weight: got \(70, 15\) from the factors, want \(70, 16\)"),
        (
            tensors
            | {"base_model.model.model.layers.9.self_attn.v_proj.lora_A.weight": a_of_v}
            | {"base_model.model.model.layers.9.self_attn.v_proj.lora_B.weight": torch.zeros(8, RANK)},
            "changes model.layers.9.self_attn.v_proj.weight, which the model does not have",
        ),
    ]
    for content, message in cases:
        save_file(content, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"llm_adapter: no weights, want adapter_model\.safetensors"):
        load_model(tmp_path)


def test_a_base_that_is_nowhere_is_named(exported: Path) -> None:
    path = exported / "llm_adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/no/such/vicuna"}))
    with pytest.raises(CheckpointError, match="/no/such/vicuna: no such folder"):
        load_model(exported)
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="base_model_name_or_path=None: want a folder or a hub id"):
        load_model(exported)
