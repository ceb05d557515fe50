"""A linear layer that multiplies by whatever is fastest on its device; see `aurora.kernels.linear`."""

from __future__ import annotations

from torch import Tensor, nn

from aurora.kernels.linear import linear


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more, unlike those of quantised weights or adapters."""
    return type(module) in (nn.Linear, Linear)


class Linear(nn.Linear):
    """`nn.Linear`, with the same parameters and results."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return linear(input, self.weight, self.bias)
