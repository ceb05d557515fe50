"""Adapters: what they compute, what they freeze, and that they come back from disk."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aurora.checkpoint.pretrained import load_model, save_model
from aurora.checkpoint.store import CheckpointError
from aurora.model.captioner import AuroraModel
from aurora.model.merge import MergeConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.training.build import prepare_model
from aurora.training.config import Objective, StageConfig
from aurora.training.lora import (
    LoraConfig,
    LoraLinear,
    apply_lora,
    load_adapters,
    lora_linears,
    merge_lora,
    save_adapters,
)
from tests.checkpoint.tiny_models import tiny_model

BOTH = ["language_model.layers.*_proj", "vision_tower.blocks.*.attn.*_proj", "vision_tower.blocks.*.fc1"]


def model(seed: int = 0) -> AuroraModel:
    return tiny_model(seed=seed).float()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([[1, -200, 7, 9, 12, 2], [1, -200, 8, 3, 11, 2]])
    labels = torch.where(ids < 5, -100, ids)
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(2, 1, 3, 12, 12, generator=generator)}


def shake(lora: nn.Module, seed: int = 3) -> None:
    """Give every B a value, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, linear in lora_linears(lora):
            linear.lora_B.weight.normal_(std=0.3, generator=generator)


def logits(of: AuroraModel) -> Tensor:
    found: Tensor = of(**batch(), merge=MergeConfig(token_kept_ratio=0.6)).logits
    return found


def test_nothing_changes_before_the_first_step_and_only_adapters_learn() -> None:
    base, adapted = model(), model()
    names = apply_lora(adapted, LoraConfig(rank=2, targets=BOTH))
    assert torch.equal(logits(adapted), logits(base))
    learn = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert learn == {*names, *(f"projector.{name}" for name, _ in adapted.projector.named_parameters())}
    assert len(names) == 2 * (2 * 7 + 2 * 5)
    assert adapted.state_dict().keys() - set(names) == base.state_dict().keys(), "the base keeps its names"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_factor_learns_and_the_base_does_not(checkpointing: bool) -> None:
    adapted = model()
    names = apply_lora(adapted, LoraConfig(rank=2, targets=BOTH))
    shake(adapted)  # with B = 0 the gradient of A is zero
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if name not in names}
    adapted.language_model.activation_checkpointing = adapted.vision_tower.activation_checkpointing = checkpointing
    loss = adapted.train()(**batch(), merge=MergeConfig(token_kept_ratio=0.6)).loss
    loss.backward()
    found = dict(adapted.named_parameters())
    # The features leave before the last block.
    active = [name for name in names if not name.startswith("vision_tower.blocks.1.")]
    assert all(found[name].grad is not None and found[name].grad.abs().max() > 0 for name in active)
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, adapted.state_dict()[name])}
    assert changed
    assert all(name.startswith("projector.") for name in changed)


def test_the_change_is_the_formula() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5).double()
    adapted = LoraLinear(base, rank=3, scale=2.5)
    with torch.no_grad():
        adapted.lora_B.weight.normal_()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    change = torch.einsum("...i,ri,or->...o", x, adapted.lora_A.weight, adapted.lora_B.weight)
    torch.testing.assert_close(adapted(x), base(x) + 2.5 * change)


def test_merged_computes_the_same_and_leaves_nothing_behind() -> None:
    adapted = model()
    keys = adapted.state_dict().keys()
    apply_lora(adapted, LoraConfig(rank=2, alpha=4, targets=BOTH))
    shake(adapted)
    want = logits(adapted)
    assert (want - logits(model())).abs().max() > 0.01 * want.abs().max(), "the adapters change something"
    merged = merge_lora(adapted)
    assert len(merged) == 24
    assert (logits(adapted) - want).abs().max() <= 1e-5 * want.abs().max()
    assert adapted.state_dict().keys() == keys
    assert not any(isinstance(module, LoraLinear) for module in adapted.modules())
    assert merge_lora(adapted) == []


def test_generation_sees_the_adapters() -> None:
    """Decoding fuses the projections of one input into one product, which must not leave adapters out."""
    adapted = model().eval()
    apply_lora(adapted, LoraConfig(rank=2, alpha=20, targets=["language_model.layers.*_proj"]))
    shake(adapted)
    ids = batch()["input_ids"][:1, :3]
    options = {"pixel_values": batch()["pixel_values"][:1], "max_new_tokens": 8, "eos_token_id": -1}
    written = AuroraForConditionalGeneration(adapted).generate(ids, **options)
    plain = AuroraForConditionalGeneration(model().eval()).generate(ids, **options)
    merge_lora(adapted)
    assert torch.equal(written, AuroraForConditionalGeneration(adapted).generate(ids, **options))
    assert not torch.equal(written, plain)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    adapted = LoraLinear(nn.Linear(64, 8), rank=4, scale=1.0, dropout=0.5)
    with torch.no_grad():
        adapted.lora_B.weight.normal_()
    x = torch.randn(3, 64)
    assert not torch.equal(adapted(x), adapted(x))
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_factors_of_a_half_precision_base_are_float32_and_its_dtype_stays() -> None:
    base = nn.Linear(8, 8).bfloat16()
    adapted = LoraLinear(base, rank=2, scale=1.0)
    assert adapted.lora_A.weight.dtype == torch.float32
    x = torch.randn(2, 8)
    assert adapted(x.bfloat16()).dtype == torch.bfloat16
    assert adapted.merged_weight().dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted(x).dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["none", "patterns"])
