"""Proportional attention against ToMe's, on every backend that runs on this machine."""

from __future__ import annotations

import pytest
import torch

from aurora.kernels.common import INTERPRETED
from aurora.model.merge import MergeConfig, SizeBias
from tests.golden import assert_close_to_golden, load_index, load_tensors
from tests.golden_models import tower_plan, vision_tower

CASES = [(name, case) for name in "ab" for case in load_index("vit_index")["cases"][name]]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton interprets nothing here")
CHEAP = {("a", "nonsq.r0.20"), ("b", "nonsq.r0.50")}


def assert_tower_equals_tome(name: str, case: str, backend: str, device: str = "cpu") -> None:
    tower = vision_tower(name).to(device)
    tower.backend = backend
    pixels = load_tensors(f"vit_{name}_cases")[f"{case.split('.')[0]}.pixel_values"]
    ratio = float(load_index("vit_index")["cases"][name][case]["kept_ratio"])
    plan = tower_plan(tower, pixels, MergeConfig(token_kept_ratio=ratio), feature_layer=-1)
    with torch.no_grad():
        out = tower(pixels.to(device), plan=plan, feature_layer=-1, size_bias=SizeBias.keys)
    assert_close_to_golden(out.hidden, load_tensors(f"vit_propattn_{name}_cases")[f"{case}.hidden_m1"])


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sdpa_flash"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_every_pytorch_backend_equals_tome(name: str, case: str, backend: str) -> None:
    assert_tower_equals_tome(name, case, backend)


@interpreted
@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(*c, marks=() if c in CHEAP else pytest.mark.slow, id="-".join(c)) for c in CASES],
)
def test_the_triton_kernel_equals_tome(name: str, case: str) -> None:
    assert_tower_equals_tome(name, case, "triton")
