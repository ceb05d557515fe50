"""Projector from the width of the vision tower to the width of the language model: linear, activation, linear."""

from dataclasses import dataclass

from torch import Tensor, nn

from aurora.model.linear import Linear
from aurora.model.vision import Activation, activate


@dataclass(kw_only=True, slots=True)
class ProjectorConfig:
    """The projector's own choices; its widths come from its neighbours."""

    hidden_act: Activation = Activation.gelu
    """Activation between the two layers; released weights use the exact gelu."""


class Projector(nn.Module):
    """Two-layer MLP, applied to each visual token alone."""

    def __init__(self, vision_size: int, text_size: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.linear_1 = Linear(vision_size, text_size)
        self.linear_2 = Linear(text_size, text_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map visual tokens (..., C_vision) to (..., C_text)."""
        return self.linear_2(activate(self.linear_1(x), self.activation))
