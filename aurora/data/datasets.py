"""Conversations with their pixels: what a training step reads.

The order of samples is the sampler's, a pure function of the step. A sample whose medium cannot be decoded is replaced
by the next readable one of its kind: a function of the data alone, so a resumed run replaces it by the same.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from aurora.data.records import KINDS, DataConfig, Record, read_record
from aurora.data.sampler import BatchSampler
from aurora.data.shards import Media, open_media
from aurora.data.tokens import Encoder, FrameTokens, TokenTable, load_or_build
from aurora.processing.chat import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, TextEncoder
from aurora.processing.image import AuroraImageProcessor, load_image
from aurora.processing.video import load_visual

_MIN_ATTEMPTS = 200
"""Reads after which the share of failures among them counts as the data's own."""


class _ChangedError(ValueError):
    """A file of records is no longer what was opened: no sample of it can be trusted."""


class Sample(NamedTuple):
    """One conversation, ready for a batch."""

    input_ids: list[int]
    """Ids with a placeholder for each frame, or one for the clip."""
    labels: list[int]
    """The same ids where an answer is learned, else -100."""
    pixel_values: Tensor | None
    """Normalised frames, (F, 3, H, W) float32; None for text."""
    kind: str
    """text, image or video."""
    length: int
    """Positions with the visual tokens in place."""
    where: str
    """`file:line` of its record."""


class ConversationData:
    """Every sample of all sources by number, and the batch of every step."""

    def __init__(
        self,
        encoder: Encoder,
        table: TokenTable,
        sources: Sequence[tuple[Path, Media]],
        image_processor: AuroraImageProcessor,
        *,
        weights: Sequence[float],
        report: Callable[[str], None] | None = None,
        from_cache: bool = False,
    ) -> None:
        """Combine what `open_data` has opened.

        Args:
            encoder: Makes ids where frames turn out to be others than expected.
            table: Ids of all samples.
            sources: Files of records with their media.
            image_processor: Frames to pixels.
            weights: Of each source in an epoch.
            report: Takes one line for each unreadable sample; by default it goes to stderr.
            from_cache: Whether the ids were read from disk.
        """
        self.config = encoder.config
        self.table = table
        self.from_cache = from_cache
        self.unreadable: dict[int, str] = {}
        """Sample -> what was wrong with its medium, of those met so far."""
        self._encoder, self._sources, self._image_processor = encoder, list(sources), image_processor
        self._report = report or (lambda line: print(line, file=sys.stderr, flush=True))
        self._attempts = 0
        self._lock = threading.Lock()
        sizes = np.bincount(table.sources, minlength=len(sources)).tolist()
        self.sampler = BatchSampler(
            sizes, weights, table.kinds, table.lengths, group_batches=encoder.config.group_batches
        )
        self._same_kind = [np.flatnonzero(table.kinds == kind) for kind in range(len(KINDS))]

    def __len__(self) -> int:
        """Return the number of samples, each counted once."""
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample, or the next readable one of its kind.

        Raises:
            IndexError: if there is no such sample.
            ValueError: if too many are unreadable, or a file of records has changed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index}: want 0 to {len(self) - 1}")
        same = self._same_kind[int(self.table.kinds[index])]
        first = int(np.searchsorted(same, index))
        for offset in range(len(same)):
            candidate = int(same[(first + offset) % len(same)])
            if candidate not in self.unreadable and (sample := self._try(candidate)) is not None:
                return sample
        kind = KINDS[int(self.table.kinds[index])]
        raise ValueError(f"data: not one sample of kind {kind} is readable; the first: {self.unreadable[index]}")

    def where(self, index: int) -> str:
        """Return `file:line` of a sample."""
        return f"{self._sources[int(self.table.sources[index])][0]}:{self.table.place(index).line}"

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> list[Sample]:
        """Return the samples of one step, or a rank's share of them; a pure function of its arguments.

        Args:
            step: From 0.
            batch_size: Samples of the step over all ranks, a multiple of `world_size`.
            rank: This rank.
            world_size: Ranks; another number shares out the same batches.
            seed: Of the order.

        Raises:
            ValueError: as indexing, or if the batch does not divide.
        """
        indices = self.sampler.batch(step, batch_size, rank=rank, world_size=world_size, seed=seed)
        return [self[index] for index in indices]

    def num_steps(self, batch_size: int, num_epochs: float = 1.0) -> int:
        """Return the steps of so many epochs, at least 1; the last one may reach into the next epoch."""
        return max(1, int(np.ceil(self.sampler.epoch_size * num_epochs / batch_size)))

    def problem(self, index: int) -> str | None:
        """Decode one sample without replacing or counting it; return what is wrong with it, or None."""
        try:
            self._read(index)
        except (ValueError, OSError) as error:
            return f"{self.where(index)}: {error}"
        return None

    def _try(self, index: int) -> Sample | None:
        """Decode a sample; note it as unreadable and return None if that fails."""
        try:
            sample = self._read(index)
        except _ChangedError:
            raise
        except (ValueError, OSError) as error:
            self._note(index, f"{self.where(index)}: {error}")
            return None
        with self._lock:
            self._attempts += 1
        return sample

    def _read(self, index: int) -> Sample:
        """Decode a sample."""
        path, media = self._sources[int(self.table.sources[index])]
        try:
            record = read_record(path, self.table.place(index), num_frames=self.config.num_frames)
        except ValueError as error:
            raise _ChangedError(str(error)) from None
        encoded, length = self.table.encoded(index), int(self.table.lengths[index])
        pixels = None
        if record.kind != "text":
            pixels = load_pixels(record, media, self._image_processor, self.config.num_frames)
            shape = (pixels.shape[0], pixels.shape[2], pixels.shape[3])
            if shape != self._encoder.expected_shape(record):  # a short clip, or a frame that keeps its shape
                encoded, length = self._encoder.encode(record, shape)
        return Sample(encoded.input_ids, encoded.labels, pixels, record.kind, length, self.where(index))

    def _note(self, index: int, line: str) -> None:
        """Count and report an unreadable sample once; stop if there are too many."""
        with self._lock:
            self._attempts += 1
            if index in self.unreadable:
                return
            self.unreadable[index] = line
            count, limit = len(self.unreadable), self.config.max_unreadable_share
            many_here = self._attempts >= _MIN_ATTEMPTS and count > limit * self._attempts
            too_many = count > limit * len(self) or many_here
        if too_many:
            tried = f"{len(self)} samples" if not many_here else f"the {self._attempts} samples read so far"
            raise ValueError(
                f"data: {count} of {tried} are unreadable, data.max_unreadable_share={limit:g} allows "
                f"{int(limit * len(self))} of {len(self)}; the last: {line}"
            )
        self._report(f"unreadable sample ({count} so far), replaced: {line}")


