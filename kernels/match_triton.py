# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Triton kernels of `match`: best partner of each A token, then the r best A tokens by counted rank.

Imported only when they run. All arithmetic is float32 with unfused rounding where ties depend on it, and products are
not rounded to TF32: another rounding would pick another partner.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aurora.kernels.common import autotune, next_power_of_2, with_dense_rows

_CONFIGS = [
    triton.Config({"BLOCK_A": block_a, "BLOCK_B": block_b}, num_warps=num_warps, num_stages=2)
    for block_a, block_b, num_warps in ((32, 64, 4), (64, 64, 8), (32, 32, 4))
]
"""With fewer rows for a warp, norms would be summed in another order, and timing noise would decide what merges."""


@autotune(_CONFIGS, key=["width", "BLOCK_D"])
@triton.jit(do_not_specialize=["num_tokens"])
def match_fwd_kernel(
    metric_ptr,
    best_ptr,
    partner_ptr,
    num_tokens,
    width,
    stride_mb,
    stride_mn,
    CLASS_TOKEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Score a tile of A tokens against every B token and keep each maximum and its lowest index."""
    tl.static_assert(BLOCK_A >= 16 and BLOCK_B >= 16 and BLOCK_D >= 16, "tl.dot wants tiles of at least 16")
    row = tl.program_id(0).to(tl.int64)
    num_a = (num_tokens + 1) // 2
    num_b = num_tokens // 2
    a_idx = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    channel = tl.arange(0, BLOCK_D)
    metric_ptr += row * stride_mb
    a = tl.load(
        metric_ptr + (2 * a_idx).to(tl.int64)[:, None] * stride_mn + channel[None, :],
        mask=(a_idx < num_a)[:, None] & (channel < width)[None, :],
        other=0.0,
    ).to(tl.float32)
    a = tl.div_rn(a, _norm(a)[:, None])
    best = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    partner = tl.zeros((BLOCK_A,), tl.int32)
    for start in range(0, num_b, BLOCK_B):
        b_idx = start + tl.arange(0, BLOCK_B)
        b = tl.load(
            metric_ptr + (2 * b_idx + 1).to(tl.int64)[:, None] * stride_mn + channel[None, :],
            mask=(b_idx < num_b)[:, None] & (channel < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        b = tl.div_rn(b, _norm(b)[:, None])
        scores = tl.dot(a, tl.trans(b), input_precision="ieee")
        # NaN compares with nothing, and ranks counted from it would not be a permutation: below every cosine.
        scores = tl.where(scores == scores, scores, -4.0)
        scores = tl.where((b_idx < num_b)[None, :], scores, float("-inf"))
        tile_best, tile_partner = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = tile_best > best  # strict: an equal score in a later tile has a higher index
        partner = tl.where(better, start + tile_partner, partner)
        best = tl.where(better, tile_best, best)
    if CLASS_TOKEN:
        best = tl.where(a_idx == 0, float("-inf"), best)
    tl.store(best_ptr + row * num_a + a_idx, best, mask=a_idx < num_a)
    tl.store(partner_ptr + row * num_a + a_idx, partner, mask=a_idx < num_a)


@triton.jit
def _norm(x):
    # The smallest normal float32: a zero token gets similarity 0.
    return tl.maximum(tl.sqrt_rn(tl.sum(x * x, axis=1)), 1.1754943508222875e-38)


@triton.jit(do_not_specialize=["num_a", "r"])
def select_fwd_kernel(
    best_ptr,
    partner_ptr,
    unmerged_ptr,
    src_ptr,
    dst_ptr,
    scores_ptr,
    num_a,
    r,
    CLASS_TOKEN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Rank the A tokens of one row: an A token's rank is the number of those with a better claim."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_A)
    inside = i < num_a
    best = tl.load(best_ptr + row * num_a + i, mask=inside, other=float("-inf"))
    rank = tl.zeros((BLOCK_A,), tl.int32)
    for start in range(0, num_a, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(best_ptr + row * num_a + j, mask=j < num_a, other=float("-inf"))[None, :]
        mine = best[:, None]
        ahead = (other > mine) | ((other == mine) & (j[None, :] < i[:, None]))
        rank += tl.sum((ahead & (j < num_a)[None, :]).to(tl.int32), axis=1)

    merged = inside & (rank < r)
    partner = tl.load(partner_ptr + row * num_a + i, mask=inside, other=0)
    tl.store(src_ptr + row * r + rank, i.to(tl.int64), mask=merged)
    tl.store(dst_ptr + row * r + rank, partner.to(tl.int64), mask=merged)
    tl.store(scores_ptr + row * r + rank, best, mask=merged)
    kept = inside & (rank >= r)
    place = rank - r  # by descending similarity
    if CLASS_TOKEN:
        place = tl.cumsum(kept.to(tl.int32), axis=0) - 1  # ascending
    tl.store(unmerged_ptr + row * (num_a - r) + place, i.to(tl.int64), mask=kept)


def tile_width(width: int) -> int:
    """Channels of a tile: a power of two and at least 32, since narrower ones sum norms in an order of their own."""
    return max(32, next_power_of_2(width))


def launch_match(metric: Tensor, r: int, *, class_token: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run both kernels.

    Args:
        metric: (B, N, C) float32, float16 or bfloat16; at most `MAX_METRIC_WIDTH` wide.
        r: Pairs to merge, within the bounds of `max_merges`.
        class_token: Protect position 0.

    Returns:
        unmerged_idx, src_idx, dst_idx, scores as in `Matching`.
    """
    metric = with_dense_rows(metric)
    rows, num_tokens, width = metric.shape
    num_a = (num_tokens + 1) // 2
    best = metric.new_empty((rows, num_a), dtype=torch.float32)
    partner = metric.new_empty((rows, num_a), dtype=torch.int32)
    unmerged = metric.new_empty((rows, num_a - r), dtype=torch.int64)
    src, dst = (metric.new_empty((rows, r), dtype=torch.int64) for _ in range(2))
    scores = metric.new_empty((rows, r), dtype=torch.float32)
    if best.numel() == 0:
        return unmerged, src, dst, scores
    match_fwd_kernel[lambda meta: (rows, triton.cdiv(num_a, meta["BLOCK_A"]))](
        metric,
        best,
        partner,
        num_tokens,
        width,
        metric.stride(0),
        metric.stride(1),
        CLASS_TOKEN=class_token,
        BLOCK_D=tile_width(width),
    )
    block_a = max(16, next_power_of_2(num_a))
    select_fwd_kernel[(rows,)](
        best,
        partner,
        unmerged,
        src,
        dst,
        scores,
        num_a,
        r,
        CLASS_TOKEN=class_token,
        BLOCK_A=block_a,
        BLOCK_J=max(4, min(64, 16384 // block_a)),  # a tile of at most 64 compares for each of 256 lanes
        num_warps=8 if block_a >= 256 else 4,
    )
    return unmerged, src, dst, scores
