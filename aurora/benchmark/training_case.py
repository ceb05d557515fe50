"""What suite=training trains: captioners of two sizes on TinyWorld, by our loop and by transformers.

Both start from the same weights and take the same batches: `num_frames` frames of a clip, a question and its short
caption, which is learned. Shape letters: B rows, T positions of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from aurora.benchmark.llava import transformers_llava
from aurora.captioning import BUNDLED_MODEL
from aurora.checkpoint.pretrained import load_model
from aurora.data.collate import Batch, collate
from aurora.data.conversation import IGNORE_INDEX
from aurora.data.datasets import Sample
from aurora.data.tinyworld.language import Category, caption_prompts, captions
from aurora.data.tinyworld.render import render_clip
from aurora.data.tinyworld.scene import sample_scene
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergeConfig, Schedule
from aurora.model.vision import Activation, VisionConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.chat import build_prompt, tokenize_prompt
from aurora.processing.image import ImageConfig
from aurora.processing.text import Tokenizer
from aurora.training.build import prepare_model
from aurora.training.config import Objective, Precision, StageConfig
from aurora.training.conversations import AnswerLoss
from aurora.training.distributed import World
from aurora.training.frames_task import PixelTable
from aurora.training.init import init_llama, init_tower
from aurora.training.loop import WholeBatch, start_learning, train_step
from aurora.training.optim import LRSchedule, OptimConfig, build_optimizer
from aurora.training.scaler import autocast

VOCABULARY = 1032
"""Tokens of aurora-tiny and eight more, of which the last is the placeholder."""
PEER = "transformers LLaVA"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the batches it learns."""

    vision: VisionConfig
    text: LlamaConfig
    num_rows: int
    """Clips of a step."""
    num_frames: int
    """Frames of a clip."""
    lr: float = 1e-3
    """Peak learning rate."""
    pretrained: bool = False
    """Start from the weights of aurora-tiny; what these lack is drawn."""

    @property
    def config(self) -> AuroraConfig:
        """Of the whole model; its placeholder is inside the vocabulary, so that an export adds no rows."""
        return AuroraConfig(vision=self.vision, text=self.text, image_token_index=VOCABULARY - 1)


def _tower(width: int, layers: int, patch: int, side: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_layers=layers, num_heads=max(2, width // 64),
        patch_size=patch, image_size=side, hidden_act=Activation.quick_gelu,
    )  # fmt: skip


def _text(width: int, layers: int) -> LlamaConfig:
    heads = max(2, width // 64)
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=8 * width // 3, num_layers=layers,
        num_heads=heads, num_kv_heads=heads, max_seq_len=4096,
    )  # fmt: skip


CASES = {
    # ViT-S/16 at 224 px before a decoder of 4 M parameters: the tower has four fifths of the arithmetic.
    "encoder": Case(vision=_tower(384, 12, 16, 224), text=_text(256, 4), num_rows=1, num_frames=12),
    # aurora-tiny, 144 patches a frame, on clips it has not seen; it describes them with facts from their frames, where
    # a model from nothing would for these steps learn the language alone.
    "llava": Case(
        vision=VisionConfig(
            hidden_size=128, intermediate_size=512, num_layers=7, num_heads=4, patch_size=8, image_size=96
        ),
        text=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_layers=4,
            num_heads=3,
            num_kv_heads=3,
            max_seq_len=2048,
        ),
        num_rows=4,
        num_frames=2,
        lr=3e-4,
        pretrained=True,
    ),
    "quick": Case(vision=_tower(32, 4, 8, 48), text=_text(48, 2), num_rows=2, num_frames=2),
}
"""By name."""
FIRST_CLIP = 20_000
"""Behind the clips aurora-tiny has learned from."""


def merge_of(side: str) -> MergeConfig:
    """Return the merging that the name of a side says: kept ratio and schedule, such as `0.2 linear`."""
    ratio, schedule = side.split()
    return MergeConfig(token_kept_ratio=float(ratio), schedule=Schedule[schedule])


def schedule_of(lr: float) -> OptimConfig:
    """Return the published optimizer settings: 3 % warm-up, then a cosine to 0; no weight decay, norm at most 1."""
    return OptimConfig(
        lr=lr, schedule=LRSchedule.cosine, warmup_share=0.03, final_lr_share=0.0,
        betas=[0.9, 0.999], weight_decay=0.0, clip_norm=1.0,
    )  # fmt: skip


class Trainer(Protocol):
    """One way to train a model."""

    optimizer: AdamW
    """Its groups have `lr_scale`, as `build_optimizer` makes them."""

    def step(self, batch: Batch) -> float:
        """Do an optimizer step; returns its loss, the mean over the learned tokens."""
        ...

    def loss(self, batch: Batch) -> float:
        """Return the loss of a batch."""
        ...


