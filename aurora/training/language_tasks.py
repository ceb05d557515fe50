"""The language side: the decoder on symbolic storyboards, and the whole captioner on rendered clips."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from aurora.data.tinyworld.language import storyboard
from aurora.data.tinyworld.scene import Scene, sample_scene
from aurora.model.captioner import AuroraModel
from aurora.model.llama import Llama
from aurora.model.merge import MergeConfig, Schedule
from aurora.training.bank import ClipBank
from aurora.training.distributed import World
from aurora.training.frames_task import PixelTable, freeze_unused, shuffled
from aurora.training.loop import WholeBatch
from aurora.training.turn_book import TurnBook
from aurora.training.turns import PackedTurns, Turn, exact_turns, pack_turns, turn_loss, turn_mask

_IMAGE = -1
_VALIDATION_BATCH = 8
_VALIDATION_CLIPS = 64
_LONG_TOKENS = 800
"""From here on the fused attention is faster on a CPU than the plain one (backward included), below it is slower."""


def turn_logits(decoder: Llama, prefix: Tensor, prefix_lengths: Sequence[int], packed: PackedTurns) -> Tensor:
    """Return the logits (B, S, V) of packed turns behind embedded prefixes (B, P, C), padded on the right."""
    B, P, _ = prefix.shape
    embeds = torch.cat([prefix, decoder.embed(packed.input_ids).to(prefix.dtype)], dim=1)
    positions = torch.cat([torch.arange(P).expand(B, P), packed.position_ids], dim=1)
    mask = turn_mask(prefix_lengths, P, packed.turn_index)
    S = packed.input_ids.shape[1]
    return decoder(embeds, position_ids=positions, attention_mask=mask, logits_to_keep=S)


def score_turns(turns: Sequence[Sequence[Turn]], right: Sequence[Sequence[bool]], totals: dict[str, list[int]]) -> None:
    """Add to `totals` (name -> [right, asked]) what `exact_turns` found."""
    for row, marks in zip(turns, right, strict=True):
        for turn, mark in zip(row, marks, strict=True):
            total = totals.setdefault(turn.name, [0, 0])
            total[0] += mark
            total[1] += 1


def accuracies(totals: dict[str, list[int]]) -> dict[str, float]:
    """Return the share of exact answers per question, and their mean."""
    scores = {name: right / asked for name, (right, asked) in totals.items()}
    return {"qa_mean": sum(scores.values()) / len(scores), **scores}


class StoryboardTask(WholeBatch):
    """The decoder learns from per-frame entity lists, each entity the sum of its word embeddings.

    The sum stands where a projected visual token will stand, which teaches comparing frames before any pixel is seen.
    """

    def __init__(
        self,
        decoder: Llama,
        book: TurnBook,
        *,
        batch_size: int,
        num_captions: int,
        num_frames: int,
        num_validation: int,
        seed: int,
    ) -> None:
        """Learn `decoder` on scenes drawn without end; validate on `num_validation` held-out ones."""
        self.module = decoder
        self._book, self._batch_size, self._num_captions = book, batch_size, num_captions
        self._num_frames, self._num_validation, self._seed = num_frames, num_validation, seed

    def loss(self, step: int, world: World) -> tuple[Tensor, dict[str, float]]:
        """Answer loss of this rank's storyboards; each scene is seen once."""
        first = self._seed * 10_000_000 + 1_000_000 + step * self._batch_size
        seeds = range(first + world.rank, first + self._batch_size, world.size)
        scenes = [sample_scene(seed) for seed in seeds]
        turns = [
            self._book.questions(scene, scene.seed)
            + self._book.captions(scene, scene.seed, num_captions=self._num_captions)
            for scene in scenes
        ]
        logits, packed = self._forward(scenes, turns)
        return turn_loss(logits, packed), {}

    def validate(self) -> dict[str, float]:
        """Share of questions answered exactly on held-out storyboards."""
        totals: dict[str, list[int]] = {}
        for start in range(0, self._num_validation, _VALIDATION_BATCH):
            seeds = range(start, min(start + _VALIDATION_BATCH, self._num_validation))
            scenes = [sample_scene(seed, "val") for seed in seeds]
            turns = [self._book.questions(scene, scene.seed) for scene in scenes]
            logits, packed = self._forward(scenes, turns)
            score_turns(turns, exact_turns(logits, packed), totals)
        return accuracies(totals)

    def _forward(self, scenes: Sequence[Scene], turns: list[list[Turn]]) -> tuple[Tensor, PackedTurns]:
        rows = [self._prefix_words(scene) for scene in scenes]
        lengths = [len(row) for row in rows]
        width = max(len(words) for row in rows for words in row)
        ids = torch.zeros(len(rows), max(lengths), width, dtype=torch.int64)
        present = torch.zeros(len(rows), max(lengths), width, 1)
        for b, row in enumerate(rows):
            for i, words in enumerate(row):
                ids[b, i, : len(words)] = torch.tensor(words)
                present[b, i, : len(words)] = 1.0
        prefix = (self.module.embed(ids) * present).sum(dim=2)  # (B, P, C)
        packed = pack_turns(turns, lengths, pad_id=0)
        return turn_logits(self.module, prefix, lengths, packed), packed

    def _prefix_words(self, scene: Scene) -> list[list[int]]:
        """Return the ids summed at each prefix position: one for text, an entity's words where a frame's tokens go."""
        frames = iter(storyboard(scene, scene.seed, num_frames=self._num_frames))
        row: list[list[int]] = []
        for i in self._book.prefix(_IMAGE):
            if i != _IMAGE:
                row.append([i])
                continue
            for words in next(frames):
                row.append([piece for word in words for piece in self._book.encode(word)])
        return row