def load_pixels(record: Record, media: Media, processor: AuroraImageProcessor, num_frames: int) -> Tensor:
    """Decode a record's image, list of frames or video.

    Args:
        record: It names a medium.
        media: Where that is.
        processor: Frames to pixels.
        num_frames: Frames taken of a video file; a shorter one gives all it has.

    Returns:
        (F, 3, H, W) float32.

    Raises:
        ValueError: if a file is missing or broken; the message names it as the record does.
    """
    name = ""
    local = None
    try:
        if record.video is not None:
            name = record.video
            with media.local(name) as local:
                return processor.preprocess_frames(load_visual(local, num_frames, strict=False).frames)
        images = []
        for name in record.frames:
            with media.local(name) as local:
                images.append(load_image(local))
        return processor(images)
    except ValueError as error:
        said = str(error)
        raise ValueError(said.replace(str(local), name) if local is not None else said) from None


def open_data(
    config: DataConfig,
    tokenizer: TextEncoder,
    image_processor: AuroraImageProcessor,
    *,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    frame_template: str = IMAGE_TOKEN,
    tokens_per_placeholder_fn: FrameTokens,
    report: Callable[[str], None] | None = None,
) -> ConversationData:
    """Open everything a configuration names, check every record and tokenise it, or read the ids from `cache_dir`.

    Args:
        config: Sources and settings.
        tokenizer: The model's.
        image_processor: Frames to pixels, with the aspect ratio that training uses.
        image_token_index: Id of a placeholder.
        frame_template: Text of one frame in a prompt.
        tokens_per_placeholder_fn: (num_frames, height_px, width_px) -> visual tokens of each frame, such as
            `lambda *shape: [plan.num_visual_tokens for plan in model.plan(*shape, merge)]`.
        report: See `ConversationData`.

    Returns:
        The data.

    Raises:
        DataError: a ValueError that lists every mistake with file and line.
        ValueError: if a file or media cannot be opened.
    """
    named = config.all_sources()
    sources: list[tuple[Path, Media]] = []
    for source in named.values():
        path = Path(source.path).expanduser()
        if not path.is_file():
            raise ValueError(f"{path}: no such file; want a .jsonl or .json file of conversations")
        sources.append((path, open_media(source.media, beside=path)))
    encoder = Encoder(
        tokenizer=tokenizer,
        config=config,
        image_token_index=image_token_index,
        frame_template=frame_template,
        frame_tokens=tokens_per_placeholder_fn,
        image_size=image_processor.config.image_size,
    )
    table, from_cache = load_or_build(sources, encoder)
    weights = [source.weight for source in named.values()]
    return ConversationData(
        encoder, table, sources, image_processor, weights=weights, report=report, from_cache=from_cache
    )
