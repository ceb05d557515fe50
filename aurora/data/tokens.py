"""Conversations as ids and labels for all samples at once, in memory or on disk.

Everything about a sample but its pixels: where its record stands, its kind, ids, which of them are learned, and how
long it is with its visual tokens. On disk it is a folder of `.npy` files that are mapped, not read; its name is a
digest of all they depend on, so a changed file, tokenizer or setting never meets a stale cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aurora.data.conversation import IGNORE_INDEX, EncodedConversation, encode_conversation
from aurora.data.records import (
    KINDS,
    DataConfig,
    DataError,
    Mistake,
    Place,
    Placeholders,
    Record,
    read_source,
)
from aurora.data.shards import Media
from aurora.processing.chat import IMAGE_TOKEN, TextEncoder

FORMAT = 1
"""Counts up when the meaning of the files changes."""
FrameTokens: TypeAlias = Callable[[int, int, int], Sequence[int]]
"""(num_frames, height_px, width_px) -> visual tokens of each frame."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """All samples, in the order of sources and lines; N samples, K ids in all."""

    ids: NDArray[np.int32]
    """Ids of all samples in a row, (K,)."""
    learned: NDArray[np.bool_]
    """Whether an id is learned, (K,)."""
    starts: NDArray[np.int64]
    """First id of each sample, and K; (N + 1,)."""
    lengths: NDArray[np.int64]
    """Positions of each sample with its visual tokens, (N,)."""
    kinds: NDArray[np.int64]
    """Index in `KINDS`, (N,)."""
    sources: NDArray[np.int64]
    """Source of each sample, (N,)."""
    places: NDArray[np.int64]
    """Line, first byte and bytes of each record, (N, 3)."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.kinds)

    def place(self, index: int) -> Place:
        """Return where a record stands."""
        return Place(*(int(value) for value in self.places[index]))

    def encoded(self, index: int) -> EncodedConversation:
        """Return a sample's ids and labels."""
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        ids = self.ids[span].astype(np.int64)
        return EncodedConversation(ids.tolist(), np.where(self.learned[span], ids, IGNORE_INDEX).tolist())


