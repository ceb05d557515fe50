# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Triton kernels of the gradients of `attention`; imported only when they run.

One kernel owns a tile of queries and walks over the keys, the other owns a tile of keys and walks over the queries:
twice the score products of a kernel that adds with atomics, and the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from aurora.kernels.attention_triton import (
    hide_unseen,
    kernel_flags,
    load_tile,
    optional_inputs,
    row_products,
    store_tile,
    tile_sizes,
)
from aurora.kernels.common import on_device, with_dense_rows


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_bwd_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    log_sum_ptr,
    dout_ptr,
    delta_ptr,
    dq_ptr,
    num_queries,
    num_keys,
    num_heads,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_bias,
    stride_mb,
    stride_mt,
    stride_db,
    stride_dt,
    stride_dh,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of a tile of queries; also store sum(out * dout) of each query, which the other kernel needs."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    row = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    head = tl.program_id(0) // num_tiles % num_heads
    first = tl.program_id(0) % num_tiles * BLOCK_M
    queries = first + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, HEAD)
    channels1 = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    q_ptr += row * stride_qb + head * stride_qh
    k_ptr += row * stride_kb + head // GROUPS * stride_kh
    v_ptr += row * stride_vb + head // GROUPS * stride_vh
    mask_ptr += row * stride_mb
    dout_ptr += row * stride_db + head * stride_dh
    out_ptr += (row * num_queries * num_heads + head) * WIDTH
    q = load_tile(q_ptr, queries, channels, stride_qt, num_queries, WIDTH, UPCAST)
    dout = load_tile(dout_ptr, queries, channels, stride_dt, num_queries, WIDTH, UPCAST)
    out = load_tile(out_ptr, queries, channels, num_heads * WIDTH, num_queries, WIDTH, UPCAST)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    q1, dout1 = q, dout
    if TAIL > 0:
        q1 = load_tile(q_ptr, queries, channels1, stride_qt, num_queries, WIDTH, UPCAST)
        dout1 = load_tile(dout_ptr, queries, channels1, stride_dt, num_queries, WIDTH, UPCAST)
        out1 = load_tile(out_ptr, queries, channels1, num_heads * WIDTH, num_queries, WIDTH, UPCAST)
        delta += tl.sum(out1.to(tl.float32) * dout1.to(tl.float32), axis=1)
    per_query = (row * num_heads + head) * num_queries + queries
    log_sum = tl.load(log_sum_ptr + per_query, mask=queries < num_queries, other=0.0)
    tl.store(delta_ptr + per_query, delta, mask=queries < num_queries)
    dq = tl.zeros((BLOCK_M, HEAD), tl.float32)
    dq1 = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 16), tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, first + BLOCK_M + num_keys - num_queries)
    for start in range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, channels, stride_ks, num_keys, WIDTH, UPCAST)
        v = load_tile(v_ptr, keys, channels, stride_vs, num_keys, WIDTH, UPCAST)
        k1, v1 = k, v
        if TAIL > 0:
            k1 = load_tile(k_ptr, keys, channels1, stride_ks, num_keys, WIDTH, UPCAST)
            v1 = load_tile(v_ptr, keys, channels1, stride_vs, num_keys, WIDTH, UPCAST)
        scores = row_products(q, q1, k, k1, TAIL) * (scale * 1.4426950408889634)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row * stride_bias + keys, mask=keys < num_keys, other=0.0)
            scores += bias[None, :] * 1.4426950408889634
        scores = hide_unseen(scores, queries, keys, num_queries, num_keys, mask_ptr, stride_mt, CAUSAL, HAS_MASK)
        weights = tl.where(scores > -1e29, tl.exp2(scores - log_sum[:, None]), 0.0)
        dscores = (weights * (row_products(dout, dout1, v, v1, TAIL) - delta[:, None])).to(k.dtype)
        dq += tl.dot(dscores, k, input_precision="ieee")
        if TAIL > 0:
            dq1 += tl.dot(dscores, k1, input_precision="ieee")
    dq_ptr += (row * num_queries * num_heads + head) * WIDTH
    store_tile(dq_ptr, dq * scale, queries, channels, num_heads * WIDTH, num_queries, WIDTH)
    if TAIL > 0:
        store_tile(dq_ptr, dq1 * scale, queries, channels1, num_heads * WIDTH, num_queries, WIDTH)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_bwd_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    log_sum_ptr,
    dout_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    num_queries,
    num_keys,
    num_heads,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_bias,
    stride_mb,
    stride_mt,
    stride_db,
    stride_dt,
    stride_dh,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of a tile of keys and values of one key head, over the query heads that share it, in their order."""
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    num_kv_heads = num_heads // GROUPS
    row = (tl.program_id(0) // num_tiles // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) // num_tiles % num_kv_heads
    first = tl.program_id(0) % num_tiles * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, HEAD)
    channels1 = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    k_ptr += row * stride_kb + kv_head * stride_kh
    v_ptr += row * stride_vb + kv_head * stride_vh
    mask_ptr += row * stride_mb
    k = load_tile(k_ptr, keys, channels, stride_ks, num_keys, WIDTH, UPCAST)
    v = load_tile(v_ptr, keys, channels, stride_vs, num_keys, WIDTH, UPCAST)
    k1, v1 = k, v
    if TAIL > 0:
        k1 = load_tile(k_ptr, keys, channels1, stride_ks, num_keys, WIDTH, UPCAST)
        v1 = load_tile(v_ptr, keys, channels1, stride_vs, num_keys, WIDTH, UPCAST)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row * stride_bias + keys, mask=keys < num_keys, other=0.0) * 1.4426950408889634
    dk = tl.zeros((BLOCK_N, HEAD), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD), tl.float32)
    dk1 = tl.zeros((BLOCK_N, TAIL if TAIL > 0 else 16), tl.float32)
    dv1 = tl.zeros((BLOCK_N, TAIL if TAIL > 0 else 16), tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, first - (num_keys - num_queries)) // BLOCK_M * BLOCK_M
    for group in range(0, GROUPS):
        head = kv_head * GROUPS + group
        q_row = q_ptr + row * stride_qb + head * stride_qh
        dout_row = dout_ptr + row * stride_db + head * stride_dh
        for start in range(begin, num_queries, BLOCK_M):
            queries = start + tl.arange(0, BLOCK_M)
            q = load_tile(q_row, queries, channels, stride_qt, num_queries, WIDTH, UPCAST)
            dout = load_tile(dout_row, queries, channels, stride_dt, num_queries, WIDTH, UPCAST)
            q1, dout1 = q, dout
            if TAIL > 0:
                q1 = load_tile(q_row, queries, channels1, stride_qt, num_queries, WIDTH, UPCAST)
                dout1 = load_tile(dout_row, queries, channels1, stride_dt, num_queries, WIDTH, UPCAST)
            per_query = (row * num_heads + head) * num_queries + queries
            log_sum = tl.load(log_sum_ptr + per_query, mask=queries < num_queries, other=0.0)
            delta = tl.load(delta_ptr + per_query, mask=queries < num_queries, other=0.0)
            scores = row_products(q, q1, k, k1, TAIL) * (scale * 1.4426950408889634) + bias[None, :]
            scores = hide_unseen(scores, queries, keys, num_queries, num_keys, mask_ptr, stride_mt, CAUSAL, HAS_MASK)
            weights = tl.where(scores > -1e29, tl.exp2(scores - log_sum[:, None]), 0.0)
            weights_t = tl.trans(weights.to(dout.dtype))
            dv += tl.dot(weights_t, dout, input_precision="ieee")
            dscores = weights * (row_products(dout, dout1, v, v1, TAIL) - delta[:, None])
            dscores_t = tl.trans(dscores.to(q.dtype))
            dk += tl.dot(dscores_t, q, input_precision="ieee")
            if TAIL > 0:
                dv1 += tl.dot(weights_t, dout1, input_precision="ieee")
                dk1 += tl.dot(dscores_t, q1, input_precision="ieee")
    base = (row * num_keys * num_kv_heads + kv_head) * WIDTH
    store_tile(dk_ptr + base, dk * scale, keys, channels, num_kv_heads * WIDTH, num_keys, WIDTH)
    store_tile(dv_ptr + base, dv, keys, channels, num_kv_heads * WIDTH, num_keys, WIDTH)
    if TAIL > 0:
        store_tile(dk_ptr + base, dk1 * scale, keys, channels1, num_kv_heads * WIDTH, num_keys, WIDTH)
        store_tile(dv_ptr + base, dv1, keys, channels1, num_kv_heads * WIDTH, num_keys, WIDTH)


def launch_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    dout: Tensor,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run both backward kernels.

    Args:
        q: (B, T, H, D), as in the forward; so are k, v, mask, key_bias and causal.
        k: (B, S, K, D).
        v: (B, S, K, D).
        mask: (B, T, S) bool, or None.
        key_bias: (B, S) float32, or None.
        out: Output of the forward, (B, T, H, D), contiguous.
        log_sum: Its second output.
        dout: Gradient of the output, any strides.
        causal: The T queries are the last T of the S keys.

    Returns:
        Gradients of q, k and v.
    """
    q, k, v, dout = with_dense_rows(q), with_dense_rows(k), with_dense_rows(v), with_dense_rows(dout)
    rows, num_queries, num_heads, width = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = log_sum.new_empty(log_sum.shape)
    tile, flags = tile_sizes(q, backward=True), kernel_flags(q, k, mask, key_bias, causal)
    mask, key_bias, optional_strides = optional_inputs(q, mask, key_bias)
    if out.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    sizes = (num_queries, num_keys, num_heads, width**-0.5)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *optional_strides, *dout.stride()[:3])
    with on_device(q):
        attention_bwd_q_kernel[(triton.cdiv(num_queries, tile["BLOCK_M"]) * rows * num_heads,)](
            q, k, v, key_bias, mask, out, log_sum, dout, delta, dq, *sizes, *strides, **flags, **tile
        )
        attention_bwd_kv_kernel[(triton.cdiv(num_keys, tile["BLOCK_N"]) * rows * num_kv_heads,)](
            q, k, v, key_bias, mask, log_sum, dout, delta, dk, dv, *sizes, *strides, **flags, **tile
        )
    return dq, dk, dv
