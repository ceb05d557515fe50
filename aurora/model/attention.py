"""The one attention entry: grouped heads, masks, a bias per key, and the choice of backend.

`eager` is the definition: scores and softmax in float32. `sdpa` is
`torch.nn.functional.scaled_dot_product_attention`. `auto` is `sdpa`, except for a key bias in half precision, where a
half-precision mask would round log(size): that runs `eager`.

Shape letters: B rows, T queries, S keys, H query heads, K key heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "eager", "sdpa")


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
            ToMe).
        backend: auto, eager or sdpa.

    Returns:
        (B, T, H, D) in the dtype of q.

    Raises:
        ValueError: for an unknown backend, or causal given together with a mask.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attn_implementation={backend!r}: want one of {', '.join(BACKENDS)}")
    if causal and mask is not None:
        raise ValueError("attention: got causal=True and a mask; fold the causal rule into the mask")
    if backend == "auto":
        backend = "eager" if key_bias is not None and q.dtype != torch.float32 else "sdpa"
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, tokens, D)
    num_queries, num_keys = q.shape[2], k.shape[2]
    if causal and (num_queries == 1 or num_queries != num_keys):
        mask = None if num_queries == 1 else causal_mask(num_queries, num_keys, device=q.device)[None]
        causal = False
    bias = None if mask is None else mask[:, None]  # (B, 1, T, S) bool
    if key_bias is not None:
        additive = key_bias[:, None, None]  # (B, 1, 1, S)
        if causal:
            bias, causal = causal_mask(num_queries, num_keys, device=q.device)[None, None], False
        bias = additive if bias is None else additive.masked_fill(~bias, torch.finfo(torch.float32).min)
    run = _eager if backend == "eager" else _sdpa
    return run(q, k, v, bias, causal).transpose(1, 2)  # (B, T, H, D)


def causal_mask(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """True where query t, being the last `num_queries` of the keys, may see key s; (T, S) bool."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device)[None] <= queries[:, None]


def _eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, S)
    scores = scores.float()
    if causal:
        bias = causal_mask(q.shape[2], k.shape[2], device=q.device)
    if bias is not None:
        scores = (
            scores.masked_fill(~bias, torch.finfo(torch.float32).min) if bias.dtype == torch.bool else scores + bias
        )
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped)