_COLUMNS = tuple(field.name for field in fields(TokenTable))


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Turns a record into ids, labels and a length."""

    tokenizer: TextEncoder
    """Of the model."""
    config: DataConfig
    """`max_length`, `num_frames`, `placeholders`."""
    image_token_index: int
    """Id of a placeholder."""
    frame_template: str
    """Text of one frame."""
    frame_tokens: FrameTokens
    """Visual tokens of a clip's frames."""
    image_size: int
    """Edge of a frame where its shape is not known yet, pixels."""

    def expected_shape(self, record: Record) -> tuple[int, int, int]:
        """Return frames, height and width of a record's pixels as far as it can be known without decoding."""
        num_frames = len(record.frames) if record.video is None else self.config.num_frames
        return num_frames, self.image_size, self.image_size

    def encode(self, record: Record, shape: tuple[int, int, int]) -> tuple[EncodedConversation, int]:
        """Encode a record.

        Args:
            record: The record.
            shape: Frames, height and width of its pixels; 0 frames for text.

        Returns:
            Ids and labels, cut to `max_length`, and the length with visual tokens.

        Raises:
            ValueError: if placeholders and frames do not agree, or the cut leaves nothing to learn.
        """
        num_frames = shape[0]
        found = record.num_placeholders
        messages = record.conversations
        if found == 1 and num_frames > 1 and self.config.placeholders is Placeholders.frame:
            messages = [_spread(message, num_frames) for message in messages]
            found = num_frames
        if found not in (num_frames, min(1, num_frames)):
            raise ValueError(f"{found} placeholders for the {num_frames} frames there are, want 1 or {num_frames}")
        encoded = encode_conversation(
            messages,
            self.tokenizer,
            image_token_index=self.image_token_index,
            frame_template=self.frame_template,
        )
        widths = list(self.frame_tokens(*shape)) if num_frames else []
        return self._cut(encoded, widths if found == num_frames else [sum(widths)])

    def _cut(self, encoded: EncodedConversation, widths: list[int]) -> tuple[EncodedConversation, int]:
        """Keep what fits, where the placeholders take `widths` positions each."""
        ids, labels = encoded
        rest = iter(widths)
        length = kept = 0
        for token_id in ids:
            width = next(rest) if token_id == self.image_token_index else 1
            if length + width > self.config.max_length:
                break
            length, kept = length + width, kept + 1
        if next(rest, None) is not None or all(label == IGNORE_INDEX for label in labels[:kept]):
            raise ValueError(
                f"data.max_length={self.config.max_length}: {sum(widths)} visual tokens and the question leave no room "
                "for an answer; want a longer limit, fewer frames or a lower kept ratio"
            )
        return EncodedConversation(ids[:kept], labels[:kept]), length

    def digest(self, files: Sequence[Path]) -> str:
        """Return the name of all that ids depend on: files, tokenizer, settings, visual tokens."""
        config, size = self.config, self.image_size
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        widths = [list(self.frame_tokens(count, size, size)) for count in (1, config.num_frames)]
        what = [FORMAT, stats, config.max_length, config.num_frames, config.placeholders.value, config.check_media]
        what += [self.image_token_index, self.frame_template, widths, fingerprint(self.tokenizer)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def fingerprint(tokenizer: TextEncoder) -> str:
    """Return a digest of a tokenizer's files; of one without files, of what it makes of a sentence."""
    found = hashlib.sha256()
    save = getattr(tokenizer, "save_pretrained", None)
    if save is None:
        found.update(repr([tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode("A fox, 12 dogs\n\u00e9?")]).encode())
        return found.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        for file in sorted(Path(folder).iterdir()):
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def build_table(sources: Sequence[tuple[Path, Media]], encoder: Encoder) -> TokenTable:
    """Read, check and tokenise all records.

    Args:
        sources: Files of records with their media.
        encoder: Makes ids.

    Returns:
        The table.

    Raises:
        DataError: if there are mistakes; it lists them, at most `max_mistakes`.
        ValueError: if a file cannot be read.
    """
    config = encoder.config
    mistakes: list[Mistake] = []
    ids, learned, starts = array("i"), bytearray(), array("q", [0])
    lengths, kinds, numbers, places = array("q"), array("q"), array("q"), array("q")
    for number, (path, media) in enumerate(sources):
        found = read_source(
            path,
            num_frames=config.num_frames,
            exists=media.exists if config.check_media else None,
            mistakes=mistakes,
            max_mistakes=config.max_mistakes,
        )
        before = len(kinds)
        for place, record in found:
            try:
                encoded, length = encoder.encode(record, encoder.expected_shape(record))
            except ValueError as error:
                mistakes.append(Mistake(f"{path}:{place.line}", str(error)))
                if len(mistakes) >= config.max_mistakes:
                    break
                continue
            ids.extend(encoded.input_ids)
            learned.extend(label != IGNORE_INDEX for label in encoded.labels)
            starts.append(len(ids))
            lengths.append(length)
            kinds.append(KINDS.index(record.kind))
            numbers.append(number)
            places.extend(place)
        if len(mistakes) >= config.max_mistakes:
            break
        if len(kinds) == before and not mistakes:
            mistakes.append(Mistake(f"{path}:1", "no record in the file, want at least one"))
    if mistakes:
        raise DataError(mistakes, bounded=len(mistakes) >= config.max_mistakes)
    return TokenTable(
        ids=np.frombuffer(ids, np.int32),
        learned=np.frombuffer(bytes(learned), np.bool_),
        starts=np.frombuffer(starts, np.int64),
        lengths=np.frombuffer(lengths, np.int64),
        kinds=np.frombuffer(kinds, np.int64),
        sources=np.frombuffer(numbers, np.int64),
        places=np.frombuffer(places, np.int64).reshape(-1, 3),
    )


def load_or_build(sources: Sequence[tuple[Path, Media]], encoder: Encoder) -> tuple[TokenTable, bool]:
    """Return the table from `cache_dir` if it is there, else build it and, with a `cache_dir`, write it.

    Args:
        sources: As `build_table`.
        encoder: As `build_table`.

    Returns:
        The table, and whether it came from disk.

    Raises:
        ValueError: as `build_table`.
    """
    if encoder.config.cache_dir is None:
        return build_table(sources, encoder), False
    for path, _ in sources:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; want a .jsonl or .json file of conversations")
    folder = Path(encoder.config.cache_dir).expanduser() / f"tokens-{encoder.digest([path for path, _ in sources])}"
    if folder.is_dir():
        return load_table(folder), True
    table = build_table(sources, encoder)
    save_table(table, folder)
    return load_table(folder), False


def save_table(table: TokenTable, folder: Path) -> None:
    """Write a table as a folder that appears complete or not at all; one that another rank wrote first stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name in _COLUMNS:
            np.save(beside / f"{name}.npy", getattr(table, name))
        beside.chmod(0o755)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_table(folder: str | os.PathLike[str]) -> TokenTable:
    """Map a table.

    Args:
        folder: What `save_table` wrote.

    Raises:
        ValueError: if a file is missing or broken.
    """
    try:
        columns = [np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in _COLUMNS]
    except (OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(folder)}: not a whole token cache ({error}); remove it") from None
    return TokenTable(*columns)


def _spread(message: Mapping[str, Any], num_frames: int) -> Mapping[str, Any]:
    """Write the one placeholder of a clip out as one for every frame."""
    return {**message, "value": message["value"].replace(IMAGE_TOKEN, IMAGE_TOKEN * num_frames)}
