"""Visual tokens put into text: what a placeholder stands for, and the positions and weights its tokens get.

A row of text holds one placeholder for each frame, or one for the whole clip, or none (text alone).

Shape letters: B rows, F frames, T text positions with placeholders, L positions after splicing, N visual tokens of a
frame, C width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.model.merge import MergeConfig, MergePlan, TextPositions, TextSizeBias
from aurora.model.vision import VisionTrace

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""


class VisualFeatures(NamedTuple):
    """Projected visual tokens of a batch of clips."""

    frames: list[list[Tensor]]
    """For each clip, for each frame, (N, C); a row without a clip has none."""
    plans: list[tuple[MergePlan, ...]]
    """For each clip, the plan of each frame."""
    traces: list[tuple[list[tuple[int, int]], VisionTrace]]
    """With trace=True: (clip, frame) of each row of a trace, and the trace; one entry per tower run."""
    sizes: list[list[Tensor]]
    """For each clip, for each frame, how many patches each token stands for, (N,) float32."""
    centres: list[list[Tensor]]
    """For each clip with text_positions=original, for each frame, the mean index of each token's patches, (N,)
    float32; of other clips nothing."""
    merges: list[MergeConfig]
    """For each clip, what was asked of merging."""

    @property
    def counts(self) -> list[list[int]]:
        """Visual tokens delivered, per clip and frame."""
        return [[frame.shape[0] for frame in clip] for clip in self.frames]

    def select(self, clips: Sequence[int]) -> VisualFeatures:
        """Take some of the clips, in this order, perhaps several times; without the traces."""
        return VisualFeatures(
            [self.frames[clip] for clip in clips],
            [self.plans[clip] for clip in clips],
            [],
            [self.sizes[clip] for clip in clips],
            [self.centres[clip] for clip in clips],
            [self.merges[clip] for clip in clips],
        )

    @classmethod
    def join(cls, parts: Sequence[VisualFeatures]) -> VisualFeatures:
        """Put the clips of several batches behind one another; without the traces."""
        return cls(
            [clip for part in parts for clip in part.frames],
            [plan for part in parts for plan in part.plans],
            [],
            [clip for part in parts for clip in part.sizes],
            [clip for part in parts for clip in part.centres],
            [merge for part in parts for merge in part.merges],
        )


class Spliced(NamedTuple):
    """Text with the visual tokens in place of their placeholders."""

    inputs_embeds: Tensor
    """(B, L, C); padding is zero."""
    attention_mask: Tensor
    """True where a token is, (B, L) bool."""
    position_ids: Tensor
    """(B, L) int64, counted over tokens alone; see `merge.text_positions`."""
    labels: Tensor | None
    """(B, L) int64; visual tokens and padding are ignored."""
    key_bias: Tensor | None
    """With text_size_bias=visual in any row: log of the patches per token, (B, L) float32, 0 for text."""
    next_position: Tensor
    """Position of the token behind each row, (B, 1) int64."""


class SplicedRow(NamedTuple):
    """One row before it is padded."""

    embeds: Tensor
    """(L, C)."""
    labels: Tensor
    """(L,) int64."""
    position_ids: Tensor
    """(L,) int64."""
    key_bias: Tensor | None
    """(L,) float32."""
    next_position: int
    """Position of the token behind the row."""


class _Frames(NamedTuple):
    """The visual tokens that take one placeholder's place."""

    embeds: Tensor
    position_ids: Tensor
    key_bias: Tensor
    num_positions: int


def check_placeholders(where: str, found: int, num_frames: int, *, text_alone: bool = True) -> None:
    """Check that a text says where its frames go: one placeholder for each, or one for all of them.

    Args:
        where: Which text, for the message, such as `row 0`.
        found: Placeholders in it.
        num_frames: Frames of its clip; 0 without a clip.
        text_alone: A text without placeholders is one without visual tokens; otherwise it is refused if there are
            frames.

    Raises:
        ValueError: with both counts.
    """
    if found == num_frames or (found == 1 and num_frames) or (found == 0 and text_alone):
        return
    placeholders = f"{found} placeholder" + "s" * (found != 1)
    frames = f"{num_frames} frame" + "s" * (num_frames != 1)
    raise ValueError(
        f"{where}: {placeholders} in the text for {frames}; want one placeholder per frame, or one for the whole clip"
    )


