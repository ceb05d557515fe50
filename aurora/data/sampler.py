"""Which samples a step sees: a pure function of the step, so that resuming needs no state.

The stream of samples is one shuffled epoch after another. A window of `group_batches` batches is taken from it and
sorted by kind and length, so that a batch holds samples of like cost; then the window's batches are shuffled. An epoch
has at least four windows, else the same samples would always meet. Nothing depends on what ran before or on the number
of ranks, which only share out a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_SHUFFLE, _PICK, _WINDOW = 11, 12, 13  # which use a stream of random numbers has


class BatchSampler:
    """The indices of every step."""

    def __init__(
        self,
        source_sizes: Sequence[int],
        weights: Sequence[float],
        kinds: NDArray[np.integer],
        lengths: NDArray[np.integer],
        *,
        group_batches: int = 32,
    ) -> None:
        """Describe the samples.

        Args:
            source_sizes: Samples of each source; indices count through the sources in this order.
            weights: How often a sample of each source is seen in one epoch.
            kinds: Kind of each sample, (N,).
            lengths: Tokens of each sample, (N,).
            group_batches: Batches that are sorted together, at most; 1 leaves the shuffle as it is.

        Raises:
            ValueError: if there is no sample in an epoch.
        """
        self._sizes, self._weights = tuple(source_sizes), tuple(weights)
        self._kinds, self._lengths = kinds, lengths
        self._group_batches = group_batches
        counts = [self._drawn(size, weight) for size, weight in zip(self._sizes, self._weights, strict=True)]
        self.epoch_size = sum(size * whole + part for size, (whole, part) in zip(self._sizes, counts, strict=True))
        """Samples of one epoch."""
        if not self.epoch_size:
            raise ValueError(
                f"data: sources of {list(self._sizes)} samples give an empty epoch; want at least 1 sample"
            )
        self.epoch = lru_cache(maxsize=3)(self._epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    @staticmethod
    def _drawn(size: int, weight: float) -> tuple[int, int]:
        """Return whole copies of a source and samples of a further, partial one."""
        whole = int(weight)
        return whole, round(size * (weight - whole))

    def _epoch(self, seed: int, number: int) -> NDArray[np.int64]:
        """Return the shuffled indices of epoch `number`, from 0, (epoch_size,)."""
        parts: list[NDArray[np.int64]] = []
        first = 0
        for source, (size, weight) in enumerate(zip(self._sizes, self._weights, strict=True)):
            whole, part = self._drawn(size, weight)
            own = np.arange(first, first + size, dtype=np.int64)
            parts += [own] * whole
            if part:
                parts.append(np.random.default_rng([seed, _PICK, source, number]).permutation(own)[:part])
            first += size
        return np.random.default_rng([seed, _SHUFFLE, number]).permutation(np.concatenate(parts))

    def _make_window(self, seed: int, batch_size: int, window: int) -> NDArray[np.int64]:
        """Return the batches of a window, (group, batch_size)."""
        group = self._group(batch_size)
        width = group * batch_size
        places = np.arange(window * width, (window + 1) * width)
        epochs = places // self.epoch_size
        picked = np.concatenate(
            [
                self.epoch(seed, int(number))[places[epochs == number] - number * self.epoch_size]
                for number in np.unique(epochs)
            ]
        )
        if group == 1:
            return picked[None]
        # The epoch comes first, so that a sample of two epochs does not meet itself.
        order = np.lexsort((np.arange(width), self._lengths[picked], self._kinds[picked], epochs))
        batches = picked[order].reshape(group, batch_size)
        return batches[np.random.default_rng([seed, _WINDOW, window]).permutation(group)]

    def _group(self, batch_size: int) -> int:
        """Return the batches of a window."""
        return min(self._group_batches, max(1, self.epoch_size // (4 * batch_size)))

    def batch(self, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> list[int]:
        """Return the indices of one step, or a rank's share of them.

        Args:
            step: From 0.
            batch_size: Samples of a step, over all ranks.
            rank: This rank.
            world_size: Ranks; the batch must divide by it. Another number shares out the same batches.
            seed: Of the order.

        Raises:
            ValueError: if the batch does not divide, or a number is out of range.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size={batch_size}: want a positive multiple of the {world_size} ranks")
        if step < 0 or not 0 <= rank < world_size or seed < 0:
            raise ValueError(
                f"step={step}, rank={rank} of {world_size}, seed={seed}: want no negative, rank below ranks"
            )
        window, number = divmod(step, self._group(batch_size))
        row = self._window(seed, batch_size, window)[number]
        # Neighbours have like lengths, so taking turns gives every rank as much to do.
        return [int(index) for index in row[rank::world_size]]
