# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Triton kernel of `attention`, the forward, and what it shares with the backward of `attention_bwd_triton`.

Imported only when they run. Scores never reach memory (Dao et al., 2022): the forward keeps a running maximum and sum
per query, the backward recomputes the scores from the log-sum it stored. Each output element is written by one program
in one order, without atomics, so results repeat bit for bit.

`tl.dot` wants powers of two. A head of 80 channels is taken as 64 + 16 with two products each, not as 128: any width is
a HEAD and a TAIL (`split_width`); the tensors of the second part carry a `1` in their name and vanish where TAIL is 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from aurora.kernels.common import INTERPRETED, next_power_of_2, on_device, with_dense_rows

LOG2_E = math.log2(math.e)


@triton.jit
def load_tile(ptr, rows, channels, row_stride, num_rows, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a head, zero outside."""
    inside = (rows < num_rows)[:, None] & (channels < WIDTH)[None, :]
    tile = tl.load(ptr + rows.to(tl.int64)[:, None] * row_stride + channels[None, :], mask=inside, other=0.0)
    if UPCAST:  # the interpreter multiplies bfloat16 wrongly
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(ptr, tile, rows, channels, row_stride, num_rows, WIDTH: tl.constexpr):
    """Rows of a head, rounded to the type of the tensor."""
    inside = (rows < num_rows)[:, None] & (channels < WIDTH)[None, :]
    pointers = ptr + rows.to(tl.int64)[:, None] * row_stride + channels[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_products(a, a1, b, b1, TAIL: tl.constexpr):
    """Rows of a times rows of b over all channels, float32."""
    products = tl.dot(a, tl.trans(b), input_precision="ieee")
    if TAIL > 0:
        products += tl.dot(a1, tl.trans(b1), input_precision="ieee")
    return products


@triton.jit
def hide_unseen(
    scores,
    queries,
    keys,
    num_queries,
    num_keys,
    mask_ptr,
    stride_mt,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Lower what a query may not see: finite, so that a query that sees nothing gives no NaN."""
    inside = (keys < num_keys)[None, :]
    if CAUSAL:
        seen = keys[None, :] <= queries[:, None] + (num_keys - num_queries)
        scores = tl.where(seen, scores, -1e30)
    if HAS_MASK:
        pointers = mask_ptr + queries.to(tl.int64)[:, None] * stride_mt + keys[None, :]
        seen = tl.load(pointers, mask=inside & (queries < num_queries)[:, None], other=0)
        scores = tl.where(seen != 0, scores, -1e30)
    return tl.where(inside, scores, float("-inf"))


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    log_sum_ptr,
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
    """Attend from a tile of queries of one head to all keys, with the softmax running along."""
    tl.static_assert(BLOCK_M >= 16 and BLOCK_N >= 16 and HEAD >= 16, "tl.dot wants tiles of at least 16")
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
    q = load_tile(q_ptr, queries, channels, stride_qt, num_queries, WIDTH, UPCAST)
    q1 = q
    if TAIL > 0:
        q1 = load_tile(q_ptr, queries, channels1, stride_qt, num_queries, WIDTH, UPCAST)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, HEAD), tl.float32)
    out1 = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 16), tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, first + BLOCK_M + num_keys - num_queries)
    for start in range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, channels, stride_ks, num_keys, WIDTH, UPCAST)
        k1 = k
        if TAIL > 0:
            k1 = load_tile(k_ptr, keys, channels1, stride_ks, num_keys, WIDTH, UPCAST)
        scores = row_products(q, q1, k, k1, TAIL) * scale
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row * stride_bias + keys, mask=keys < num_keys, other=0.0)
            scores += bias[None, :] * 1.4426950408889634
        scores = hide_unseen(scores, queries, keys, num_queries, num_keys, mask_ptr, stride_mt, CAUSAL, HAS_MASK)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        v = load_tile(v_ptr, keys, channels, stride_vs, num_keys, WIDTH, UPCAST)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        if TAIL > 0:
            v1 = load_tile(v_ptr, keys, channels1, stride_vs, num_keys, WIDTH, UPCAST)
            out1 = out1 * shrink[:, None] + tl.dot(weights.to(v.dtype), v1, input_precision="ieee")
        top = new_top
    out_ptr += (row * num_queries * num_heads + head) * WIDTH
    store_tile(out_ptr, out / total[:, None], queries, channels, num_heads * WIDTH, num_queries, WIDTH)
    if TAIL > 0:
        store_tile(out_ptr, out1 / total[:, None], queries, channels1, num_heads * WIDTH, num_queries, WIDTH)
    log_sum_ptr += (row * num_heads + head) * num_queries
    tl.store(log_sum_ptr + queries, top + tl.log2(total), mask=queries < num_queries)