def splice_row(
    ids: Tensor, embeds: Tensor, labels: Tensor, visual: VisualFeatures | None, clip: int, placeholder: int
) -> SplicedRow:
    """Put the visual tokens of one clip into one row of text.

    Args:
        ids: Token ids with placeholders, (T,).
        embeds: Their embeddings, (T, C); those of placeholders are not used.
        labels: Target ids, (T,).
        visual: The clips; None if there is none.
        clip: Which one belongs to this row.
        placeholder: Its id.

    Returns:
        The row; the number of placeholders was checked before.
    """
    where = (ids == placeholder).nonzero()[:, 0].tolist()
    if not where or visual is None:
        count = torch.arange(len(ids), device=ids.device)
        return SplicedRow(embeds, labels, count, None, len(ids))
    merge = visual.merges[clip]
    frames = [_frame(visual, clip, frame) for frame in range(len(visual.frames[clip]))]
    runs = [[frame] for frame in frames] if len(where) == len(frames) else [frames]
    parts, targets, positions, biases = [], [], [], []
    start = position = 0
    for end, run in zip([*where, len(ids)], [*runs, []], strict=True):
        parts.append(embeds[start:end])
        targets.append(labels[start:end])
        positions.append(torch.arange(position, position + end - start, device=ids.device))
        biases.append(torch.zeros(end - start, device=ids.device))
        position += end - start
        for frame in run:
            parts.append(frame.embeds.to(embeds.dtype))
            targets.append(labels.new_full((len(frame.embeds),), IGNORE_INDEX))
            positions.append(position + frame.position_ids)
            biases.append(frame.key_bias)
            position += frame.num_positions
        start = end + 1
    key_bias = torch.cat(biases) if merge.text_size_bias is TextSizeBias.visual else None
    return SplicedRow(torch.cat(parts), torch.cat(targets), torch.cat(positions), key_bias, position)


def _frame(visual: VisualFeatures, clip: int, frame: int) -> _Frames:
    embeds, size = visual.frames[clip][frame], visual.sizes[clip][frame]
    if visual.merges[clip].text_positions is TextPositions.merged:
        return _Frames(embeds, torch.arange(len(embeds), device=embeds.device), size.log(), len(embeds))
    centre, order = visual.centres[clip][frame].sort(stable=True)
    return _Frames(embeds[order], centre.round().long(), size[order].log(), int(size.sum()))


def pad_rows(rows: Sequence[SplicedRow], padding_side: str, *, with_labels: bool) -> Spliced:
    """Bring rows to one length.

    Args:
        rows: Rows of any lengths.
        padding_side: right or left.
        with_labels: Keep the labels.

    Returns:
        The batch.

    Raises:
        ValueError: for another side.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}: want left or right")
    longest = max(row.embeds.shape[0] for row in rows)
    biased = any(row.key_bias is not None for row in rows)
    embeds, masks, positions, labels, biases = [], [], [], [], []
    for row in rows:
        room = longest - row.embeds.shape[0]
        pad = (room, 0) if padding_side == "left" else (0, room)
        embeds.append(F.pad(row.embeds, (0, 0, *pad)))
        masks.append(F.pad(torch.ones_like(row.labels, dtype=torch.bool), pad))
        positions.append(F.pad(row.position_ids, pad))
        labels.append(F.pad(row.labels, pad, value=IGNORE_INDEX))
        bias = row.key_bias if row.key_bias is not None else torch.zeros(len(row.labels), device=row.labels.device)
        biases.append(F.pad(bias, pad))
    return Spliced(
        torch.stack(embeds),
        torch.stack(masks),
        torch.stack(positions),
        torch.stack(labels) if with_labels else None,
        torch.stack(biases) if biased else None,
        torch.tensor([[row.next_position] for row in rows], device=rows[0].labels.device),
    )