def test_adapters_come_back_from_disk_apart_and_merged(tmp_path: Path, change: str) -> None:
    adapted = model()
    apply_lora(adapted, LoraConfig(rank=2, alpha=5, targets=BOTH))
    if change == "patterns":
        q_proj = adapted.language_model.layers[0].self_attn.q_proj
        adapted.language_model.layers[0].self_attn.q_proj = LoraLinear(q_proj, rank=3, scale=0.7)
    shake(adapted)
    want = logits(adapted)
    save_model(model(), tmp_path, "xtuner")
    save_adapters(adapted, tmp_path)
    assert (logits(load_model(tmp_path)) - want).abs().max() <= 1e-5 * want.abs().max()
    again = model()
    names = load_adapters(again, tmp_path)
    assert torch.equal(logits(again), want)
    assert {name for name, p in again.named_parameters() if p.requires_grad and "projector" not in name} == set(names)
    save_adapters(again, tmp_path / "second")
    for folder in ("llm_adapter", "visual_encoder_adapter"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            saved = [root / folder / file for root in (tmp_path, tmp_path / "second")]
            if file.endswith("json"):
                drop = {"lora_dropout"}
                first, second = ({k: v for k, v in json.loads(p.read_text()).items() if k not in drop} for p in saved)
                assert first == second
            else:
                assert saved[0].read_bytes() == saved[1].read_bytes()


def test_the_initial_a_is_pefts() -> None:
    """Kaiming-uniform with a = sqrt(5): uniform in +- 1 / sqrt(in)."""
    torch.manual_seed(0)
    a = LoraLinear(nn.Linear(400, 4), rank=50, scale=1.0).lora_A.weight
    assert a.abs().max() <= 1 / math.sqrt(400)
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora.rank=0: want at least 1"),
        ({"alpha": -1.0}, "lora.alpha=-1.0: want a positive number"),
        ({"alpha": float("nan")}, "lora.alpha=nan: want a positive number"),
        ({"alpha": float("inf")}, "lora.alpha=inf: want a positive number"),
        ({"dropout": 1.0}, r"lora.dropout=1.0: want a number in \[0, 1\)"),
        ({"targets": []}, r"lora.targets=\[\]: want names of linears"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)  # type: ignore[arg-type]


def test_wrong_targets_and_second_adapters_are_refused() -> None:
    adapted = model()
    with pytest.raises(ValueError, match="'qproj' names no linear; want ends of names, such as down_proj, fc1"):
        apply_lora(adapted, LoraConfig(targets=["q_proj", "qproj"]))
    with pytest.raises(ValueError, match="'lm_head' names no linear"):  # the loss never runs the head as a module
        apply_lora(adapted, LoraConfig(targets=["lm_head"]))
    assert all(parameter.requires_grad for parameter in adapted.parameters()), "a refused call changes nothing"
    apply_lora(adapted, LoraConfig(targets=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters already"):
        apply_lora(adapted, LoraConfig(targets=["q_proj"]))


def test_adapters_without_a_place_or_a_partner_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no adapter"):
        save_adapters(model(), tmp_path)
    projector = model()
    apply_lora(projector, LoraConfig(rank=2, targets=["projector.linear_1"]))
    with pytest.raises(CheckpointError, match="no place for adapters of projector"):
        save_adapters(projector, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="no adapters, want llm_adapter or visual_encoder_adapter"):
        load_adapters(model(), tmp_path)
    adapted = model()
    apply_lora(adapted, LoraConfig(rank=2, targets=["self_attn.k_proj"]))
    save_adapters(adapted, tmp_path)
    other = AuroraModel(model().config)
    other.language_model.layers[1].self_attn.k_proj = nn.Linear(16, 9, bias=False)
    with pytest.raises(CheckpointError, match=r"k_proj.weight: got \(8, 16\), want \(9, 16\)"):
        load_adapters(other, tmp_path)
    weights = tmp_path / "llm_adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_adapters(model(), tmp_path)


def test_a_stage_that_would_freeze_its_adapters_is_refused() -> None:
    stage = StageConfig(objective=Objective.conversations, trainable=["projector."], lora=LoraConfig(rank=2))
    message = (
        r"trainable=\['projector\.'\]: freezes adapters, such as language_model\.layers\.0\..*; want their part in it"
    )
    with pytest.raises(ValueError, match=message):
        prepare_model(model(), stage)
    stage.trainable.append("language_model.")
    learn = {name for name, parameter in prepare_model(model(), stage).named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in learn} == {"projector", "language_model"}
    assert all("lora_" in name for name in learn if name.startswith("language_model."))
