"""The decoder's matrix products for inference: linears with one input become one, in the layout that is fastest.

Decoding a token reads every weight once, so its time is the bandwidth the products reach. oneDNN's blocked layout, made
once, is twice as fast as PyTorch's own product in bfloat16, and its cost hardly grows from one row to five. In float32
that holds where PyTorch's product of one row runs on one thread; on Intel's processors it runs on all, and one or two
rows are a tenth faster with it. The layout is a copy, so it is made only where memory is plentiful; parameters stay
what they are, for saving and training. Weights that need no layout are joined without a copy: the parameters become
views of the joint one.

Shape letters: B rows, T positions, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aurora.kernels.linear import linear as multiply_linear
from aurora.model.int8 import Int8Linear
from aurora.model.linear import is_plain_linear


class Decoding(Enum):
    """How single tokens run on CUDA; elsewhere always directly."""

    direct = "direct"
    """Started kernel by kernel from Python."""
    recorded = "recorded"
    """Recorded once as a CUDA graph."""
    compiled = "compiled"
    """Also fused by torch.compile before: faster, after a minute of compiling for each number of rows and bucket."""


Product = Callable[[Tensor], Tensor]
"""Maps (B, T, I) to (B, T, O); O counts the outputs of all the linears, side by side."""

SHARE_OF_MEMORY = 0.25
"""Of the free memory, what rearranged copies may take."""
_ROWS_PACKED_FOR = 4
"""Rows that oneDNN is told to expect; its layouts for 1, 4 and 16 measured too close to tell apart on a busy box."""


_FEW_ROWS = 2
"""Rows up to which MKL's product beats the blocked layout (measured: Xeon, 2 threads, widths 576 to 3072)."""


class LayerProducts(NamedTuple):
    """Products of one decoder layer."""

    qkv: Product
    """Queries, keys, values."""
    o: Product
    """Output of attention."""
    gate_up: Product
    """Gate and up projection."""
    down: Product
    """Down projection."""


class InferenceProducts:
    """Products of a whole decoder, made when they are first needed and again when a weight has changed.

    A copy of it, and what pickle makes of it, is empty: a copied model makes its own.
    """

    def __init__(self) -> None:
        self.layers: list[LayerProducts] = []
        self.head: Product | None = None
        self.steps: dict[object, object] = {}
        """What decoding has recorded with these weights; see `aurora.generation.graphs`."""
        self.warmup_s = 0.0
        """Seconds spent so far on what later calls find done: arranging weights, recording steps."""
        self._marks: list[object] = []

    def __reduce__(self) -> tuple[type[InferenceProducts], tuple[()]]:
        """Nothing of it is worth copying."""
        return InferenceProducts, ()

    @property
    def ready(self) -> bool:
        """Whether they were made; not whether they still hold."""
        return self.head is not None

    def clear(self) -> None:
        """Free the copies, and what was recorded."""
        self.layers, self.head, self._marks = [], None, []
        self.steps.clear()

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Count what runs inside as warm-up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.warmup_s += time.perf_counter() - start

    def refresh(self, layers: Sequence[Sequence[Sequence[nn.Module]]], head: nn.Module) -> None:
        """Make the products, unless those there are hold.

        Args:
            layers: For each decoder layer its groups of linears, in the order of `LayerProducts`.
            head: Output head: a linear, or the input embedding it is tied to.
        """
        linears = [linear for groups in layers for group in groups for linear in group] + [head]
        marks = [_mark(linear) for linear in linears]
        if self.ready and marks == self._marks:
            return
        self.clear()
        # Tensors made in inference mode could never be trained.
        with self.warming_up(), torch.inference_mode(False), torch.no_grad():
            copy = _copies_fit(linears)
            self.layers = [LayerProducts(*(_product(group, copy=copy) for group in groups)) for groups in layers]
            self.head = _product([head], copy=copy)
        self._marks = [_mark(linear) for linear in linears]


def _product(linears: Sequence[nn.Module], *, copy: bool) -> Product:
    """One product for linears of one input."""
    int8 = [linear for linear in linears if type(linear) is Int8Linear and _unobserved(linear)]
    if len(int8) == len(linears):
        return (int8[0] if len(int8) == 1 else Int8Linear.stacked(int8)).forward
    if not all(map(_is_plain, linears)):
        return _side_by_side(linears)
    if copy and all(map(_packable, linears)):
        return _packed(linears)
    if len(linears) > 1 and _weight(linears[0]).device.type == "cuda":
        return _joined(linears)
    return _side_by_side(linears)


def _packed(linears: Sequence[nn.Module]) -> Product:
    """Weights (O, I) in oneDNN's blocked layout."""
    weights = [_weight(linear) for linear in linears]
    whole = weights[0].detach() if len(weights) == 1 else torch.cat(weights)
    packed = torch.ops.mkldnn._reorder_linear_weight(whole.contiguous(), _ROWS_PACKED_FOR)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        out: Tensor = multiply(x, packed, None, "none", [], "")
        return out

    if whole.dtype is not torch.float32 or not _has_threaded_gemv():
        return product
    few = _joined(linears)
    return lambda x: few(x) if x.shape[0] * x.shape[1] <= _FEW_ROWS else product(x)


def _joined(linears: Sequence[nn.Module]) -> Product:
    """One weight whose rows the parameters become views of, so that no weight is held twice."""
    weights = [_weight(linear) for linear in linears]
    if len(weights) == 1:
        return lambda x: multiply_linear(x, weights[0])
    whole = torch.cat(weights)
    for weight, view in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = view
    return lambda x: multiply_linear(x, whole)


def _side_by_side(linears: Sequence[nn.Module]) -> Product:
    if len(linears) > 1:
        return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)
    (linear,) = linears
    if isinstance(linear, nn.Embedding):
        return lambda x: multiply_linear(x, linear.weight)
    return linear


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _unobserved(linear: nn.Module) -> bool:
    return not (linear._forward_hooks or linear._forward_pre_hooks)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a product with its weight is all that a module does."""
    if type(linear) is nn.Embedding:  # a tied head
        return True
    return is_plain_linear(linear) and linear.bias is None and _unobserved(linear)


def _packable(linear: nn.Module) -> bool:
    weight = _weight(linear)
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


@functools.cache
def _has_threaded_gemv() -> bool:
    """Whether MKL multiplies one float32 row on all threads: it does on the processors of its maker."""
    try:
        vendor = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return vendor and torch.backends.mkl.is_available()


def _copies_fit(linears: Sequence[nn.Module]) -> bool:
    plain = [_weight(linear) for linear in linears if _is_plain(linear) and _packable(linear)]
    free = free_memory_bytes()
    return bool(plain) and (free is None or sum(w.numel() * w.element_size() for w in plain) <= SHARE_OF_MEMORY * free)


def _mark(linear: nn.Module) -> object:
    """What differs once a module computes something else.

    Versions count in-place changes, but not those through `.data`; a few of the numbers give most of these away.
    """
    weight = _weight(linear)
    version = 0 if weight.is_inference() else weight._version
    observed = not _unobserved(linear)
    if weight.device.type != "cpu" or not _is_plain(linear):  # no copies of these exist
        return id(linear), weight.data_ptr(), weight.dtype, observed
    rows, columns = (max(1, size // 16) for size in weight.shape)
    sample = weight.detach()[::rows, ::columns].float().sum().item()
    return id(linear), weight.data_ptr(), weight.dtype, observed, version, sample


def free_memory_bytes() -> int | None:
    """Memory this process could still take on Linux, within its container's limit; None where it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no limit, or another kind of group
        return free
