"""Cross-entropy of a linear head without its full logits, for training with large vocabularies.

    logits[n] = hidden[n] . weight^T,   loss = mean over labelled n of (logsumexp(logits[n]) - logits[n, label[n]])
    dlogits[n] = (softmax(logits[n]) - onehot(label[n])) dloss / number of labelled rows
    dhidden = dlogits weight,   dweight = dlogits^T hidden

Rows are taken in chunks; only one chunk's logits exist at a time, in the forward and, computed again, in the backward.
Rows without a label, in a caption most of them, are left out before any product. Plain PyTorch: the time is in matrix
products, which no kernel of ours would beat.

Precision contract: products in the type of the inputs, as the full head's would be (fp32 accumulation in them);
log-sum, loss and softmax in float32 (float64 for such inputs); `dweight` adds its chunks in that type and is rounded
once. Order is fixed, so results repeat bit for bit.

Shape letters: N rows, M labelled rows, C width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, chunk: int = 1024
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against labels, with at most `chunk` rows of logits in memory.

    Args:
        hidden: Inputs of the head, (N, C), any float dtype.
        weight: The head, (V, C), same dtype.
        labels: Class of each row, (N,) int64, each in [0, V) or `ignore_index`.
        ignore_index: Label of rows that do not count.
        chunk: Rows of logits at a time; at least 1.

    Returns:
        Scalar loss in float32 (float64 for float64 inputs); NaN if no row is labelled, as `F.cross_entropy` has it.

    Raises:
        ValueError: if shapes or types do not fit together, or chunk is below 1.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)}; want (N, C), (V, C), (N,)"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"linear_cross_entropy: got hidden {hidden.dtype} and weight {weight.dtype}, want one type")
    if chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk={chunk}: want at least 1")
    if torch.is_autocast_enabled(hidden.device.type):  # here, as the backward runs outside of it
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    loss: Tensor = _forward_op(hidden, weight, labels, ignore_index, chunk)[0]
    return loss


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Define `linear_cross_entropy` with all logits at once."""
    logits = hidden @ weight.T
    return torch.nn.functional.cross_entropy(_exact(logits), labels, ignore_index=ignore_index)


@torch.library.custom_op("aurora::linear_cross_entropy", mutates_args=())
def _forward_op(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Loss, and the log-sum of each row, (N,); 0 where there is no label."""
    rows = (labels != ignore_index).nonzero()[:, 0]  # (M,)
    losses = torch.zeros_like(labels, dtype=_sum_dtype(hidden.dtype))
    log_sums = torch.zeros_like(losses)
    for part in rows.split(chunk):
        logits = _exact(hidden[part] @ weight.T)  # (chunk, V)
        log_sums[part] = logits.logsumexp(dim=-1)
        losses[part] = log_sums[part] - logits.gather(1, labels[part, None])[:, 0]
    return losses.sum() / rows.shape[0], log_sums


@_forward_op.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int) -> tuple[Tensor, Tensor]:
    dtype = _sum_dtype(hidden.dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape[:1], dtype=dtype)


@torch.library.custom_op("aurora::linear_cross_entropy_backward", mutates_args=())
def _backward_op(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    log_sums: Tensor,
    ignore_index: int,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; empty where one is not wanted."""
    rows = (labels != ignore_index).nonzero()[:, 0]
    scale = dloss / max(1, rows.shape[0])
    dhidden = torch.zeros_like(hidden) if wants_hidden else hidden.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=log_sums.dtype) if wants_weight else weight.new_empty(0)
    for part in rows.split(chunk):
        inputs = hidden[part]  # (chunk, C)
        dlogits = _exact(inputs @ weight.T).sub_(log_sums[part, None]).exp_()  # (chunk, V)
        dlogits[torch.arange(len(part), device=part.device), labels[part]] -= 1.0
        rounded = dlogits.to(hidden.dtype)  # before the scale, with which small ones would vanish in float16
        if wants_hidden:
            dhidden[part] = (_exact(rounded @ weight) * scale).to(hidden.dtype)
        if wants_weight:
            dweight += rounded.T @ inputs
    return dhidden, (dweight * scale).to(weight.dtype)


@_backward_op.register_fake
def _(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    log_sums: Tensor,
    ignore_index: int,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if wants_weight else weight.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, labels, ctx.ignore_index, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, labels, output[1])


def _backward(ctx: Any, dloss: Tensor, _dlog_sums: Tensor) -> tuple[Tensor | None, ...]:
    wants_hidden, wants_weight = ctx.needs_input_grad[:2]
    dhidden, dweight = _backward_op(dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.chunk, wants_hidden, wants_weight)
    return dhidden if wants_hidden else None, dweight if wants_weight else None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _exact(logits: Tensor) -> Tensor:
    return logits.to(_sum_dtype(logits.dtype))
