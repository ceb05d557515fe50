"""An exponential moving average of the weights that learn, for validation and export."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """One averaged copy of each parameter with `requires_grad`, in its own dtype and with its own sharding."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start at the present weights.

        Args:
            module: What learns.
            decay: Share of the average that stays at each step, in (0, 1).
        """
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}
        """Parameter name -> average."""

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights by 1 - decay."""
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter.detach(), 1.0 - self.decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the module hold the averages for the time of a `with`."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._copy(self.tensors)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