def split_width(width: int) -> tuple[int, int]:
    """Powers of two, at least 16, that cover a head: the largest that fits, and what is left (or 0); 80 is 64 + 16."""
    head = max(16, 1 << (width.bit_length() - 1))
    rest = width - head
    return (head, max(16, next_power_of_2(rest))) if rest > 0 else (head, 0)


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_bias: Tensor | None, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        q: (B, T, H, D) float32, float16 or bfloat16.
        k: (B, S, K, D).
        v: (B, S, K, D).
        mask: (B, T, S) bool, or None.
        key_bias: (B, S) float32, or None.
        causal: The T queries are the last T of the S keys.

    Returns:
        Output (B, T, H, D) in the dtype of q, and the base-2 logarithm of each query's sum, (B, H, T) float32.
    """
    q, k, v = with_dense_rows(q), with_dense_rows(k), with_dense_rows(v)
    rows, num_queries, num_heads, width = q.shape
    out = q.new_empty(q.shape)
    log_sum = q.new_empty((rows, num_heads, num_queries), dtype=torch.float32)
    tile, flags = tile_sizes(q, backward=False), kernel_flags(q, k, mask, key_bias, causal)
    mask, key_bias, strides = optional_inputs(q, mask, key_bias)
    if out.numel() == 0:
        return out, log_sum
    with on_device(q):
        attention_fwd_kernel[(triton.cdiv(num_queries, tile["BLOCK_M"]) * rows * num_heads,)](
            q,
            k,
            v,
            key_bias,
            mask,
            out,
            log_sum,
            num_queries,
            k.shape[1],
            num_heads,
            LOG2_E * width**-0.5,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *strides,
            **flags,
            **tile,
        )
    return out, log_sum


def tile_sizes(q: Tensor, *, backward: bool) -> dict[str, int]:
    """Fixed sizes, since another would add in another order; few queries get a smaller tile.

    Eight warps keep every kernel up to 96 channels out of local memory on sm_90 (seen in its machine code).
    """
    wide = q.dtype == torch.float32 or q.shape[-1] > 128
    block = 32 if wide else 64
    block_m = block if backward or wide else 128
    block_m = min(block_m, max(16, next_power_of_2(q.shape[1])))
    return {"BLOCK_M": block_m, "BLOCK_N": block, "num_warps": 8 if block_m >= 64 else 4, "num_stages": 2}


def kernel_flags(
    q: Tensor, k: Tensor, mask: Tensor | None, key_bias: Tensor | None, causal: bool
) -> dict[str, int | bool]:
    """Compile-time constants of a call."""
    head, tail = split_width(q.shape[-1])
    return {
        "GROUPS": q.shape[2] // k.shape[2],
        "WIDTH": q.shape[-1],
        "HEAD": head,
        "TAIL": tail,
        "CAUSAL": causal,
        "HAS_BIAS": key_bias is not None,
        "HAS_MASK": mask is not None,
        "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
    }


def optional_inputs(
    q: Tensor, mask: Tensor | None, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Pointers and strides of what may be absent; q stands in, and no kernel reads it then."""
    mask = None if mask is None else with_dense_rows(mask).view(torch.uint8)
    key_bias = None if key_bias is None else with_dense_rows(key_bias)
    strides = (
        0 if key_bias is None else key_bias.stride(0),
        0 if mask is None else mask.stride(0),
        0 if mask is None else mask.stride(1),
    )
    return q if mask is None else mask, q if key_bias is None else key_bias, strides
