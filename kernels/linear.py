"""Matrix products of float32 on a CPU: PyTorch's own, or oneDNN's where PyTorch's does not use the processor.

PyTorch multiplies float32 matrices by MKL, which keeps AVX-512 to the processors of its maker; on others that have it,
oneDNN, which PyTorch brings as well and takes for bfloat16, is twice as fast (EPYC of Zen 5, one and two threads, from
some ten thousand to billions of multiplications). Both sum in float32. Which one runs depends on the processor and the
shapes alone, so equal inputs give equal bits.

Only without autograd and outside of torch.compile, whose products are its own.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PRODUCTS = 2**22
"""Multiplications below which oneDNN's preparations cost more than it gains."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`.

    Args:
        x: Inputs, (..., I).
        weight: (O, I).
        bias: (O,); or None.

    Returns:
        (..., O).
    """
    if not _takes_onednn(x.numel() * weight.shape[0], x, weight, bias):
        return F.linear(x, weight, bias)
    return _multiply(x, weight, bias)


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the scalar products of all pairs of two sets of tokens.

    Args:
        queries: (B, A, C).
        keys: (B, S, C).

    Returns:
        (B, A, S).
    """
    rows, num_queries, _ = queries.shape
    num_products = num_queries * keys[0].numel() if rows else 0
    if not _takes_onednn(num_products, queries, keys):
        return queries @ keys.transpose(1, 2)
    out = queries.new_empty(rows, num_queries, keys.shape[1])
    for row in range(rows):  # a product of its own each, as oneDNN's linear has one weight
        out[row] = _multiply(queries[row], keys[row], None)
    return out


def _takes_onednn(num_products: int, *tensors: Tensor | None) -> bool:
    # Compiling comes first: a comparison would bind the code to this count of tokens.
    if torch.compiler.is_compiling() or not onednn_is_faster() or num_products < MIN_PRODUCTS:
        return False
    if torch._C._len_torch_dispatch_stack():  # whoever counts or records operators knows PyTorch's own
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        if type(tensor) not in (Tensor, torch.nn.Parameter) or (tensor.requires_grad and torch.is_grad_enabled()):
            return False
    return not torch.is_autocast_enabled("cpu") and bool(torch.backends.mkldnn.enabled)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 that MKL leaves alone, and PyTorch the product that uses it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
