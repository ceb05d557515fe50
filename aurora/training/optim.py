"""AdamW with per-module learning rates, and two schedules: warm-up, constant, linear decay; or warm-up, cosine."""

import math
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn
from torch.optim import AdamW


class LRSchedule(Enum):
    """How the learning rate falls after the warm-up."""

    linear = "linear"
    """Constant, then in a straight line over the last `decay_share` of the steps."""
    cosine = "cosine"
    """Half a cosine from the peak to the end."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning-rate schedule of one stage."""

    lr: float = 7e-4
    """Peak learning rate."""
    schedule: LRSchedule = LRSchedule.linear
    """linear | cosine: how the rate falls after the warm-up."""
    lr_scales: dict[str, float] | None = None
    """Module name prefix -> factor on the learning rate (`vision_tower: 0.43`); the longest matching prefix counts."""
    betas: list[float] | None = None
    """AdamW betas; [0.9, 0.98] when absent."""
    weight_decay: float = 0.05
    """Decoupled decay; one-dimensional parameters and embeddings are exempt."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""
    warmup_steps: int = 50
    """Steps from zero to the peak, at most a quarter of all."""
    warmup_share: float | None = None
    """Share of all steps from zero to the peak, instead of `warmup_steps`."""
    decay_share: float = 0.3
    """Share of all steps, at the end, over which the linear schedule falls."""
    final_lr_share: float = 0.03
    """Learning rate of the last step as a share of the peak."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr={self.lr}: want a positive number")
        for name in ("decay_share", "final_lr_share", "warmup_share"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"optim.{name}={value}: want a number in [0, 1]")
        if not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm={self.clip_norm}: want a positive number; inf clips nothing")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optim.weight_decay={self.weight_decay}: want 0 or a positive number")
        if self.betas is not None and not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"optim.betas={self.betas}: want two numbers in [0, 1)")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps={self.warmup_steps}: want 0 or more")


def lr_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the share of the peak learning rate that step `step` (from 0) of `num_steps` trains with."""
    warmup = min(config.warmup_steps, max(1, num_steps // 4))
    if config.warmup_share is not None:
        warmup = round(num_steps * config.warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule is LRSchedule.cosine:
        progress = (step - warmup) / max(1, num_steps - warmup)  # 0 .. 1
        return config.final_lr_share + (1.0 - config.final_lr_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay = max(1, round(num_steps * config.decay_share))
    remaining = num_steps - step  # num_steps .. 1
    if remaining > decay:
        return 1.0
    return config.final_lr_share + (1.0 - config.final_lr_share) * remaining / decay


def build_optimizer(module: nn.Module, config: OptimConfig) -> AdamW:
    """Group the trainable parameters by learning-rate factor and decay, in the order of `named_parameters`.

    Raises:
        ValueError: if nothing is trainable or a key of `lr_scales` matches no trainable parameter.
    """
    scales = config.lr_scales or {}
    used: set[str] = set()
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        prefixes = [prefix for prefix in scales if name.startswith(prefix)]
        used.update(prefixes)
        scale = scales[max(prefixes, key=len)] if prefixes else 1.0
        decays = parameter.ndim > 1 and "embed" not in name
        groups.setdefault((scale, decays), []).append(parameter)
    if not groups:
        raise ValueError("stage.trainable: no parameter is trainable; want at least one module name of the model")
    if unused := sorted(set(scales) - used):
        raise ValueError(f"optim.lr_scales={unused}: want prefixes of trainable parameters")
    betas = config.betas or [0.9, 0.98]
    return AdamW(
        [
            {"params": parameters, "lr_scale": scale, "weight_decay": config.weight_decay if decays else 0.0}
            for (scale, decays), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(betas[0], betas[1]),
        fused=True,
    )


def set_learning_rate(optimizer: AdamW, step: int, num_steps: int, config: OptimConfig) -> float:
    """Set each group's rate for `step` and return the rate of a group whose factor is 1."""
    lr = config.lr * lr_factor(step, num_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr
