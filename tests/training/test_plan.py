"""The memory plan against what autograd saves, against what a process takes, and what it says of the 7B."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.config import field_meanings
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig, LlamaLayer, Pass, RopeScaling, rotary_table
from aurora.model.merge import MergeConfig, Schedule, SizeBias
from aurora.model.vision import Activation, VisionBlock, VisionConfig
from aurora.training import plan
from aurora.training.build import prepare_model
from aurora.training.config import Objective, Parallel, Precision, StageConfig, TrainConfig
from aurora.training.conversations import AnswerLoss
from aurora.training.lora import LoraConfig, LoraLinear
from aurora.training.plan import Work, format_plan, memory_plan, plan_memory
from tests.training.step_memory import FRAMES, ROWS, SMALL, Fixed, measure_afresh

SEVEN = AuroraConfig(text=LlamaConfig(rope_scaling=RopeScaling(factor=4.0), max_seq_len=16384))
STAGE = StageConfig(
    objective=Objective.conversations,
    batch_size=8,
    accumulation_steps=8,
    activation_checkpointing=True,
    merge=MergeConfig(token_kept_ratio=0.1),
    packing=False,
)
GIB = 2**30


def saved_bytes(forward: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes of the distinct memory that autograd saves in a forward pass, `known` tensors left out."""
    out_of = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, Any] = {}  # holds each storage, whose address could be given away again otherwise

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in out_of:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in found.values())


