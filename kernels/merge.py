"""Bipartite soft matching and the weighted merge of matched tokens.

Token Merging (Bolya et al., 2023), sections 3 and appendix D. Tokens at even positions (set A) may merge into tokens
at odd positions (set B): each A token is scored against every B token by cosine similarity of its metric, keeps its
best partner, and the `r` best scored A tokens disappear into their partners.

Precision contract: metric, norm and scores are float32 whatever the input dtype; sums accumulate in float32; sizes
are float32. Tie rule: the partner is the lowest B index among equal scores; A tokens are ranked by score, equal
scores by lower A index. Order of the result: unmerged A tokens, then every B token. With a class token (position 0,
never merged) the unmerged A tokens stay in ascending order; without one they are ordered by descending score.

The merge: y_d = sum_i s_i x_i / S_d over the group of d, S_d = sum_i s_i, summed as B token first, then its sources by
rank; a token that nothing merges into is copied. Gradient: dx_i = (s_i / S_d) dy_d for the d that i went to, a gather
of rows; sizes carry no gradient. Both backends add x and residual, round the sum, merge, round, and normalise what was
rounded, so that fusing changes nothing but the last bit. No float atomics: the same input gives the same bits.

Shape letters: B rows, N tokens, C width, A = ceil(N / 2) tokens at even positions, R merged pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.kernels.common import dtype_reason, on_device
from aurora.kernels.dispatch import choose
from aurora.kernels.match import Matching, key_metric, match_tokens, max_merges, merged_positions

__all__ = [
    "Matching",
    "MergedTokens",
    "key_metric",
    "match_tokens",
    "max_merges",
    "merge_step",
    "merge_tokens",
    "merge_tokens_norm",
    "merged_positions",
]

MAX_KERNEL_WIDTH = 8192
"""Widest token a kernel takes: a program holds a whole row."""


class MergedTokens(NamedTuple):
    """All that one pass over the tokens can deliver."""

    x: Tensor
    """Merged tokens, (B, N - R, C), in the dtype of x + residual."""
    normed: Tensor | None
    """Their LayerNorm, same shape and dtype; None if no weight was given."""
    size: Tensor
    """Patches per token, (B, N - R, 1) float32."""
    log_size: Tensor
    """Its logarithm, (B, N - R) float32: the key bias of proportional attention."""


def merge_tokens(x: Tensor, size: Tensor, match: Matching, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Average each merged pair, weighted by how many patches each token stands for.

    With R = 0 the tokens are returned as they are, in their order.

    Args:
        x: Token features, (B, N, C), any float dtype.
        size: Patches per token, (B, N, 1), float32.
        match: Pairs from `match_tokens` on the same N tokens.
        backend: auto | torch | triton; None takes what `aurora.kernels.use` or AURORA_KERNELS say.

    Returns:
        Features (B, N - R, C) in x.dtype and sizes (B, N - R, 1) in float32.

    Raises:
        ValueError: if match was built for another N, or `size` does not belong to `x`.
        KernelUnavailable: if Triton was asked for and cannot run.
    """
    _check(x, None, size, match)
    if match.src_idx.shape[1] == 0:
        return x, size
    if _choose("merge_tokens", x, None, None, None, backend) == "triton":
        merged, _, merged_size, _, _ = _merge_op(x, None, size, *match[:3], None, None, 0.0)
        return merged, merged_size.detach()
    return _differentiable_reference(x, size, match)


