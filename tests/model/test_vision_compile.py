"""torch.compile takes the tower whole, and its blocks once for all token counts."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters

from aurora.model.merge import Matching, MergeConfig, MergePlan, Schedule, SizeBias, plan_merge
from aurora.model.vision import VisionConfig, VisionTower

DEEP = VisionConfig(hidden_size=16, intermediate_size=24, num_layers=32, num_heads=2, patch_size=2, image_size=32)
SHALLOW = VisionConfig(hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, patch_size=2, image_size=12)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make(config: VisionConfig) -> tuple[VisionTower, torch.Tensor]:
    torch.manual_seed(0)
    tower = VisionTower(config).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        parameter.normal_(0, 0.3)
        # Keys without a common part: otherwise all cosines are near 1 and the last bit decides what merges.
        if "k_proj.bias" in name or "norm" in name:
            parameter.fill_(float(name.endswith("weight") and "norm" in name))
    return tower, torch.randn(2, 3, config.image_size, config.image_size)


def plan_of(tower: VisionTower, **settings: object) -> MergePlan:
    side = tower.config.image_size
    return plan_merge(
        MergeConfig(**settings),
        height_px=side,
        width_px=side,
        vision=tower.config,
        num_active_layers=tower.config.num_layers - 1,
    )


def pairs(match: Matching) -> torch.Tensor:
    """Merged pairs by ascending source, (B, R, 2)."""
    order = match.src_idx.argsort(dim=-1)
    return torch.stack([match.src_idx.gather(1, order), match.dst_idx.gather(1, order)], dim=-1)


def assert_blocks_agree(tower: VisionTower, compiled: VisionTower, pixels: torch.Tensor, plan: MergePlan) -> None:
    """Block by block on the same input, since a last bit may change which tokens match in a later layer."""
    x, _ = tower.embed(pixels)
    size = torch.ones(*x.shape[:2], 1)
    for block, other, r in zip(tower.blocks, compiled.blocks, plan.r, strict=False):
        want = block(x, size, r, SizeBias.keys, "auto")
        got = other(x, size, r, SizeBias.keys, "auto")
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(got[1], want[1])
        if r > 0:
            # Scores that differ in their last bits may change places in the ranking, nothing else may change.
            assert torch.equal(pairs(got[2]), pairs(want[2]))
            torch.testing.assert_close(got[2].scores, want[2].scores, rtol=0, atol=1e-6)
        x, size, _ = want


@pytest.mark.parametrize("size_bias", list(SizeBias), ids=lambda bias: bias.name)
def test_the_whole_tower_is_one_graph(size_bias: SizeBias) -> None:
    tower, pixels = make(SHALLOW)
    plan = plan_of(tower, token_kept_ratio=0.4)
    assert min(plan.r) > 0
    counter = CompileCounter()
    compiled = torch.compile(tower, backend=counter, fullgraph=True)
    got = compiled(pixels, plan=plan, size_bias=size_bias)
    want = tower(pixels, plan=plan, size_bias=size_bias)
    torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("schedule", [Schedule.constant, pytest.param(Schedule.linear, marks=pytest.mark.slow)])
def test_compiled_blocks_serve_every_token_count(schedule: Schedule) -> None:
    tower, pixels = make(DEEP)
    plans = [plan_of(tower, token_kept_ratio=0.2, schedule=schedule), plan_of(tower)]
    assert len(set(plans[0].tokens[:-1])) >= 29
    compiled, _ = make(DEEP)
    counter = CompileCounterWithBackend("eager")
    compiled.compile_blocks(backend=counter)
    for plan in plans:
        assert_blocks_agree(tower, compiled, pixels, plan)
    assert_blocks_agree(tower, compiled, pixels, plan_of(tower, token_kept_ratio=0.35, schedule=schedule))
    # r = 0, r = 1, r > 1 and odd or even counts, not one for each count; the limit is 8.
    assert 1 <= counter.frame_count <= 6


@pytest.mark.slow
def test_too_many_recompilations_raise() -> None:
    """Were a block compiled for each count, it would stop, not run on uncompiled."""
    tower, pixels = make(DEEP)
    for block in tower.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    with pytest.raises(FailOnRecompileLimitHit):
        tower(pixels, plan=plan_of(tower, token_kept_ratio=0.2))


@pytest.mark.slow
def test_inductor_computes_what_the_blocks_say() -> None:
    tower, pixels = make(DEEP)
    compiled, _ = make(DEEP)
    compiled.compile_blocks()
    assert_blocks_agree(tower, compiled, pixels, plan_of(tower, token_kept_ratio=0.2))