class ClipsTask(WholeBatch):
    """The captioner on rendered clips: frames through the merging tower, projected, read by the decoder."""

    def __init__(
        self,
        model: AuroraModel,
        book: TurnBook,
        bank: ClipBank,
        validation: ClipBank,
        *,
        pixels: PixelTable,
        batch_size: int,
        num_captions: int,
        token_kept_ratios: Sequence[float],
        seed: int,
    ) -> None:
        """Learn `model` on `bank`."""
        self.module: nn.Module = model
        self._model, self._book, self._bank, self._validation, self._pixels = model, book, bank, validation, pixels
        self._batch_size, self._num_captions, self._seed = batch_size, num_captions, seed
        self._ratios = list(token_kept_ratios)
        self._backend = model.language_model.backend
        self._prefix = torch.tensor(book.prefix(model.config.image_token_index))
        freeze_unused(model.vision_tower, model.config.feature_layer)

    def loss(self, step: int, world: World) -> tuple[Tensor, dict[str, float]]:
        """Answer loss of this rank's clips at the kept ratio and schedule of `step`."""
        positions = range(step * self._batch_size + world.rank, (step + 1) * self._batch_size, world.size)
        rows = [shuffled(position, len(self._bank.frames), seed=self._seed) for position in positions]
        turns = []
        for row, position in zip(rows, positions, strict=True):
            scene, wording = sample_scene(row, self._bank.split), self._seed * 10_000_000 + position
            captions = self._book.captions(scene, wording, num_captions=self._num_captions)
            turns.append(self._book.questions(scene, wording) + captions)
        merge = self.merge_at(step)
        logits, packed = self._forward(self._bank, rows, turns, merge)
        loss = turn_loss(logits, packed)
        return loss, {f"loss@{merge.token_kept_ratio:g}": loss.item()} if merge.token_kept_ratio in (0.2, 1.0) else {}

    def merge_at(self, step: int) -> MergeConfig:
        """Return how step `step` merges: a drawn ratio, the schedules `constant` and `exact` taking turns."""
        ratio = random.Random(f"{self._seed}-{step}").choice(self._ratios)
        schedule = Schedule.constant if step % 2 == 0 else Schedule.exact
        return replace(self._model.config.merge, token_kept_ratio=ratio, schedule=schedule)

    def validate(self) -> dict[str, float]:
        """Share of questions that greedy decoding answers exactly on held-out clips at kept ratio 0.4."""
        totals: dict[str, list[int]] = {}
        merge = replace(self._model.config.merge, token_kept_ratio=0.4, schedule=Schedule.exact)
        num_clips = min(_VALIDATION_CLIPS, len(self._validation.frames))
        for start in range(0, num_clips, _VALIDATION_BATCH):
            rows = list(range(start, min(start + _VALIDATION_BATCH, num_clips)))
            turns = [self._book.questions(sample_scene(row, self._validation.split), row) for row in rows]
            logits, packed = self._forward(self._validation, rows, turns, merge)
            score_turns(turns, exact_turns(logits, packed), totals)
        return accuracies(totals)

    def _forward(
        self, bank: ClipBank, rows: list[int], turns: list[list[Turn]], merge: MergeConfig
    ) -> tuple[Tensor, PackedTurns]:
        pixel_values = self._pixels(bank.frames[rows])  # (B, F, 3, H, W)
        visual = self._model.encode(pixel_values, merge=merge)
        spliced = self._model.splice(self._prefix.expand(len(rows), -1), visual)
        lengths = [spliced.inputs_embeds.shape[1]] * len(rows)
        packed = pack_turns(turns, lengths, pad_id=self._model.config.pad_token_id)
        decoder = self._model.language_model
        is_long = lengths[0] + packed.input_ids.shape[1] > _LONG_TOKENS
        decoder.backend = "sdpa" if is_long else self._backend
        return turn_logits(decoder, spliced.inputs_embeds, lengths, packed), packed
