"""Softmax attention with an optional bias per key, forward and backward.

    out[t] = sum_s p[t, s] v[s],   p[t] = softmax over s of (scale q[t] . k[s] + key_bias[s]),   scale = D ** -0.5
    dv[s] = sum_t p[t, s] dout[t]
    dp[t, s] = dout[t] . v[s],   ds[t, s] = p[t, s] (dp[t, s] - out[t] . dout[t])
    dq[t] = scale sum_s ds[t, s] k[s],   dk[s] = scale sum_t ds[t, s] q[t]

The bias, ToMe's log of the token sizes, is a constant: it gets no gradient. Query head h reads key head
`h // (H / K)`; a key head's gradients sum over its query heads.

Precision contract: products accumulate in float32, and scores, bias, softmax and sums are float32. The kernels round p
and ds to the type of the inputs before they multiply with them, the reference does not; outputs are rounded once.
Query tiles run in any order, sums within a tile in one order: results repeat bit for bit.

The kernels are in `attention_triton` and `attention_bwd_triton`. `aurora.model.attention` is where models attend; this
operation is its backend `triton`.

Shape letters: B rows, T queries, S keys, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aurora.kernels.common import KERNEL_DTYPES
from aurora.kernels.dispatch import choose

MAX_HEAD_WIDTH = 256
"""Widest head the kernels take: a tile of queries has to fit into registers."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend, with the scores never in memory where Triton runs.

    Args:
        q: Queries, (B, T, H, D), any float dtype and strides.
        k: Keys, (B, S, K, D); H is a multiple of K.
        v: Values, (B, S, K, D).
        causal: The T queries are the last T of the S keys and see no key after themselves. Not together with `mask`.
        mask: True where a query may look, (B, T, S) bool. A query that may look nowhere gets a finite, meaningless
            result; the kernels give it no gradient.
        key_bias: Added to every score of a key, (B, S); no gradient.
        backend: auto | torch | triton; None takes what `aurora.kernels.use` or AURORA_KERNELS say.

    Returns:
        (B, T, H, D) in the dtype of q.

    Raises:
        ValueError: if shapes or types do not fit together, or causal is given with a mask.
        KernelUnavailable: if Triton was asked for and cannot run.
    """
    _check(q, k, v, causal, mask, key_bias)
    key_bias = None if key_bias is None else key_bias.detach().float()
    reason = reason_against(q.dtype, q.shape[-1])
    if choose("attention", device=q.device, reason_against=reason, backend=backend) == "triton":
        out: Tensor = _attention_op(q, k, v, mask, key_bias, causal)[0]
        return out
    return attention_reference(q, k, v, causal=causal, mask=mask, key_bias=key_bias)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Define `attention` in PyTorch: every step in float32, or float64 for such inputs."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[2] // k.shape[2]
    k, v = (t.to(dtype).repeat_interleave(groups, dim=2) for t in (k, v))  # (B, S, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype) * q.shape[-1] ** -0.5, k)
    if key_bias is not None:
        scores = scores + key_bias[:, None, None].to(dtype)
    if causal:
        num_queries, num_keys = scores.shape[2:]
        last = torch.arange(num_keys - num_queries, num_keys, device=q.device)
        scores = scores.masked_fill(torch.arange(num_keys, device=q.device) > last[:, None], -1e30)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -1e30)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v).to(q.dtype)


def reason_against(dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why the kernels cannot serve a type or a head width; None if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"q is {str(dtype).removeprefix('torch.')}, kernels take float32, float16 and bfloat16"
    return f"a head wider than {MAX_HEAD_WIDTH} does not fit the kernel" if head_dim > MAX_HEAD_WIDTH else None


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, key_bias: Tensor | None) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or q.shape[2] % k.shape[2] or not q.dtype == k.dtype == v.dtype:
        shown = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (q, k, v))
        raise ValueError(
            f"attention: got q, k, v {shown}; want one type, (B, T, H, D) and twice (B, S, K, D), H % K = 0"
        )
    if causal and (mask is not None or q.shape[1] > k.shape[1]):
        raise ValueError(f"attention: causal with a mask, or {q.shape[1]} queries for {k.shape[1]} keys")
    if mask is not None and (mask.shape != (q.shape[0], q.shape[1], k.shape[1]) or mask.dtype != torch.bool):
        raise ValueError(f"attention: mask {mask.dtype} {tuple(mask.shape)}, want bool (B, T, S)")
    if key_bias is not None and key_bias.shape != k.shape[:2]:
        raise ValueError(f"attention: key_bias {tuple(key_bias.shape)}, want (B, S)")


@torch.library.custom_op("aurora::attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    from aurora.kernels.attention_triton import launch_attention

    return launch_attention(q, k, v, mask, key_bias, causal=causal)


@_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    rows, num_queries, num_heads, _width = q.shape
    return q.new_empty(q.shape), q.new_empty((rows, num_heads, num_queries), dtype=torch.float32)


@torch.library.custom_op("aurora::attention_backward", mutates_args=())
def _attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    dout: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from aurora.kernels.attention_bwd_triton import launch_attention_backward

    return launch_attention_backward(q, k, v, mask, key_bias, out, log_sum, dout, causal=causal)


@_attention_backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    dout: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, key_bias, causal = inputs
    ctx.save_for_backward(q, k, v, mask, key_bias, *output)
    ctx.causal = causal


def _backward(ctx: Any, dout: Tensor, _dlog_sum: Tensor) -> tuple[Any, ...]:
    return (*_attention_backward_op(*ctx.saved_tensors, dout, ctx.causal), None, None, None)


_attention_op.register_autograd(_backward, setup_context=_setup_context)
