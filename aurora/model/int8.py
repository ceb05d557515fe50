"""Linear layers with int8 weights: weight-only quantisation with one scale per output row.

Decoding one token reads every weight once, so its time is the bytes of the weights: int8 has a quarter of float32's.
The scale is a bfloat16 number, and the row is quantised with the rounded one, so that rounding it costs nothing and
PyTorch's packed int8 product, which wants scale and activations in bfloat16, computes with exactly these weights.

Shape letters: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127
"""Largest magnitude of a quantised weight; -128 is not used, so that the range is symmetric."""
PACKED_ROWS = 8
"""Most rows for which the packed product beats dequantising first (measured: CPU, 2 threads, widths 576 to 2048)."""
_ROWS_PER_STEP = 4096
# What the packed product assumes and does not check (PyTorch 2.13 reads past the end, or faults): rows of whole vectors
# of 16, weights that begin at 16 bytes, activations at 32.
_PACKED_INPUTS = 64
_ALIGNED_BYTES = 64
# A private operator: PyTorch may drop it. Then every product dequantises first, which is right and slower.
_HAS_PACKED = hasattr(torch, "_weight_int8pack_mm")


def row_scales(weight: Tensor) -> Tensor:
    """Scale of each row of a weight, (O, I) -> (O,) bfloat16: its largest magnitude becomes 127.

    Raises:
        ValueError: if a weight is NaN or infinite.
    """
    largest = weight.abs().amax(dim=1).float()
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("weight: holds NaN or infinite numbers, want finite ones to quantise")
    scale = (largest / LARGEST).to(torch.bfloat16)
    return torch.where(scale > 0, scale, 1)  # a row of zeros, or of numbers too small for bfloat16


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to int8, each row in steps of its own scale.

    Args:
        weight: (O, I), any float dtype.

    Returns:
        Rounded weight, (O, I) int8, and scales, (O,) bfloat16; the weight is about their product.

    Raises:
        ValueError: if a weight is NaN or infinite.
    """
    scale = row_scales(weight)
    rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    # By steps: a float32 copy of a large vocabulary is gigabytes.
    for start in range(0, len(weight), _ROWS_PER_STEP):
        rows = slice(start, start + _ROWS_PER_STEP)
        steps = weight[rows].float() / scale[rows, None].float()
        rounded[rows] = steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return rounded, scale


def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Multiply by a quantised weight: `(x @ weight.T) * weight_scale`.

    On a CPU the product is taken in bfloat16 with float32 sums whatever the dtype of x, for one row as for many: rows
    then do not depend on how many there are, and it is the fastest there is. On a GPU it is plain PyTorch in the dtype
    of x, which `torch.compile` fuses into a product that reads int8.

    Args:
        x: (..., I), any float dtype.
        weight: (O, I) int8, contiguous, on a CPU beginning at a multiple of 64 bytes (see `Int8Linear.from_tensors`).
        weight_scale: (O,) bfloat16, contiguous.

    Returns:
        (..., O) in x.dtype.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight.to(x.dtype)) * weight_scale.to(x.dtype)
    rows = x.to(torch.bfloat16)
    num_inputs = x.shape[-1]
    if _HAS_PACKED and num_inputs % _PACKED_INPUTS == 0 and x.numel() <= PACKED_ROWS * num_inputs:
        rows = rows.reshape(-1, num_inputs).contiguous()
        if rows.storage_offset() % _PACKED_INPUTS:
            rows = rows.clone()
        flat = torch._weight_int8pack_mm(rows, weight, weight_scale)
        if x.dtype is not torch.bfloat16:
            flat = flat.to(x.dtype)
        return flat.view(*x.shape[:-1], weight.shape[0])
    return (F.linear(rows, weight.to(torch.bfloat16)) * weight_scale).to(x.dtype)


def _aligned(weight: Tensor) -> Tensor:
    """The weight where the packed product can read it; one that is mapped from a file may begin anywhere."""
    fits = weight.device.type != "cpu" or weight.data_ptr() % _ALIGNED_BYTES == 0
    return weight.contiguous() if fits else weight.clone(memory_format=torch.contiguous_format)


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight is int8 with one scale per row; for inference."""

    weight: Tensor
    """(O, I) int8."""
    weight_scale: Tensor
    """(O,) bfloat16, in every dtype of the model."""

    def __init__(self, in_features: int, out_features: int, *, device: torch.device | str | None = None) -> None:
        """Make an empty layer.

        Args:
            in_features: I.
            out_features: O.
            device: Where the weight is.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.bfloat16, device=device))

    @classmethod
    def from_tensors(cls, weight: Tensor, weight_scale: Tensor) -> Int8Linear:
        """Wrap a quantised weight (O, I) and its scales (O,); a weight is copied only if it is not aligned."""
        layer = cls(weight.shape[1], weight.shape[0], device="meta")
        layer.weight, layer.weight_scale = _aligned(weight), weight_scale
        return layer

    @classmethod
    def from_weight(cls, weight: Tensor) -> Int8Linear:
        """Quantise a weight, (O, I); see `quantize_rows`."""
        return cls.from_tensors(*quantize_rows(weight.detach()))

    @classmethod
    def stacked(cls, layers: Sequence[Int8Linear]) -> Int8Linear:
        """One layer that computes what several with the same inputs do, side by side.

        One product of many rows is faster than several of few. The layers become views of the result, so no weight is
        held twice.

        Args:
            layers: Layers with the same number of inputs.

        Returns:
            A layer with all their outputs, in order.
        """
        whole = cls.from_tensors(
            torch.cat([layer.weight for layer in layers]), torch.cat([layer.weight_scale for layer in layers])
        )
        sizes = [layer.out_features for layer in layers]
        views = zip(layers, whole.weight.split(sizes), whole.weight_scale.split(sizes), strict=True)
        for layer, weight, scale in views:
            layer.weight, layer.weight_scale = weight, scale
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in x.dtype."""
        return int8_linear(x, self.weight, self.weight_scale)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as numbers, (O, I)."""
        return (self.weight.float() * self.weight_scale[:, None].float()).to(dtype)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Take what is loaded, aligned."""
        super()._load_from_state_dict(*args, **kwargs)
        self.weight = _aligned(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Move with the model, and keep the scales in bfloat16 where the model is cast to another dtype."""
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self