def autocast(half: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize("learns", ["all", "nothing", "lora"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_a_decoder_layer_keeps_what_is_counted(half: bool, masked: bool, learns: str, num_kv_heads: int) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_layers=1, num_heads=4, num_kv_heads=num_kv_heads, vocab_size=9
    )
    layer = LlamaLayer(config).requires_grad_(learns == "all")
    if learns == "lora":
        layer.self_attn.v_proj = LoraLinear(layer.self_attn.v_proj, rank=3, scale=1.0)
        layer.mlp.down_proj = LoraLinear(layer.mlp.down_proj, rank=5, scale=1.0)
    rows, length = 2, 96
    x = torch.randn(rows, length, 64, requires_grad=True)
    rotary = rotary_table(config, torch.arange(length).expand(rows, -1))
    mask = torch.ones(rows, length, length, dtype=torch.bool).tril() if masked else None

    def forward() -> Tensor:
        with autocast(half):
            out: Tensor = layer(x, Pass(rotary, mask, None, "auto", None), 0, None)
        return out

    found = saved_bytes(forward, [*layer.parameters(), *rotary])
    # Casts of weights are counted apart; those that nothing needs for a gradient are not saved.
    casts = (
        sum(2 * p.numel() for name, p in layer.named_parameters() if p.ndim > 1 and "lora_A" not in name) if half else 0
    )
    if half and learns == "lora":
        casts += sum(2 * p.numel() for name, p in layer.named_parameters() if "lora_A" in name)
    counted = plan._layer(layer, rows * length, rows * length**2 if masked else 0, 2 if half else 4, 4)
    assert counted == pytest.approx(found - casts, rel=0.01)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("r", [0, 20])
@pytest.mark.parametrize("activation", [Activation.quick_gelu, Activation.gelu])
def test_a_vision_block_keeps_what_is_counted(half: bool, r: int, activation: Activation) -> None:
    config = VisionConfig(hidden_size=64, intermediate_size=160, num_layers=1, num_heads=4, hidden_act=activation)
    block = VisionBlock(config)
    x, size = torch.randn(3, 65, 64, requires_grad=True), torch.ones(3, 65, 1)

    def forward() -> Tensor:
        with autocast(half):
            out: Tensor = block(x, size, r, SizeBias.off, "auto")[0]
        return out

    casts = sum(2 * p.numel() for p in block.parameters() if p.ndim > 1) if half else 0
    found = saved_bytes(forward, [*block.parameters(), size]) - casts
    assert plan._block(block, 3 * 65, 3 * (65 - r), 2 if half else 4, 4) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("trainable", [[""], ["projector."], ["vision_tower.", "projector."]], ids=str)
@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_a_whole_step_keeps_what_is_counted(trainable: list[str], ratio: float) -> None:
    merge = MergeConfig(token_kept_ratio=ratio)
    stage = replace(STAGE, trainable=trainable, merge=merge, activation_checkpointing=False)
    vision = replace(SMALL.vision, hidden_size=64, intermediate_size=256, num_layers=5)
    text = replace(SMALL.text, hidden_size=64, intermediate_size=172, num_layers=3)
    model = prepare_model(AuroraModel(replace(SMALL, vision=vision, text=text)), stage)
    task = Fixed(model, AnswerLoss(model, merge=merge, row_length=None), FRAMES)
    found = saved_bytes(lambda: task.loss(0, None), list(model.parameters()))  # type: ignore[arg-type]
    side = vision.image_size
    work = Work(
        num_rows=ROWS, row_tokens=task.lengths[0], clips=[(FRAMES, side, side)] * ROWS, merge=merge, masked=False,
        precision=Precision.fp32,
    )  # fmt: skip
    kept = plan_memory(model, work).activations
    clips = sum(clip.nbytes for clip in task.batch.pixel_values if clip is not None)
    assert sum(kept.values()) == pytest.approx(found + clips, rel=0.1)


def test_the_7b_is_planned_by_arithmetic_alone() -> None:
    config = TrainConfig(model=SEVEN)
    alone = memory_plan(config, replace(STAGE, precision=Precision.fp32))
    total, learned = (sum(pair[i] for pair in alone.parameters.values()) for i in range(2))
    assert alone.parameters["language_model"] == (6_738_415_616, 6_738_415_616)  # Vicuna-7B
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * total, 4 * learned, 8 * learned)
    assert total - learned == 12 * 1280**2 + 13 * 1280 + 2 * 1280, "the tower's last block and norm do not learn"
    assert alone.copies == alone.communication == 0
    assert alone.visual_tokens == (8 * 109, 8 * 729)
    # Each pass adds to the gradient of the one before.
    assert alone.peak > alone.weights + alone.gradients + alone.optimizer + sum(alone.activations.values())


def test_what_makes_a_plan_smaller() -> None:
    config = TrainConfig(model=SEVEN)
    base = memory_plan(config, STAGE)
    changes: dict[str, dict[str, Any]] = {
        "sharding": {"parallel": Parallel.fsdp, "max_ranks": 8, "accumulation_steps": 1},
        "adapters": {"lora": LoraConfig(rank=64)},
        "frozen parts": {"trainable": ["projector."]},
        "one pass": {"accumulation_steps": 1, "batch_size": 1},
    }
    for name, change in changes.items():
        assert memory_plan(config, replace(STAGE, **change)).peak < base.peak, name
    more: dict[str, dict[str, Any]] = {
        "kept activations": {"activation_checkpointing": False},
        "packing": {"packing": True},
        "averaged weights": {"ema_decay": 0.999},
        "no merging": {"merge": MergeConfig()},
        "a larger pass": {"accumulation_steps": 4},
        "ranks with a replica each": {"parallel": Parallel.ddp, "max_ranks": 8, "batch_size": 64},
    }
    for name, change in more.items():
        assert memory_plan(config, replace(STAGE, **change)).peak >= base.peak, name
    sharded = memory_plan(config, replace(STAGE, parallel=Parallel.fsdp), num_ranks=64)
    assert sharded.weights == -(-base.weights // 64)


def test_activations_follow_the_merge_plan() -> None:
    config = TrainConfig(model=SEVEN)
    stage = replace(STAGE, activation_checkpointing=False)
    kept = [
        memory_plan(config, replace(stage, merge=MergeConfig(token_kept_ratio=ratio))).activations["vision_tower"]
        for ratio in (1.0, 0.4, 0.1)
    ]
    assert kept[0] > kept[1] > kept[2]
    early = MergeConfig(token_kept_ratio=0.1, schedule=Schedule.linear, inflection=-1.0)
    assert memory_plan(config, replace(stage, merge=early)).activations["vision_tower"] < kept[2]


def test_the_table_says_what_was_planned() -> None:
    found = memory_plan(TrainConfig(model=SEVEN), replace(STAGE, parallel=Parallel.fsdp, max_ranks=8))
    text = format_plan(found)
    first, second = text.splitlines()[:2]
    assert first == "8 ranks (fsdp), bf16, activations computed again"
    assert second.endswith("8 frames, 872 of 5832 visual tokens (token_kept_ratio=0.1, constant)")
    assert f"{found.peak / GIB:,.2f} GiB" in text.splitlines()[-1]
    assert "6,738.42 M" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_clip_without_room_is_noted() -> None:
    config = TrainConfig(model=SEVEN)
    whole, merged = (
        format_plan(memory_plan(config, replace(STAGE, merge=MergeConfig(token_kept_ratio=ratio))))
        for ratio in (1.0, 0.1)
    )
    assert "note: a clip of 8 frames, 5832 visual tokens, has no room in 4096 positions" in whole
    assert "note:" not in merged


def test_mistakes_are_named() -> None:
    config = TrainConfig(model=SEVEN)
    with pytest.raises(ValueError, match=r"'projectr\.' matches no parameter"):
        memory_plan(config, replace(STAGE, trainable=["projectr."]))
    with pytest.raises(ValueError, match=r"stage\.objective=clips: want conversations"):
        memory_plan(config, StageConfig())
    with pytest.raises(ValueError, match="visual_token_budget=7: 8 merged frames need at least 1 token each"):
        memory_plan(config, replace(STAGE, merge=MergeConfig(visual_token_budget=7)))
    frozen = AuroraModel(SMALL).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing learns"):
        plan_memory(frozen, Work())


def test_every_field_has_a_meaning() -> None:
    assert set(field_meanings(Work)) == set(Work.__dataclass_fields__)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 1.0, "checkpointing": False},
        {"ratio": 1.0, "checkpointing": True},
        {"ratio": 0.1, "checkpointing": False},
        {"ratio": 0.1, "checkpointing": True},
        {"ratio": 0.1, "checkpointing": False, "precision": "bf16"},
        {"ratio": 1.0, "checkpointing": False, "trainable": ["projector."]},
        {"ratio": 0.1, "checkpointing": False, "lora": True},
        {"ratio": 0.1, "checkpointing": False, "ranks": 2},
    ],
    ids=str,
)
def test_the_peak_is_within_a_quarter_of_what_a_process_takes(settings: dict[str, Any]) -> None:
    found = measure_afresh(**settings)
    assert found["planned"] == pytest.approx(found["taken"], rel=0.25)


def test_a_model_without_memory_gets_the_same_plan() -> None:
    with torch.device("meta"):
        empty = AuroraModel(SMALL)
    work = Work(row_tokens=300, clips=[(2, 224, 224)])
    assert plan_memory(empty, work) == plan_memory(AuroraModel(SMALL), work)
