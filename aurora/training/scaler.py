"""The forward pass's precision, and the loss scale that keeps float16 gradients from vanishing."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from aurora.training.config import Precision

_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def compute_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of matrix products in `precision`."""
    return _DTYPES.get(precision, torch.float32)


def autocast(precision: Precision, device_type: str = "cpu") -> Any:
    """Return the context in which a forward pass computes in `precision`."""
    return torch.autocast(device_type, dtype=_DTYPES[precision]) if precision in _DTYPES else nullcontext()


class LossScaler:
    """A dynamic loss scale: halved when a gradient overflows, doubled after a run of steps that did not.

    Powers of two, so that scaling changes no bit of a gradient that neither overflows nor vanishes.
    """

    GROWTH_INTERVAL = 1000
    """Good steps in a row after which the scale doubles (DeepSpeed's default window)."""

    def __init__(self, precision: Precision) -> None:
        """Start at 65536 for fp16; any other precision keeps 1."""
        self.enabled = precision is Precision.fp16
        self.scale = 65536.0 if self.enabled else 1.0
        self.good_steps = 0
        self.skipped_steps = 0

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if self.enabled and gradients:
            torch._foreach_mul_(list(gradients), 1.0 / self.scale)

    def update(self, *, is_finite: bool) -> bool:
        """Take note of a step's gradient.

        Args:
            is_finite: Whether loss and gradient norm were.

        Returns:
            Whether the optimizer may step; False where a smaller scale may cure the overflow.
        """
        if is_finite:
            self.good_steps += 1
            if self.enabled and self.good_steps % self.GROWTH_INTERVAL == 0:
                self.scale = min(self.scale * 2.0, 2.0**24)
            return True
        self.good_steps = 0
        self.skipped_steps += 1
        self.scale /= 2.0
        return False

    @property
    def may_skip(self) -> bool:
        """Whether a gradient that is not finite can be an overflow of the scale."""
        return self.enabled and self.scale > 1.0

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what a checkpoint kept."""
        self.scale = float(state["scale"])
        self.good_steps, self.skipped_steps = int(state["good_steps"]), int(state["skipped_steps"])
