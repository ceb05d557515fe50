"""The whole captioner on a user's conversations about images and videos, with token merging inside the step.

The loss of a step is the mean over all learned tokens of all its conversations. It is put together from micro-batches,
packed rows and ranks, which change nothing: the number of learned tokens is counted before the first forward.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aurora.data.collate import Batch, PackedRows, collate, pack_rows, plan_packs
from aurora.data.conversation import IGNORE_INDEX
from aurora.data.datasets import ConversationData, Sample
from aurora.data.loader import BatchLoader
from aurora.data.records import KINDS
from aurora.generation.engine import generate
from aurora.generation.sampling import SamplingConfig
from aurora.kernels.cross_entropy import linear_cross_entropy
from aurora.model.captioner import AuroraModel
from aurora.model.merge import MergeConfig, MergePlan
from aurora.model.splice import Spliced
from aurora.processing.processor import AuroraProcessor
from aurora.training.config import StageConfig, ValidationConfig
from aurora.training.distributed import World, gathered, release
from aurora.training.flops import FlopCounter

_VALIDATION_BATCH = 4


class Learned(NamedTuple):
    """A micro-batch after its forward pass."""

    loss: Tensor
    """Sum of the token losses, float32 scalar."""
    plans: list[tuple[MergePlan, ...]]
    """Of each clip, the plan of each frame."""
    lengths: list[int]
    """Positions of each conversation, visual tokens included."""


class AnswerLoss(nn.Module):
    """The forward pass of a micro-batch: what FSDP gathers and frees around."""

    def __init__(self, model: AuroraModel, *, merge: MergeConfig, row_length: int | None) -> None:
        """Wrap `model`.

        Args:
            model: The captioner.
            merge: How visual tokens merge.
            row_length: Pack conversations into rows of so many positions; None keeps one row each.
        """
        super().__init__()
        self.model = model
        self.merge, self.row_length = merge, row_length

    def forward(self, batch: Batch, *, run_tower: bool = False) -> Learned:
        """Return the summed loss of the answers.

        Args:
            batch: Conversations.
            run_tower: Run the tower on an empty frame if no conversation has any, so that every rank has gradients
                for the same parameters.
        """
        model = self.model
        clips = batch.clips
        visual = model.encode(clips, merge=self.merge) if clips is not None else None
        spliced = model.splice(batch.input_ids, visual, attention_mask=batch.attention_mask, labels=batch.labels)
        if run_tower and visual is None:
            # Into the embeddings, not the loss: gradients must flow through the same layers on every rank.
            spliced = spliced._replace(inputs_embeds=spliced.inputs_embeds + self._nothing())
        rows, mask = self._rows(spliced)
        assert rows.labels is not None
        hidden = model.language_model.hidden(
            rows.inputs_embeds,
            position_ids=rows.position_ids,
            attention_mask=mask,
            key_bias=rows.key_bias,
        )  # (R, L, C)
        targets = rows.labels[:, 1:].flatten()
        mean = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), model.language_model.head_weight, targets)
        loss = mean * int((targets != IGNORE_INDEX).sum())
        lengths = [int(count) for count in spliced.attention_mask.sum(dim=1)]
        return Learned(loss, [] if visual is None else visual.plans, lengths)

    def _rows(self, spliced: Spliced) -> tuple[Spliced | PackedRows, Tensor | None]:
        """Pack conversations where that saves rows; also return the mask, None where the causal rule is all."""
        lengths = [int(count) for count in spliced.attention_mask.sum(dim=1)]
        if self.row_length is not None and len(plan_packs(lengths, self.row_length)) < len(lengths):
            packed = pack_rows(spliced, self.row_length)
            return packed, packed.attention_mask
        return spliced, None if min(lengths) == max(lengths) else spliced.attention_mask

    def _nothing(self) -> Tensor:
        """Return zero times what the tower sees in an empty frame."""
        vision = self.model.config.vision
        frame = torch.zeros(1, 1, vision.num_channels, vision.image_size, vision.image_size, device=self.model.device)
        return 0.0 * self.model.encode(frame, merge=self.merge).frames[0][0].sum()


class ConversationTask:
    """Batches of conversations, a pure function of the step."""

    def __init__(
        self,
        learner: AnswerLoss,
        data: ConversationData,
        processor: AuroraProcessor,
        stage: StageConfig,
        *,
        seed: int,
        held_out: ConversationData | None = None,
        validation: ValidationConfig | None = None,
    ) -> None:
        """Learn `learner.model` on `data`.

        Args:
            learner: The captioner with its loss, frozen and sharded as it is to be.
            data: What is learned.
            processor: Of the model.
            stage: Batch and micro-batches.
            seed: Of the data's order, and of dropout.
            held_out: Conversations to validate on.
            validation: How many of them.
        """
        self.module: nn.Module = learner.model
        self.processor = processor
        self._learner, self._model, self._data, self._stage, self._seed = learner, learner.model, data, stage, seed
        self._held_out, self._validation = held_out, validation or ValidationConfig()
        self._flops = FlopCounter(learner.model, learner.model.config)
        self._batches: Iterator[list[Sample]] | None = None
        self._next_step = -1

    @property
    def data_digest(self) -> str:
        """Name of the samples and their order: a run that goes on with another would be another run."""
        table = self._data.table
        digest = hashlib.sha256(repr([s.weight for s in self._data.config.all_sources().values()]).encode())
        digest.update(str(self._data.config.group_batches).encode())
        for column in (table.ids, table.learned, table.starts, table.lengths, table.kinds, table.sources):
            digest.update(column.tobytes())
        return digest.hexdigest()[:16]

    def num_steps(self, num_epochs: float) -> int:
        """Return the optimizer steps of so many passes over the data."""
        return self._data.num_steps(self._stage.batch_size, num_epochs)

    def losses(self, step: int, world: World) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """Yield the loss of each micro-batch, with tokens, visual tokens and operations."""
        samples = self._read(step, world)
        [num_targets] = world.sum([sum(_num_targets(sample) for sample in samples)])
        indices = self._data.sampler.batch(step, self._stage.batch_size, seed=self._seed)
        has_visuals = any(KINDS[int(self._data.table.kinds[index])] != "text" for index in indices)
        # Dropout is a function of step and rank, so that resuming needs no state of each rank.
        torch.manual_seed((self._seed * 1_000_003 + step) * 8192 + world.rank)
        for part in cut(samples, self._stage.accumulation_steps):
            batch = collate(part, self._model.config.pad_token_id).to(world.device)
            found: Learned = self._learner(batch, run_tower=has_visuals and world.size > 1)
            work = {
                "tokens": float(sum(found.lengths)),
                "visual_tokens": float(sum(plan.num_visual_tokens for clip in found.plans for plan in clip)),
                "flops": self._flops.step(found.plans, found.lengths, sum(map(_num_targets, part))),
            }
            yield found.loss * (world.size / num_targets), work

    def validate(self) -> dict[str, float]:
        """Mean loss over the learned tokens of held-out conversations."""
        if self._held_out is None:
            return {}
        total, count = 0.0, 0
        rows = range(min(self._validation.num_samples, len(self._held_out)))
        for start in range(0, len(rows), _VALIDATION_BATCH):
            samples = [self._held_out[index] for index in rows[start : start + _VALIDATION_BATCH]]
            batch = collate(samples, self._model.config.pad_token_id).to(self._model.device)
            total += float(self._learner(batch).loss)
            count += sum(map(_num_targets, samples))
        release(self._learner)
        return {"loss": total / count}

    def samples(self) -> list[str]:
        """Answer the first questions of held-out conversations greedily; each answer stands behind its `file:line`."""
        if self._held_out is None:
            return []
        count = min(self._validation.num_captions, len(self._held_out))
        with gathered(self._learner):
            shown = [self._held_out[index] for index in range(count)]
            return [f"{sample.where}: {self._answer(sample)}" for sample in shown]

    def _answer(self, sample: Sample) -> str:
        first = next(i for i, label in enumerate(sample.labels) if label != IGNORE_INDEX)
        model = self._model
        ids = torch.tensor([sample.input_ids[:first]], device=model.device)
        is_shown = model.config.image_token_index in sample.input_ids[:first]
        clip = sample.pixel_values if is_shown and sample.pixel_values is not None else None
        with torch.inference_mode():
            visual = None if clip is None else model.encode([clip.to(model.device)], merge=self._learner.merge)
            prompt = model.splice(ids, visual, padding_side="left")
            sampling = SamplingConfig(temperature=0.0, max_new_tokens=self._validation.max_new_tokens)
            written = generate(model, prompt, sampling).sequences[0]
        return self.processor.decode(written).strip()

    def _read(self, step: int, world: World) -> list[Sample]:
        """Return this rank's conversations of a step; those of the next ones are decoded meanwhile."""
        if self._batches is None or step != self._next_step:
            self._batches = iter(
                BatchLoader(
                    self._data,
                    batch_size=self._stage.batch_size,
                    start_step=step,
                    rank=world.rank,
                    world_size=world.size,
                    seed=self._seed,
                )
            )
        self._next_step = step + 1
        return next(self._batches)


def cut(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """Cut samples into `count` micro-batches of like size, or as many as there are samples."""
    count = min(count, len(samples))
    bounds = [round(i * len(samples) / count) for i in range(count + 1)]
    return [list(samples[start:end]) for start, end in pairwise(bounds)]


def _num_targets(sample: Sample) -> int:
    """Positions that are predicted: labelled ones behind the first."""
    return sum(label != IGNORE_INDEX for label in sample.labels[1:])
