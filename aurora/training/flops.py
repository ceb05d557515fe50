"""Floating-point operations of the model in a training step, by arithmetic: 2 for each multiply-add of a product.

Recomputed activations, the matching of tokens and elementwise work are not counted, so utilisation is that of the
model (Chowdhery et al., 2022, appendix B). A backward pass costs the forward once for the inputs' gradients and once
for the weights'. Letters: N tokens of a frame, T positions of a row, C width, I width of an MLP.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from aurora.model.captioner import AuroraConfig
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergePlan
from aurora.model.vision import VisionConfig


class FlopCounter:
    """Operations of a model whose trainable parts are settled."""

    def __init__(self, model: nn.Module, config: AuroraConfig) -> None:
        """Look at what learns.

        Args:
            model: An `AuroraModel`, frozen where it is to be.
            config: Its configuration.
        """
        self._config = config
        learns = [
            any(parameter.requires_grad for parameter in model.get_submodule(part).parameters())
            for part in ("vision_tower", "projector", "language_model")
        ]
        # Forward, gradients of the weights, and of the inputs where something before learns.
        self._factors = [1 + learns[i] + any(learns[: i + 1]) for i in range(3)]

    def step(self, plans: Iterable[Sequence[MergePlan]], lengths: Iterable[int], num_targets: int) -> float:
        """Return the operations of a forward and backward pass.

        Args:
            plans: Plan of each frame of each clip.
            lengths: Positions of each conversation, visual tokens included.
            num_targets: Positions with a label, the only ones with logits.
        """
        config = self._config
        tower = projector = 0.0
        per_token = 2.0 * config.text.hidden_size * (config.vision.hidden_size + config.text.hidden_size)
        for plan in (plan for clip in plans for plan in clip):
            tower += tower_flops(config.vision, plan)
            projector += per_token * plan.num_visual_tokens
        decoder = sum(decoder_flops(config.text, length) for length in lengths)
        decoder += 2.0 * config.text.hidden_size * config.text.vocab_size * num_targets
        return sum(factor * part for factor, part in zip(self._factors, (tower, projector, decoder), strict=True))


def tower_flops(config: VisionConfig, plan: MergePlan) -> float:
    """Return the operations of the vision tower's forward for one frame."""
    C, prefix = config.hidden_size, config.num_prefix_tokens
    total = 2.0 * plan.num_patches * C * config.num_channels * config.patch_size**2
    for before, after in zip(plan.tokens[:-1], plan.tokens[1:], strict=True):
        N = prefix + before
        total += 8.0 * N * C**2 + 4.0 * N**2 * C  # projections, attention
        total += 4.0 * (prefix + after) * C * config.intermediate_size
    return total


def decoder_flops(config: LlamaConfig, length: int) -> float:
    """Return the operations of the decoder layers' forward for one conversation of T = `length` positions."""
    C, kv = config.hidden_size, config.num_kv_heads * config.head_dim
    products = 2.0 * C * (2 * C + 2 * kv + 3 * config.intermediate_size)
    attention = 2.0 * (length + 1) * C  # the causal half of the scores, and of their product with the values
    return config.num_layers * length * (products + attention)
