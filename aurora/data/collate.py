"""Samples side by side: padded rows for the model, and several conversations packed into one row.

Packing works on the spliced sequence, where visual tokens have taken their places. Each conversation of a packed row
sees itself alone and counts its positions from its own start, so the loss is that of separate rows, without padding.

Shape letters: B samples, T text positions, F frames, R packed rows, L positions of a row, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aurora.data.conversation import IGNORE_INDEX
from aurora.data.datasets import Sample
from aurora.model.splice import Spliced


class Batch(NamedTuple):
    """Padded samples, as `AuroraModel.forward` takes them."""

    input_ids: Tensor
    """(B, T) int64, padded on the right."""
    labels: Tensor
    """(B, T) int64, -100 where nothing is learned."""
    attention_mask: Tensor
    """True where a token is, (B, T) bool."""
    pixel_values: list[Tensor | None]
    """(F, 3, H, W) float32 for each sample; None for text."""

    @property
    def clips(self) -> list[Tensor | None] | None:
        """The pixels, or None if no sample has any."""
        return self.pixel_values if any(clip is not None for clip in self.pixel_values) else None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        clips = [None if clip is None else clip.to(device, non_blocking=True) for clip in self.pixel_values]
        ids, labels, mask = (x.to(device, non_blocking=True) for x in self[:3])
        return Batch(ids, labels, mask, clips)


class PackedRows(NamedTuple):
    """Several conversations in each row, as `Llama.forward` takes them."""

    inputs_embeds: Tensor
    """(R, L, C)."""
    attention_mask: Tensor
    """True where a position may look: its own conversation up to itself; (R, L, L) bool."""
    position_ids: Tensor
    """(R, L) int64, from each conversation's start."""
    labels: Tensor | None
    """(R, L) int64; the first position of a conversation is never a target."""
    key_bias: Tensor | None
    """(R, L) float32, see `Spliced`."""


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad samples to one length.

    Args:
        samples: At least one.
        pad_id: Id on padding.

    Raises:
        ValueError: if there is none.
    """
    if not samples:
        raise ValueError("samples: got none, want at least one")
    shape = (len(samples), max(len(sample.input_ids) for sample in samples))
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE_INDEX)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        count = len(sample.input_ids)
        ids[row, :count] = torch.tensor(sample.input_ids)
        labels[row, :count] = torch.tensor(sample.labels)
        mask[row, :count] = True
    return Batch(ids, labels, mask, [sample.pixel_values for sample in samples])


def plan_packs(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Choose which conversations share a row: the longest first, each into the first row with room.

    Args:
        lengths: Positions of each conversation.
        max_length: Positions of a row; a conversation longer than that gets a row of its own.

    Returns:
        The conversations of each row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, room in enumerate(free) if room >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(max_length)
        rows[row].append(index)
        free[row] -= lengths[index]
    return [sorted(row) for row in rows]


def pack_rows(spliced: Spliced, max_length: int) -> PackedRows:
    """Lay the rows of a spliced batch behind each other into fewer, fuller rows.

    Args:
        spliced: One conversation a row, padded on either side.
        max_length: Positions of a packed row, unless one conversation alone is longer.

    Returns:
        The packed rows; the loss over them equals that of the batch. Padding attends to itself alone.
    """
    keep = spliced.attention_mask.bool()
    counts = [int(count) for count in keep.sum(dim=1)]
    packs = plan_packs(counts, max_length)
    width = max(sum(counts[index] for index in pack) for pack in packs)
    device = spliced.inputs_embeds.device
    owner = torch.arange(-width, 0, device=device).repeat(len(packs), 1)  # padding: a number of its own each
    shape = (len(packs), width)
    embeds = spliced.inputs_embeds.new_zeros((*shape, spliced.inputs_embeds.shape[2]))
    positions = torch.zeros(shape, dtype=torch.int64, device=device)
    labels = torch.full(shape, IGNORE_INDEX, device=device)
    bias = torch.zeros(shape, device=device)
    for row, pack in enumerate(packs):
        start = 0
        for index in pack:
            span = slice(start, start + counts[index])
            owner[row, span] = index
            embeds[row, span] = spliced.inputs_embeds[index][keep[index]]
            positions[row, span] = spliced.position_ids[index][keep[index]]
            if spliced.labels is not None:
                labels[row, span] = spliced.labels[index][keep[index]]
                labels[row, start] = IGNORE_INDEX  # the conversation before must not learn to predict this one
            if spliced.key_bias is not None:
                bias[row, span] = spliced.key_bias[index][keep[index]]
            start = span.stop
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    return PackedRows(
        embeds,
        mask,
        positions,
        labels if spliced.labels is not None else None,
        bias if spliced.key_bias is not None else None,
    )
