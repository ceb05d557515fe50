# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Triton kernels of `merge`: one output row for each program forward, one input row for each program backward.

Imported only when they run. A group is summed by the one program that owns it, in the order of the contract, so there
is nothing to synchronise and no atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aurora.kernels.common import next_power_of_2, with_dense_rows
from aurora.kernels.merge import merge_outputs


@triton.jit
def _token(x_ptr, residual_ptr, at, stride_xn, stride_rn, channel, inside, out_ptr, HAS_RESIDUAL: tl.constexpr):
    """Load one token as float32, plus its residual and rounded as that sum is when it is stored."""
    x = tl.load(x_ptr + at * stride_xn + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + at * stride_rn + channel, mask=inside, other=0.0).to(tl.float32)
        x = x.to(out_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["num_tokens", "r"])
def merge_fwd_kernel(
    x_ptr,
    residual_ptr,
    size_ptr,
    unmerged_ptr,
    src_ptr,
    dst_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    normed_ptr,
    out_size_ptr,
    log_size_ptr,
    position_ptr,
    num_tokens,
    r,
    width,
    eps,
    stride_xb,
    stride_xn,
    stride_rb,
    stride_rn,
    stride_sb,
    stride_sn,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MERGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write one merged token, its LayerNorm, its size and log(size), and where its members went."""
    num_out = num_tokens - r
    row = (tl.program_id(0) // num_out).to(tl.int64)
    place = tl.program_id(0) % num_out
    x_ptr += row * stride_xb
    residual_ptr += row * stride_rb
    size_ptr += row * stride_sb
    position_ptr += row * num_tokens
    channel = tl.arange(0, BLOCK_C)
    inside = channel < width

    num_kept = (num_tokens + 1) // 2 - r
    token = place.to(tl.int64)
    if HAS_MERGES:
        kept = tl.load(unmerged_ptr + row * num_kept + place, mask=place < num_kept, other=0)
        token = tl.where(place < num_kept, 2 * kept, 2 * (place - num_kept) + 1)
    y = _token(x_ptr, residual_ptr, token, stride_xn, stride_rn, channel, inside, out_ptr, HAS_RESIDUAL)
    size = tl.load(size_ptr + token * stride_sn).to(tl.float32)
    tl.store(position_ptr + token, place)
    if HAS_MERGES:
        rank = tl.arange(0, BLOCK_R)
        dst = tl.load(dst_ptr + row * r + rank, mask=rank < r, other=-1)
        mine = (dst == place - num_kept) & (rank < r)
        s = tl.min(tl.where(mine, rank, BLOCK_R), axis=0)
        if s < BLOCK_R:
            total = y * size
            while s < BLOCK_R:
                source = 2 * tl.load(src_ptr + row * r + s)
                x = _token(x_ptr, residual_ptr, source, stride_xn, stride_rn, channel, inside, out_ptr, HAS_RESIDUAL)
                source_size = tl.load(size_ptr + source * stride_sn).to(tl.float32)
                total += x * source_size
                size += source_size
                tl.store(position_ptr + source, place)
                s = tl.min(tl.where(mine & (rank > s), rank, BLOCK_R), axis=0)
            y = tl.div_rn(total, tl.broadcast_to(size, (BLOCK_C,)))

    at = row * num_out + place
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at * width + channel, y, mask=inside)
    tl.store(out_size_ptr + at, size)
    tl.store(log_size_ptr + at, tl.log(size))
    if HAS_NORM:
        y = y.to(tl.float32)
        centred = tl.where(inside, y - tl.sum(y, axis=0) / width, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
        normed *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            normed += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed_ptr + at * width + channel, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normalised(out_ptr, at, width, eps, channel, inside):
    """Recompute LayerNorm without weight from the stored row: the normalised row and its inverse deviation."""
    y = tl.load(out_ptr + at * width + channel, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, y - tl.sum(y, axis=0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * scale, scale


@triton.jit(do_not_specialize=["num_tokens", "num_out"])
def merge_bwd_kernel(
    grad_ptr,
    grad_normed_ptr,
    out_ptr,
    weight_ptr,
    size_ptr,
    out_size_ptr,
    position_ptr,
    dx_ptr,
    num_tokens,
    num_out,
    width,
    eps,
    stride_gb,
    stride_gn,
    stride_nb,
    stride_nn,
    stride_sb,
    stride_sn,
    HAS_NORM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradient of one input token: that of the row it went to, times its share of that row."""
    row = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = tl.program_id(0) % num_tokens
    channel = tl.arange(0, BLOCK_C)
    inside = channel < width
    place = tl.load(position_ptr + row * num_tokens + token).to(tl.int64)
    at = row * num_out + place
    grad = tl.load(grad_ptr + row * stride_gb + place * stride_gn + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        normed, scale = _normalised(out_ptr, at, width, eps, channel, inside)
        g = tl.load(grad_normed_ptr + row * stride_nb + place * stride_nn + channel, mask=inside, other=0.0)
        g = g.to(tl.float32) * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        mean, along = tl.sum(g, axis=0) / width, tl.sum(g * normed, axis=0) / width
        grad += (g - mean - normed * along) * scale
    share = tl.load(size_ptr + row * stride_sb + token.to(tl.int64) * stride_sn).to(tl.float32)
    share = share / tl.load(out_size_ptr + at)
    dx_at = (row * num_tokens + token) * width
    tl.store(dx_ptr + dx_at + channel, (grad * share).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_out", "rows_each"])
def norm_bwd_kernel(
    grad_normed_ptr,
    out_ptr,
    dweight_ptr,
    dbias_ptr,
    num_rows,
    num_out,
    rows_each,
    width,
    eps,
    stride_nb,
    stride_nn,
    BLOCK_C: tl.constexpr,
):
    """Sum the gradients of LayerNorm's weight and bias over a few consecutive rows."""
    first = tl.program_id(0).to(tl.int64) * rows_each
    channel = tl.arange(0, BLOCK_C)
    inside = channel < width
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(0, rows_each):
        at = first + step
        if at < num_rows:
            grad_at = (at // num_out) * stride_nb + (at % num_out) * stride_nn
            g = tl.load(grad_normed_ptr + grad_at + channel, mask=inside, other=0.0).to(tl.float32)
            normed, _ = _normalised(out_ptr, at, width, eps, channel, inside)
            dweight += g * normed
            dbias += g
    partial = tl.program_id(0).to(tl.int64) * width + channel
    tl.store(dweight_ptr + partial, dweight, mask=inside)
    tl.store(dbias_ptr + partial, dbias, mask=inside)


def launch_merge(
    x: Tensor,
    residual: Tensor | None,
    size: Tensor,
    unmerged: Tensor,
    src: Tensor,
    dst: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the merge; arguments as in `merge_step`, results as in `merge_outputs`."""
    x = with_dense_rows(x)
    residual = None if residual is None else with_dense_rows(residual)
    rows, num_tokens, width = x.shape
    r = src.shape[1]
    outputs = merge_outputs(x, residual, r, weight)
    if rows * num_tokens == 0:
        return outputs
    merge_fwd_kernel[(rows * (num_tokens - r),)](
        x,
        x if residual is None else residual,
        size,
        unmerged.contiguous(),
        src.contiguous(),
        dst.contiguous(),
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        *outputs,
        num_tokens,
        r,
        width,
        eps,
        x.stride(0),
        x.stride(1),
        0 if residual is None else residual.stride(0),
        0 if residual is None else residual.stride(1),
        size.stride(0),
        size.stride(1),
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_MERGES=r > 0,
        BLOCK_R=max(16, next_power_of_2(r)),
        **_row_tile(width),
    )
    return outputs


def launch_merge_backward(
    grad: Tensor,
    grad_normed: Tensor | None,
    merged: Tensor | None,
    weight: Tensor | None,
    size: Tensor,
    merged_size: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward pass.

    Args:
        grad: Gradient of the merged tokens, (B, N - R, C).
        grad_normed: Gradient of their LayerNorm, same shape; None without one.
        merged: The merged tokens, contiguous; needed for a LayerNorm.
        weight: LayerNorm scale, (C,); needed for a LayerNorm.
        size: Sizes before, (B, N, 1).
        merged_size: Sizes after, (B, N - R, 1).
        positions: Output position of each input token, (B, N) int32.
        eps: LayerNorm epsilon.

    Returns:
        Gradients of x (and residual) in the dtype of `grad`, and of weight and bias in float32, empty without one.
    """
    grad = with_dense_rows(grad)
    rows, num_out, width = grad.shape
    num_tokens = size.shape[1]
    has_norm = grad_normed is not None and weight is not None and merged is not None
    grad_normed = with_dense_rows(grad_normed) if grad_normed is not None and has_norm else grad
    merged = merged.contiguous() if merged is not None and has_norm else grad
    dx = grad.new_empty((rows, num_tokens, width))
    num_rows = rows * num_out
    rows_each = max(8, next_power_of_2(triton.cdiv(num_rows, 512)))
    num_partial = triton.cdiv(num_rows, rows_each) if has_norm else 1
    dweight, dbias = (grad.new_empty((num_partial, width if has_norm else 0), dtype=torch.float32) for _ in range(2))
    if num_rows > 0:
        merge_bwd_kernel[(rows * num_tokens,)](
            grad,
            grad_normed,
            merged,
            weight.contiguous() if weight is not None else grad,
            size,
            merged_size,
            positions,
            dx,
            num_tokens,
            num_out,
            width,
            eps,
            grad.stride(0),
            grad.stride(1),
            grad_normed.stride(0),
            grad_normed.stride(1),
            size.stride(0),
            size.stride(1),
            HAS_NORM=has_norm,
            **_row_tile(width),
        )
        if has_norm:
            norm_bwd_kernel[(num_partial,)](
                grad_normed,
                merged,
                dweight,
                dbias,
                num_rows,
                num_out,
                rows_each,
                width,
                eps,
                grad_normed.stride(0),
                grad_normed.stride(1),
                **_row_tile(width),
            )
    return dx, dweight.sum(dim=0), dbias.sum(dim=0)


def _row_tile(width: int) -> dict[str, int]:
    # By width alone: another number of warps would sum a LayerNorm in another order.
    block = max(16, next_power_of_2(width))
    return {"BLOCK_C": block, "num_warps": min(8, max(1, block // 512))}
