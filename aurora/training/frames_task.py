"""The vision tower on single frames, as CLIP came pre-trained: attributes from CLS, coverage from the patch tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora.model.vision import VisionTower
from aurora.training.bank import NUM_COVERAGES, SUB_CELLS, ClipBank
from aurora.training.distributed import World
from aurora.training.loop import WholeBatch

COVERAGE_WEIGHTS = (0.3, 1.0, 2.0, 1.0)
"""Loss weight of the coverage classes: the background fills most cells, a tiny object the fewest."""
PATCH_TASKS = {1: ("colour", "shape", "size"), 2: ("tiny_colour", "tiny_shape", "count")}
"""Coverage class -> attributes that every patch showing it must tell: the projector reads patches, not CLS."""
MIN_CELLS = 3
"""Cells of a coverage class, of 16, from which on a patch shows it."""
_VALIDATION_BATCH = 64


class FrameLogits(NamedTuple):
    """What the heads say of B frames of N patches."""

    attributes: dict[str, Tensor]
    """From CLS, each (B, classes)."""
    patches: dict[str, Tensor]
    """From the patch tokens, each (B, N, classes)."""
    coverage: Tensor
    """(B, N, 16, coverage classes)."""


class FrameLearner(nn.Module):
    """The tower with one linear head per attribute and a coverage head; the heads are thrown away afterwards."""

    def __init__(self, tower: VisionTower, tasks: Mapping[str, int], *, feature_layer: int) -> None:
        """Put heads on the tokens of `feature_layer`; blocks behind it do not learn."""
        super().__init__()
        width = tower.config.hidden_size
        self.feature_layer = feature_layer
        self.vision_tower = tower
        self.class_norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in tasks.items()})
        self.patch_norm = nn.LayerNorm(width)
        self.patch_heads = nn.ModuleDict(
            {name: nn.Linear(width, tasks[name]) for names in PATCH_TASKS.values() for name in names}
        )
        self.coverage = nn.Linear(width, SUB_CELLS * NUM_COVERAGES)
        freeze_unused(tower, feature_layer)

    def forward(self, pixel_values: Tensor) -> FrameLogits:
        """Return the logits of frames (B, 3, H, W)."""
        tokens = self.vision_tower(pixel_values, feature_layer=self.feature_layer).hidden  # (B, 1 + N, C)
        summary = self.class_norm(tokens[:, 0])
        patches = self.patch_norm(tokens[:, 1:])
        return FrameLogits(
            {name: head(summary) for name, head in self.heads.items()},
            {name: head(patches) for name, head in self.patch_heads.items()},
            self.coverage(patches).unflatten(-1, (SUB_CELLS, -1)),
        )


def freeze_unused(tower: VisionTower, feature_layer: int) -> None:
    """Freeze what features of `feature_layer` do not run through: later blocks and the final norm."""
    active = tower.config.num_layers + 1 + feature_layer
    for module in (*tower.blocks[active:], tower.norm_post):
        module.requires_grad_(False)


class FramesTask(WholeBatch):
    """Batches of single frames from a bank."""

    def __init__(
        self,
        learner: FrameLearner,
        bank: ClipBank,
        validation: ClipBank,
        *,
        pixels: "PixelTable",
        batch_size: int,
        seed: int,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Learn `learner` on `bank`.

        Raises:
            ValueError: if a weight names no attribute.
        """
        self.module = learner
        self._bank, self._validation, self._pixels = bank, validation, pixels
        self._batch_size, self._seed = batch_size, seed
        self._weights = dict.fromkeys((*learner.heads, "mask"), 1.0) | dict(task_weights or {})
        if unknown := sorted(set(self._weights) - set(learner.heads) - {"mask"}):
            raise ValueError(f"stage.task_weights={unknown}: want names among {', '.join(learner.heads)}, mask")

    def loss(self, step: int, world: World) -> tuple[Tensor, dict[str, float]]:
        """Weighted means of the attribute losses from CLS and from the patches, plus the coverage loss."""
        clips, frames = batch_frames(self._bank.frames.shape[:2], self._batch_size, seed=self._seed, step=step)
        clips, frames = clips[world.rank :: world.size], frames[world.rank :: world.size]
        logits: FrameLogits = self.module(self._pixels(self._bank.frames[clips, frames]))
        columns = torch.from_numpy(self._bank.targets[clips, frames].astype(np.int64)).unbind(dim=1)
        targets = dict(zip(logits.attributes, columns, strict=True))  # each (B,)
        masks = torch.from_numpy(self._bank.masks[clips, frames].astype(np.int64))  # (B, N, 16)
        losses = {name: F.cross_entropy(head.float(), targets[name]) for name, head in logits.attributes.items()}
        patch_losses = patch_attribute_losses(logits.patches, targets, masks)
        coverage = F.cross_entropy(
            logits.coverage.float().flatten(0, 2), masks.flatten(), weight=torch.tensor(COVERAGE_WEIGHTS)
        )
        attributes, patches = self._weighted_mean(losses), self._weighted_mean(patch_losses)
        numbers = {"attributes": attributes, "patches": patches, "mask": coverage, "shape": losses["shape"]}
        total = attributes + patches + self._weights["mask"] * coverage
        return total, {name: value.item() for name, value in numbers.items()}

    def validate(self) -> dict[str, float]:
        """Accuracy of every attribute on one frame of each held-out clip; positions count when at most one bin off."""
        rows = np.arange(len(self._validation.frames))
        frames = rows % self._validation.frames.shape[1]
        hits: dict[str, float] = {}
        for start in range(0, len(rows), _VALIDATION_BATCH):
            clips, times = rows[start : start + _VALIDATION_BATCH], frames[start : start + _VALIDATION_BATCH]
            logits: FrameLogits = self.module(self._pixels(self._validation.frames[clips, times]))
            targets = torch.from_numpy(self._validation.targets[clips, times].astype(np.int64))
            for i, (name, head) in enumerate(logits.attributes.items()):
                tolerance = 1 if name.endswith(("_x", "_y")) else 0
                near = (head.argmax(dim=1) - targets[:, i]).abs() <= tolerance
                hits[name] = hits.get(name, 0.0) + near.sum().item()
        scores = {name: count / len(rows) for name, count in hits.items()}
        return {"mean": sum(scores.values()) / len(scores), **scores}

    def _weighted_mean(self, losses: Mapping[str, Tensor]) -> Tensor:
        total = sum(self._weights[name] for name in losses)
        return torch.stack([self._weights[name] * value for name, value in losses.items()]).sum() / total