def build_model(case: Case, seed: int, device: torch.device) -> AuroraModel:
    """Draw a model, or what aurora-tiny lacks of it; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model = AuroraModel(case.config)
    init_tower(model.vision_tower)
    init_llama(model.language_model)
    if case.pretrained:
        own = model.state_dict()
        for name, weight in load_model(BUNDLED_MODEL).state_dict().items():
            own[name][: len(weight)].copy_(weight)  # the vocabulary is a little larger here
    return model.to(device)


def batches(case: Case, split: str, device: torch.device, *, first: int = 0) -> Iterator[Batch]:
    """Yield batches without end: clips of TinyWorld in the order of their seeds, one caption each."""
    tokenizer = Tokenizer.from_pretrained(BUNDLED_MODEL)
    image = ImageConfig()
    pixels = PixelTable(image.mean, image.std)
    seed = first
    while True:
        samples = [_sample(case, split, number, tokenizer, pixels) for number in range(seed, seed + case.num_rows)]
        yield collate(samples, pad_id=0).to(device)
        seed += case.num_rows


def _sample(case: Case, split: str, seed: int, tokenizer: Tokenizer, pixels: PixelTable) -> Sample:
    scene = sample_scene(seed, split)
    prompt = build_prompt(caption_prompts(Category.short)[0], case.num_frames)
    question = tokenize_prompt(prompt, tokenizer, case.config.image_token_index)
    answer = [*tokenizer.encode(captions(scene, seed)[Category.short]), tokenizer.eos_id]
    frames = render_clip(scene, num_frames=case.num_frames, image_size=case.vision.image_size)
    clip = pixels(np.asarray(frames)[None])[0]
    labels = [IGNORE_INDEX] * len(question) + answer
    return Sample(question + answer, labels, clip, "video", len(labels), f"{split}:{seed}")


class Ours(WholeBatch):
    """A captioner in the training loop of this repository."""

    def __init__(self, model: AuroraModel, merge: MergeConfig, lr: float, precision: Precision) -> None:
        """Take over `model`."""
        self._stage = StageConfig(
            objective=Objective.conversations, precision=precision, merge=merge, packing=False,
            optim=schedule_of(lr),
        )  # fmt: skip
        self.module: nn.Module = prepare_model(model, self._stage)
        self._learner = AnswerLoss(model, merge=merge, row_length=None)
        self._world = World(device=model.device)
        self._learning = start_learning(self, self._stage)
        self.optimizer = self._learning.optimizer
        self._batch: Batch | None = None

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the mean over the learned tokens."""
        total: Tensor = self._learner(batch).loss
        return total / (batch.labels[:, 1:] != IGNORE_INDEX).sum()

    def losses(self, step: int, world: World) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """Yield the loss of the batch at hand."""
        assert self._batch is not None
        yield self.loss_of(self._batch), {}

    def validate(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def merge_by(self, merge: MergeConfig) -> None:
        """Merge otherwise from now on."""
        self._learner.merge = merge

    def step(self, batch: Batch) -> float:
        """Do one step of the loop."""
        self._batch = batch
        return train_step(self._learning, self._stage, step=0, world=self._world)["loss"]

    def loss(self, batch: Batch) -> float:  # type: ignore[override]
        """Return the loss of a batch."""
        self.module.eval()
        with torch.no_grad(), autocast(self._stage.precision, self._world.device.type):
            return float(self.loss_of(batch))


class Peer:
    """transformers' LlavaForConditionalGeneration in the loop that its documentation shows."""

    def __init__(self, model: AuroraModel, lr: float, precision: Precision) -> None:
        """Build it with the weights of `model`, which stays as it is.

        Raises:
            ValueError: if transformers is not installed.
        """
        built = transformers_llava(AuroraForConditionalGeneration(model), model.device)
        if built is None:
            raise ValueError(f"{PEER}: transformers is not installed; pip install transformers")
        self.module: Any = built.requires_grad_(True)
        self._index = model.config.image_token_index
        self._patches = model.config.vision.grid_size**2
        self.optimizer = build_optimizer(self.module, schedule_of(lr))
        self._autocast: AbstractContextManager[Any] = autocast(precision, model.device.type)

    def step(self, batch: Batch) -> float:
        """Do one step."""
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def loss(self, batch: Batch) -> float:
        """Return the loss of a batch."""
        self.module.eval()
        with torch.no_grad():
            return float(self._loss(batch))

    def _loss(self, batch: Batch) -> Tensor:
        """It wants one placeholder for each patch."""
        rows = []
        for ids, labels, mask in zip(*batch[:3], strict=True):
            repeats = torch.where(ids == self._index, self._patches, 1)
            rows.append([x.repeat_interleave(repeats) for x in (ids, labels, mask.long())])
        ids, labels, mask = (
            nn.utils.rnn.pad_sequence([row[i] for row in rows], batch_first=True, padding_value=value)
            for i, value in enumerate((0, IGNORE_INDEX, 0))
        )
        frames = torch.cat([clip for clip in batch.pixel_values if clip is not None])
        with self._autocast:
            out = self.module(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=frames)
        loss: Tensor = out.loss
        return loss
