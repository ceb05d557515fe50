"""The anchor from the paper computes what our ops do, so that racing it means something."""

from __future__ import annotations

import pytest
import torch

from aurora.benchmark.tome import tome_attention, tome_match, tome_merge, tome_step, tome_tower
from aurora.model.attention import attention
from aurora.model.merge import MergeConfig, SizeBias, match_tokens, merge_tokens, plan_merge
from aurora.model.vision import VisionConfig, VisionTower


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("num_tokens", "r"), [(33, 7), (34, 16), (9, 1)])
def test_matching_and_merging_equal_ours(num_tokens, r, class_token):
    generator = torch.Generator().manual_seed(num_tokens)
    metric = torch.randn(2, num_tokens, 8, generator=generator)
    x = torch.randn(2, num_tokens, 5, generator=generator)
    size = torch.randint(1, 6, (2, num_tokens, 1), generator=generator).float()
    pairs = tome_match(metric, r, class_token=class_token)
    match = match_tokens(metric, r, class_token=class_token)
    assert torch.equal(pairs.source[..., 0], match.src_idx)
    assert torch.equal(pairs.destination[..., 0], match.dst_idx)
    assert torch.equal(pairs.unmerged[..., 0], match.unmerged_idx)
    for got, want in zip(tome_merge(x, size, pairs), merge_tokens(x, size, match), strict=True):
        torch.testing.assert_close(got, want)


def test_a_step_takes_the_mean_key():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 20, 2, 4, generator=generator)
    x, size = torch.randn(2, 20, 8, generator=generator), torch.ones(2, 20, 1)
    match = match_tokens(keys.mean(2), 6, class_token=True)
    for got, want in zip(tome_step(keys, x, size, 6, class_token=True), merge_tokens(x, size, match), strict=True):
        torch.testing.assert_close(got, want)


def test_proportional_attention_equals_a_key_bias():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 11, 2, 4, generator=generator).unbind()
    size = torch.randint(1, 6, (2, 11, 1), generator=generator).float()
    want = attention(q, k, v, key_bias=size[..., 0].log(), backend="eager")
    torch.testing.assert_close(tome_attention(q, k, v, size), want)


@torch.no_grad()
def test_a_tower_of_it_equals_ours():
    torch.manual_seed(0)
    config = VisionConfig(hidden_size=32, intermediate_size=48, num_layers=5, num_heads=2, patch_size=4, image_size=32)
    tower = VisionTower(config).eval()
    plan = plan_merge(MergeConfig(token_kept_ratio=0.4), height_px=32, width_px=32, vision=config, num_active_layers=4)
    pixels = torch.randn(2, 3, 32, 32)
    want = tower(pixels, plan=plan, size_bias=SizeBias.keys).hidden
    assert want.shape[1] < 50
    torch.testing.assert_close(tome_tower(tower, pixels, plan), want, rtol=1e-4, atol=1e-5)
