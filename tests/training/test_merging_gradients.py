"""Gradients through a tower that merges are those of merging written out as matrices, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.model.merge import MergeConfig, SizeBias, plan_merge
from aurora.model.vision import VisionConfig, VisionTower, activate
from aurora.training.init import init_tower

LAYERS = 2


def small_tower() -> tuple[VisionTower, Tensor]:
    torch.manual_seed(5)
    config = VisionConfig(hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2, patch_size=7, image_size=28)
    tower = VisionTower(config, backend="sdpa")  # eager has float32 scores
    init_tower(tower)
    for parameter in tower.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return tower.double(), torch.randn(2, 3, 28, 28, dtype=torch.float64)


def merged(tower: VisionTower, pixels: Tensor, size_bias: SizeBias) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What the tower computes, with the token of each input after each layer, and the sizes."""
    vision = tower.config
    plan = plan_merge(
        MergeConfig(token_kept_ratio=0.3), height_px=28, width_px=28, vision=vision, num_active_layers=LAYERS
    )
    assert all(plan.r)
    out = tower(pixels, plan=plan, size_bias=size_bias, trace=True)
    assert out.trace is not None
    return out.hidden, out.trace.sources, out.trace.sizes


def written_out(tower: VisionTower, pixels: Tensor, size_bias: SizeBias, sources: list[Tensor]) -> Tensor:
    """The same with a matrix for each merge: rows of (A size x) / (A size)."""
    x, _ = tower.embed(pixels)
    B, N, _ = x.shape
    size = torch.ones(B, N, 1, dtype=torch.float64)
    before = torch.arange(N).expand(B, -1)
    for block, after in zip(tower.blocks[:LAYERS], sources, strict=True):
        normed = block.norm1(x)
        q, k, v = (layer(normed).unflatten(-1, (2, -1)).transpose(1, 2) for layer in projections(block))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, N, N)
        if size_bias is SizeBias.keys:
            scores = scores + size[:, None, None, :, 0].log()
        attended = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.attn.out_proj(attended)
        owner = torch.zeros(B, int(after.max()) + 1, x.shape[1], dtype=torch.float64)
        owner[torch.arange(B)[:, None], after, before] = 1.0  # (B, N - r, N)
        x, size = owner @ (size * x) / (owner @ size), owner @ size
        x = x + block.mlp.fc2(activate(block.mlp.fc1(block.norm2(x)), block.mlp.activation))
        before = after
    return x


def projections(block: torch.nn.Module) -> tuple[torch.nn.Linear, ...]:
    return block.attn.q_proj, block.attn.k_proj, block.attn.v_proj  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("size_bias", list(SizeBias))
def test_gradients_are_those_of_the_plain_formulation(size_bias: SizeBias) -> None:
    tower, pixels = small_tower()
    hidden, sources, _ = merged(tower, pixels, size_bias)
    weights = torch.randn_like(hidden)
    found, wanted = (
        dict(zip(names, torch.autograd.grad((out * weights).sum(), parameters), strict=True))
        for out in (hidden, written_out(tower, pixels, size_bias, sources))
        for names, parameters in [zip(*learned(tower), strict=True)]
    )
    torch.testing.assert_close(hidden, written_out(tower, pixels, size_bias, sources), rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-6 * gradient.norm() + 1e-12, f"{name}: {error}"


@pytest.mark.parametrize("size_bias", list(SizeBias))
def test_gradcheck(size_bias: SizeBias) -> None:
    tower, pixels = small_tower()
    row = pixels[:1, :, :9, :9].clone().requires_grad_()

    def features(corner: Tensor) -> Tensor:
        return merged(tower, F.pad(corner, (0, 19, 0, 19)) + pixels[:1], size_bias)[0]

    assert torch.autograd.gradcheck(features, (row,), eps=1e-6, atol=1e-5, rtol=1e-3, fast_mode=True)


def learned(tower: VisionTower) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (name, parameter)
        for name, parameter in tower.named_parameters()
        if not name.startswith(("blocks.2.", "norm_post"))
    ]