def patch_attribute_losses(
    logits: Mapping[str, Tensor], targets: Mapping[str, Tensor], masks: Tensor
) -> dict[str, Tensor]:
    """Return the mean cross-entropy of each patch attribute over the patches that show its object, 0 where none does.

    Args:
        logits: Attribute -> (B, N, classes).
        targets: Attribute -> class of each frame, (B,).
        masks: Coverage class of each cell, (B, N, 16).
    """
    losses = {}
    for coverage, names in PATCH_TASKS.items():
        shown = ((masks == coverage).sum(dim=-1) >= MIN_CELLS).float()  # (B, N)
        for name in names:
            expected = targets[name][:, None].expand_as(shown)
            each = F.cross_entropy(logits[name].float().transpose(1, 2), expected, reduction="none")  # (B, N)
            losses[name] = (each * shown).sum() / shown.sum().clamp_min(1.0)
    return losses


def batch_frames(shape: Sequence[int], batch_size: int, *, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return clips and frames of step `step`: every frame once per epoch, in an order given by (seed, epoch).

    Args:
        shape: Clips and frames of the bank.
        batch_size: Frames of a step.
        seed: Seed of the order.
        step: Step from 0.

    Returns:
        Clip rows and frame numbers, (batch_size,) each.
    """
    total = shape[0] * shape[1]
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    flat = np.array([shuffled(int(p), total, seed=seed) for p in positions])
    return flat // shape[1], flat % shape[1]


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


def shuffled(position: int, total: int, *, seed: int) -> int:
    """Return the item at `position` of an endless sequence of shuffled epochs over `total` items."""
    epoch, place = divmod(position, total)
    key = (seed, epoch, total)
    if key not in _ORDERS:
        if len(_ORDERS) > 3:
            _ORDERS.clear()
        _ORDERS[key] = np.random.default_rng([seed, epoch]).permutation(total)
    return int(_ORDERS[key][place])


class PixelTable:
    """uint8 frames to normalised pixels, as the image processor does for frames that have the right size already."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise with `mean` and `std` of pixels in [0, 1]."""
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, frames: np.ndarray) -> Tensor:
        """Map (..., H, W, 3) uint8 to (..., 3, H, W) float32."""
        pixels = torch.from_numpy(np.array(frames)).movedim(-1, -3).float() / 255.0
        return (pixels - self._mean) / self._std
