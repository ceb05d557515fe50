"""Graphs of the whole encoder: which call is served by which graph, and on a GPU that they compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aurora import kernels
from aurora.model.encoder_graph import EncoderGraphs, frames_buffer
from aurora.model.merge import MergeConfig, MergePlan, SizeBias, plan_merge
from aurora.model.vision import VisionConfig, VisionTower

CONFIG = VisionConfig(hidden_size=32, intermediate_size=48, num_layers=5, num_heads=2, patch_size=4, image_size=32)


class CountingGraphs(EncoderGraphs):
    """Records by remembering the settings, and replays by running the tower."""

    recorded = 0

    def record(self, pixel_values: Tensor, **settings: object):
        self.recorded += 1

        def replay(pixels: Tensor) -> tuple[Tensor, Tensor]:
            out = self.tower(pixels, **settings)
            return out.hidden, out.size

        return replay


def make(device: str = "cpu", dtype: torch.dtype = torch.float32) -> VisionTower:
    torch.manual_seed(0)
    tower = VisionTower(CONFIG)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tower.to(device, dtype).eval()


def plan_of(ratio: float, *, height: int = 32, width: int = 32) -> MergePlan:
    return plan_merge(
        MergeConfig(token_kept_ratio=ratio), height_px=height, width_px=width, vision=CONFIG, num_active_layers=4
    )


def frames(batch: int = 2, height: int = 32, width: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_the_same_call_is_recorded_once():
    tower = make()
    graphs = CountingGraphs(tower)
    for seed in range(3):
        pixels = frames(seed=seed)
        got = graphs(pixels, plan=plan_of(0.4))
        want = tower(pixels, plan=plan_of(0.4))
        assert torch.equal(got.hidden, want.hidden)
        assert torch.equal(got.size, want.size)
        assert got.trace is None
    assert graphs.recorded == len(graphs) == 1


def test_whatever_changes_the_launches_is_recorded_anew():
    tower = make()
    graphs = CountingGraphs(tower)
    calls = [
        (frames(), {"plan": plan_of(0.4)}),
        (frames(batch=3), {"plan": plan_of(0.4)}),
        (frames(height=16, width=64), {"plan": plan_of(0.4, height=16, width=64)}),
        (frames(), {"plan": plan_of(0.2)}),
        (frames(), {"plan": None}),
        (frames(), {"plan": plan_of(0.4), "size_bias": SizeBias.keys}),
        (frames(), {"plan": None, "feature_layer": -1}),
    ]
    for pixels, settings in calls:
        graphs(pixels, **settings)
    assert graphs.recorded == len(calls)
    for pixels, settings in calls:
        graphs(pixels, **settings)
    assert graphs.recorded == len(calls)
    tower.backend = "eager"
    graphs(frames(), plan=plan_of(0.4))
    assert graphs.recorded == len(calls) + 1
    with kernels.use("torch"):
        graphs(frames(), plan=plan_of(0.4))
    assert graphs.recorded == len(calls) + 2
    torch.set_autocast_enabled("cuda", True)
    try:
        graphs(frames(), plan=plan_of(0.4))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert graphs.recorded == len(calls) + 3


def test_frames_of_an_inference_mode_can_be_overwritten_outside_of_it():
    with torch.inference_mode():
        pixels = frames()
        buffer = frames_buffer(pixels)
    assert torch.equal(buffer, pixels)
    buffer.copy_(frames(seed=2))
    assert torch.equal(buffer, frames(seed=2))
    assert not torch.equal(pixels, buffer)


def test_moved_weights_are_recorded_anew_and_changed_values_are_not():
    tower = make()
    graphs = CountingGraphs(tower)
    graphs(frames(), plan=None)
    with torch.no_grad():
        tower.pos_embed.mul_(2.0)
    graphs(frames(), plan=None)
    assert graphs.recorded == 1
    tower.load_state_dict({key: value.clone() for key, value in tower.state_dict().items()}, assign=True)
    graphs(frames(), plan=None)
    assert graphs.recorded == 2


def test_the_least_recently_used_graph_goes():
    graphs = CountingGraphs(make(), max_graphs=2)
    for batch in (1, 2, 1, 3):  # 3 takes the place of 2
        graphs(frames(batch=batch))
    assert graphs.recorded == 3
    graphs(frames(batch=1))
    assert graphs.recorded == 3
    graphs(frames(batch=2))
    assert graphs.recorded == 4
    assert len(graphs) == 2


def test_errors_are_the_users():
    with pytest.raises(ValueError, match="max_graphs=0: want at least 1"):
        EncoderGraphs(make(), max_graphs=0)
    with pytest.raises(ValueError, match="frames on cpu, want a CUDA device"):
        EncoderGraphs(make())(frames())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_replays_equal_the_tower(dtype: torch.dtype, compiled: bool) -> None:
    tower = make("cuda", dtype)
    if compiled:
        tower.compile_blocks()
    graphs = EncoderGraphs(tower)
    first = None
    for ratio in (0.4, 1.0, 0.2, 0.4):
        for seed in range(3):
            pixels = frames(seed=seed).to("cuda", dtype)
            got = graphs(pixels, plan=plan_of(ratio))
            with torch.no_grad():
                want = tower(pixels, plan=plan_of(ratio))
            assert torch.equal(got.hidden, want.hidden)
            assert torch.equal(got.size, want.size)
            first = (got.hidden, got.hidden.clone()) if first is None else first
    assert len(graphs) == 3
    assert torch.equal(*first)  # later replays left it alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_of_an_inference_mode_replays_outside_of_it() -> None:
    tower, plan = make("cuda"), plan_of(0.4)
    graphs = EncoderGraphs(tower)
    with torch.inference_mode():
        graphs(frames().cuda(), plan=plan)
    got = graphs(frames(seed=2).cuda(), plan=plan)
    assert len(graphs) == 1
    with torch.no_grad():
        assert torch.equal(got.hidden, tower(frames(seed=2).cuda(), plan=plan).hidden)
    assert not got.hidden.is_inference()
