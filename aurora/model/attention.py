"""The one attention entry: grouped heads, masks, a bias per key, and the choice of backend.

`eager` is the definition: scores and softmax in float32. What the other names run is in `attention_backends`.

The bias, ToMe's log of the token sizes, is never rounded to half precision: a half-precision mask puts outputs wrong
ten times more than the rest of the arithmetic. Kernels that take no float32 bias get keys of two more channels, which
hold bias / scale split into two half-precision numbers, and queries with two ones there; its error is then that of a
float32 bias.

Shape letters: B rows, T queries, S keys, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.model.attention_backends import (
    BACKENDS,
    BiasForm,
    attention_report,
    augmented_width,
    bias_form,
    check_backend,
    resolve_backend,
)

__all__ = [
    "BACKENDS",
    "attention",
    "attention_report",
    "augment_bias",
    "causal_mask",
    "check_backend",
    "resolve_backend",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over `D ** -0.5 * q @ k.T`.

    Args:
        q: Queries, (B, T, H, D).
        k: Keys, (B, S, K, D); H is a multiple of K.
        v: Values, (B, S, K, D).
        causal: The T queries are the last T of the S keys and see no key after themselves. Not together with `mask`.
        mask: True where a query may look, (B, T, S). A query that may look nowhere gets a finite, meaningless result.
        key_bias: Added to every score of a key, (B, S) float32: log of the token sizes (proportional attention of
            ToMe). Constant: backends need not give it a gradient.
        backend: One of BACKENDS.

    Returns:
        (B, T, H, D) in the dtype of q.

    Raises:
        ValueError: for a backend that is unknown or cannot run here, or causal given together with a mask.
    """
    if causal and mask is not None:
        raise ValueError("attention: got causal=True and a mask; fold the causal rule into the mask")
    num_queries, num_keys = q.shape[1], k.shape[1]
    causal = causal and num_queries > 1
    # SDPA counts its causal rule from the first key, so queries behind cached keys need a mask there.
    masked = mask is not None or (causal and num_queries != num_keys and backend.startswith("sdpa"))
    # The conditional settles a symbolic token count while torch.compile traces; a comparison alone stays a symbol.
    one_query = True if num_queries == 1 else False  # noqa: SIM210
    backend = resolve_backend(
        backend,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        key_bias=key_bias is not None,
        masked=masked,
        single_query=one_query,
    )
    if backend == "eager":
        return _eager(q, k, v, causal, mask, key_bias)
    if backend == "triton":
        from aurora.kernels.attention import attention as fused

        return fused(q, k, v, causal=causal, mask=mask, key_bias=key_bias, backend="triton")
    scale, width = q.shape[-1] ** -0.5, q.shape[-1]
    if key_bias is not None and bias_form(backend, q.device, q.dtype) is BiasForm.augmented:
        # Flash kernels want values as wide as keys; the others spare the copy.
        q, k, v = augment_bias(q, k, v, key_bias, widen_values=backend in _EQUAL_WIDTHS)
        key_bias = None
    if backend == "flash_attention_2":
        from aurora.model.flash_attention import flash_attention

        out = flash_attention(q, k, v, scale=scale, causal=causal, mask=mask)
    else:
        out = _sdpa(q, k, v, scale, causal, mask, key_bias, backend)
    return out if out.shape[-1] == width else out[..., :width]


_EQUAL_WIDTHS = ("sdpa", "sdpa_flash", "flash_attention_2")


def causal_mask(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """True where query t, being the last `num_queries` of the keys, may see key s; (T, S) bool."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device)[None] <= queries[:, None]


def augment_bias(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, *, widen_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Move a bias per key into the keys, for kernels that take none.

    With `k' = [k, high, low, 0...]`, `high + low = key_bias / scale` and `q' = [q, 1, 1, 0...]`, `scale * q' @ k'` is
    `scale * q @ k + key_bias`; the scale stays that of the original width. One half-precision number alone would be
    wrong by up to 1.4e-2 for log(300), two are wrong by 3e-5.

    Args:
        q: Queries, (B, T, H, D).
        k: Keys, (B, S, K, D).
        v: Values, (B, S, K, D).
        key_bias: (B, S) float32.
        widen_values: Also bring the values to the new width, with zeros.

    Returns:
        Queries and keys (B, ..., D') with D' the multiple of 8 above D + 1, and values (B, S, K, D' or D).
    """
    extra = augmented_width(q.shape[-1]) - q.shape[-1]
    target = key_bias.float() * q.shape[-1] ** 0.5
    high = target.to(k.dtype)
    low = (target - high.float()).to(k.dtype)
    slots = F.pad(torch.stack([high, low], dim=-1), (0, extra - 2))  # (B, S, extra)
    ones = (torch.arange(extra, device=q.device) < 2).to(q.dtype)
    q = torch.cat([q, ones.expand(*q.shape[:3], extra)], dim=-1)
    k = torch.cat([k, slots[:, :, None].expand(*k.shape[:3], extra)], dim=-1)
    return q, k, F.pad(v, (0, extra)) if widen_values else v


def _additive_mask(
    num_queries: int, num_keys: int, causal: bool, mask: Tensor | None, key_bias: Tensor | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    """What to add to the scores (float32) or where to look (bool), (B or 1, 1, T or 1, S); and whether to be causal."""
    if causal and (num_queries != num_keys or key_bias is not None):
        mask, causal = causal_mask(num_queries, num_keys, device=device)[None], False
    seen = None if mask is None else mask[:, None]
    if key_bias is None:
        return seen, causal
    bias = key_bias.float()[:, None, None]
    return bias if seen is None else bias.masked_fill(~seen, torch.finfo(torch.float32).min), causal


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, key_bias: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, tokens, D)
    num_queries, num_keys = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()  # (B, H, T, S)
    bias, causal = _additive_mask(num_queries, num_keys, causal, mask, key_bias, q.device)
    if causal:
        bias = causal_mask(num_queries, num_keys, device=q.device)
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, torch.finfo(torch.float32).min)
    elif bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    key_bias: Tensor | None,
    backend: str,
) -> Tensor:
    num_rows, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    bias = None
    if mask is not None or key_bias is not None or causal:
        bias, causal = _additive_mask(num_queries, num_keys, causal, mask, key_bias, q.device)
        if bias is not None and q.dtype == torch.float64 and bias.dtype != torch.bool:
            bias = bias.double()
    if q.device.type != "cpu":
        k, v = _dense(k), _dense(v)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, S, D)
    # A single query's heads become the queries of their key head: no key is repeated, which in bf16 on a CPU is five
    # times faster.
    alone = num_queries == 1
    q = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, -1) if alone else q.transpose(1, 2)
    grouped = q.shape[1] != num_kv_heads
    if grouped and backend == "sdpa_efficient":  # not every PyTorch from 2.9 on groups heads there
        k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))
        grouped = False
    if backend == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped)
    else:
        with torch.nn.attention.sdpa_kernel(_kernel(backend)):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped
            )
    return out.reshape(num_rows, 1, num_heads, -1) if alone else out.transpose(1, 2)  # (B, T, H, D)


def _kernel(backend: str) -> torch.nn.attention.SDPBackend:
    backends = torch.nn.attention.SDPBackend
    if backend == "sdpa_flash":
        return backends.FLASH_ATTENTION
    return backends.CUDNN_ATTENTION if backend == "sdpa_cudnn" else backends.EFFICIENT_ATTENTION


def _dense(x: Tensor) -> Tensor:
    # Keys broadcast with stride 0 come out silently wrong of the memory-efficient kernel (pytorch issue 191937).
    repeated = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.contiguous() if repeated else x