def merge_tokens_norm(
    x: Tensor,
    residual: Tensor | None,
    size: Tensor,
    match: Matching,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the residual, merge, and normalise for the MLP behind: `merge_tokens` and LayerNorm in one pass.

    With R = 0 nothing merges and the order stays.

    Args:
        x: Token features, (B, N, C), any float dtype.
        residual: Added to x before the merge, same shape; or None.
        size: Patches per token, (B, N, 1), float32.
        match: Pairs from `match_tokens` on the same N tokens.
        weight: LayerNorm scale, (C,).
        bias: LayerNorm shift, (C,); or None.
        eps: LayerNorm epsilon.
        backend: auto | torch | triton; None takes what `aurora.kernels.use` or AURORA_KERNELS say.

    Returns:
        Features (B, N - R, C) and their LayerNorm, in the dtype of x + residual; sizes (B, N - R, 1) in float32.

    Raises:
        ValueError: if match was built for another N, or `size` or `residual` do not belong to `x`.
        KernelUnavailable: if Triton was asked for and cannot run.
    """
    done = _merge(x, residual, size, match, weight, bias, eps, backend, "merge_tokens_norm")
    assert done.normed is not None
    return done.x, done.normed, done.size


def merge_step(
    x: Tensor,
    size: Tensor,
    match: Matching,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> MergedTokens:
    """Merge with everything that one pass over the tokens can deliver; arguments as in `merge_tokens_norm`.

    Raises:
        ValueError: as `merge_tokens_norm`.
        KernelUnavailable: if Triton was asked for and cannot run.
    """
    return _merge(x, residual, size, match, weight, bias, eps, backend, "merge_step")


def merge_reference(x: Tensor, size: Tensor, unmerged: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Define the merge in PyTorch: gather the rows that stay, then rewrite the few that something merges into.

    Not differentiable: `_MergeFunction` knows the gradient.

    Args:
        x: (B, N, C).
        size: (B, N, 1) float32.
        unmerged: Of the matching, (B, A - R).
        src: Of the matching, (B, R), R > 0.
        dst: Of the matching, (B, R).

    Returns:
        Features (B, N - R, C) in x.dtype and sizes (B, N - R, 1).
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _merge_in_bags(x, size, unmerged, src, dst)
    rows, num_tokens, width = x.shape
    num_kept, r = unmerged.shape[1], src.shape[1]
    num_out = num_tokens - r
    row = torch.arange(rows, device=x.device)[:, None]
    odd = torch.arange(1, num_tokens, 2, device=x.device).expand(rows, -1)
    # One gather by whole rows; the same by `gather` costs five times as much on a CPU.
    taken = (torch.cat([2 * unmerged, odd], dim=1) + num_tokens * row).flatten()  # (B * (N - R),)
    x, size = x.reshape(rows * num_tokens, width), size.reshape(rows * num_tokens, 1)
    out, out_size = x.index_select(0, taken), size.index_select(0, taken)

    source, into = (2 * src + num_tokens * row).flatten(), (2 * dst + 1 + num_tokens * row).flatten()  # (B * R,)
    place = (num_kept + dst + num_out * row).flatten()
    precise = torch.promote_types(x.dtype, torch.float32)
    src_size = size.index_select(0, source)
    weighted = x.index_select(0, source).to(precise) * src_size  # (B * R, C)
    total = x.index_select(0, into).to(precise) * size.index_select(0, into)
    same = dst[:, :, None] == dst[:, None, :]  # (B, R, R): sources that share their partner
    if torch.compiler.is_compiling():  # sources are added up before their B token here
        total = total + _sum_groups(same, weighted.view(rows, r, width)).flatten(0, 1)
    else:
        first = r - (same * torch.arange(r, 0, -1, device=x.device)).amax(dim=-1)  # (B, R): the first one of them
        first = (first + r * row).flatten()
        total = _accumulate(total, first, weighted).index_select(0, first)
    new_size = size.index_select(0, into) + (same * src_size.view(rows, 1, r)).sum(dim=-1).view(-1, 1)  # exact
    # Sources of one token write the same row, so their order does not matter.
    out = out.index_copy_(0, place, (total / new_size).to(out.dtype))
    out_size = out_size.index_copy_(0, place, new_size)
    return out.view(rows, num_out, width), out_size.view(rows, num_out, 1)


def _merge_in_bags(x: Tensor, size: Tensor, unmerged: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Merge on a CPU, where PyTorch has the whole of it as one pass: each output token is a bag of weighted rows.

    The weights are s_i / S_d, so the division is rounded before the sum and not behind it; a copy is still exact.
    """
    rows, num_tokens, width = x.shape
    num_kept, r = unmerged.shape[1], src.shape[1]
    num_out = num_tokens - r
    odd, out = torch.arange(1, num_tokens, 2), torch.arange(num_out)
    first = torch.cat([2 * unmerged, odd.expand(rows, -1)], dim=1)  # (B, N - R): what each bag begins with
    into, order = dst.sort(dim=1, stable=True)  # sources of one token stay by rank
    source, place = (2 * src).gather(1, order), num_kept + into  # (B, R)
    # The bags lie one behind the other, so the k-th source has place + 1 first tokens and k sources before it.
    start = out + torch.searchsorted(place, out.expand(rows, -1).contiguous())  # (B, N - R)
    slot = place + torch.arange(1, r + 1)
    first_size, source_size = size[..., 0].gather(1, first), size[..., 0].gather(1, source)
    out_size = first_size.scatter_add(1, place, source_size)

    tokens = first.new_empty(rows, num_tokens).scatter_(1, start, first).scatter_(1, slot, source)
    precise = out_size.to(x.dtype)
    share = x.new_empty(rows, num_tokens).scatter_(1, start, first_size.to(x.dtype) / precise)  # 1 where none merges
    share.scatter_(1, slot, source_size.to(x.dtype) / precise.gather(1, place))
    row = num_tokens * torch.arange(rows)[:, None]
    merged = F.embedding_bag(
        (tokens + row).flatten(),
        x.reshape(rows * num_tokens, width),
        (start + row).flatten(),
        mode="sum",
        per_sample_weights=share.flatten(),
    )
    return merged.view(rows, num_out, width), out_size[..., None]


def _sum_groups(same: Tensor, weighted: Tensor) -> Tensor:
    """Sum the sources (B, R, C) that share a partner, without atomics, in a form that the compiler makes fast."""
    if weighted.device.type != "cpu":
        return (same[..., None] * weighted[:, None]).sum(dim=2)  # fuses
    with torch.autocast("cpu", enabled=False):  # would round to bfloat16
        return same.to(weighted.dtype) @ weighted  # the other is not vectorised


def _accumulate(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    if total.device.type == "cpu":
        return total.index_add_(0, index, rows)  # one after the other
    return total.index_put_((index,), rows, accumulate=True)  # sorted on CUDA, where index_add_ is atomic


class _MergeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, unmerged: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
        merged, merged_size = merge_reference(x, size, unmerged, src, dst)
        ctx.save_for_backward(size, merged_size, unmerged, src, dst)
        ctx.mark_non_differentiable(merged_size)
        return merged, merged_size

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        size, merged_size, unmerged, src, dst = ctx.saved_tensors
        rows, num_tokens = size.shape[:2]
        positions = merged_positions(Matching(unmerged, src, dst, size, num_tokens))
        num_out = merged_size.shape[1]
        flat = (positions + num_out * torch.arange(rows, device=size.device)[:, None]).flatten()
        share = size.reshape(-1, 1) / merged_size.reshape(-1, 1).index_select(0, flat)
        gathered = grad.reshape(rows * num_out, grad.shape[2]).index_select(0, flat)
        return (gathered * share).to(grad.dtype).view(rows, num_tokens, -1), None, None, None, None


def _differentiable_reference(x: Tensor, size: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
    # torch does not type Function.apply.
    return cast(tuple[Tensor, Tensor], _MergeFunction.apply(x, size, *match[:3]))  # type: ignore[no-untyped-call]


def _merge(
    x: Tensor,
    residual: Tensor | None,
    size: Tensor,
    match: Matching,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None,
    op: str,
) -> MergedTokens:
    _check(x, residual, size, match)
    if _choose(op, x, residual, weight, bias, backend) == "triton":
        merged, normed, merged_size, log_size, _ = _merge_op(x, residual, size, *match[:3], weight, bias, eps)
        return MergedTokens(merged, None if weight is None else normed, merged_size.detach(), log_size.detach())
    if residual is not None:
        x = x + residual
    if match.src_idx.shape[1] > 0:
        x, size = _differentiable_reference(x, size, match)
    normed = None if weight is None else _layer_norm(x, weight, bias, eps)
    return MergedTokens(x, normed, size, size[..., 0].log())


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if weight.dtype != x.dtype:
        return F.layer_norm(x.float(), weight.shape, weight.float(), None if bias is None else bias.float(), eps).to(
            x.dtype
        )
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(x.dtype)  # autocast would return float32


def _check(x: Tensor, residual: Tensor | None, size: Tensor, match: Matching) -> None:
    if x.shape[1] != match.num_tokens:
        raise ValueError(
            f"merge_tokens: got {x.shape[1]} tokens, want the {match.num_tokens} the matching was built for"
        )
    if size.shape != (*x.shape[:2], 1):
        raise ValueError(f"size: got shape {tuple(size.shape)}, want {(*x.shape[:2], 1)}, one number for each token")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, want that of x, {tuple(x.shape)}")
    if match.src_idx.shape[0] != x.shape[0]:
        raise ValueError(f"match: got {match.src_idx.shape[0]} rows, want the {x.shape[0]} of x")


def _choose(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, backend: str | None
) -> str:
    reason = dtype_reason({"x": x, "residual": residual, "weight": weight, "bias": bias})
    if x.shape[2] > MAX_KERNEL_WIDTH:
        reason = f"tokens wider than {MAX_KERNEL_WIDTH} do not fit the kernel"
    return choose(op, device=x.device, reason_against=reason, backend=backend)


@torch.library.custom_op("aurora::merge_tokens", mutates_args=())
def _merge_op(
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
    from aurora.kernels.merge_triton import launch_merge

    with on_device(x):
        return launch_merge(x, residual, size, unmerged, src, dst, weight, bias, eps)


@_merge_op.register_fake
def _merge_shapes(
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
    return merge_outputs(x, residual, src.shape[1], weight)


def merge_outputs(
    x: Tensor, residual: Tensor | None, r: int, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate what the merge kernel writes: x, its LayerNorm (empty without a weight), size, log(size), positions."""
    rows, num_tokens, width = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    merged = x.new_empty((rows, num_tokens - r, width), dtype=dtype)
    return (
        merged,
        merged.new_empty((0,)) if weight is None else torch.empty_like(merged),
        x.new_empty((rows, num_tokens - r, 1), dtype=torch.float32),
        x.new_empty((rows, num_tokens - r), dtype=torch.float32),
        x.new_empty((rows, num_tokens), dtype=torch.int32),
    )


@torch.library.custom_op("aurora::merge_tokens_backward", mutates_args=())
def _merge_backward_op(
    grad: Tensor,
    grad_normed: Tensor | None,
    merged: Tensor | None,
    weight: Tensor | None,
    size: Tensor,
    merged_size: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from aurora.kernels.merge_triton import launch_merge_backward

    with on_device(grad):
        return launch_merge_backward(grad, grad_normed, merged, weight, size, merged_size, positions, eps)


@_merge_backward_op.register_fake
def _merge_backward_shapes(
    grad: Tensor,
    grad_normed: Tensor | None,
    merged: Tensor | None,
    weight: Tensor | None,
    size: Tensor,
    merged_size: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    affine = [grad.new_empty((0 if weight is None else grad.shape[2],), dtype=torch.float32) for _ in range(2)]
    return grad.new_empty((*size.shape[:2], grad.shape[2])), affine[0], affine[1]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, size, _, _, _, weight, bias, ctx.eps = inputs
    merged, _, merged_size, _, positions = output
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (x, residual, weight, bias))
    ctx.save_for_backward(size, merged_size, positions, weight, None if weight is None else merged)


def _merge_backward(ctx: Any, grad: Tensor, grad_normed: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    size, merged_size, positions, weight, merged = ctx.saved_tensors
    wanted = None if weight is None else grad_normed
    dx, dweight, dbias = _merge_backward_op(grad, wanted, merged, weight, size, merged_size, positions, ctx.eps)
    x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
    return (
        dx.to(x_dtype),
        None if residual_dtype is None else dx.to(residual_dtype),
        *(None,) * 4,
        None if weight_dtype is None else dweight.to(weight_dtype),
        None if bias_dtype is None else dbias.to(bias_dtype),
        None,
    )


_merge_op.register_autograd(_merge_backward, setup_context=_save_for_backward)
