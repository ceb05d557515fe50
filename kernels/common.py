"""What every kernel file shares: is Triton here, is it interpreted, which tile sizes, which tensors it takes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Triton is installed; it is imported only when a kernel is about to run."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Triton runs its kernels as NumPy programs on the CPU. Read once: Triton decides it for each kernel at its import."""

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types that the kernels load; all arithmetic is float32."""


def autotune(configs: Sequence[Any], key: Sequence[str]) -> Callable[[Any], Any]:
    """Choose tile sizes by timing on a device; take the first config where nothing can be timed.

    The interpreter has no driver to time with, and `triton.autotune` with more than one config fails there.

    Args:
        configs: At most 8 `triton.Config`; they may differ in nothing that changes the order of a reduction.
        key: Kernel arguments that select a new choice: widths, types and flags, never a token count.

    Returns:
        A decorator for a `triton.jit` kernel.
    """
    import triton

    if not 1 <= len(configs) <= 8:
        raise ValueError(f"autotune: got {len(configs)} configs, want 1 to 8")
    decorate: Callable[[Any], Any] = triton.autotune(
        configs=list(configs[:1] if INTERPRETED else configs), key=list(key)
    )
    return decorate


def dtype_reason(tensors: Mapping[str, Tensor | None]) -> str | None:
    """Say which of the named tensors has a type that no kernel loads; None if all are fine."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, kernels take float32, float16 and bfloat16"
    return None


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of x the current one: Triton launches there, wherever its arguments are."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def with_dense_rows(x: Tensor) -> Tensor:
    """Return x, or a copy whose last dimension has stride 1; the other strides are the kernels' business."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()
