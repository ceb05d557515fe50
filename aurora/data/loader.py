"""Batches ahead of time: threads decode the coming steps while the model works on the present one."""

from __future__ import annotations

from collections.abc import Iterator

from aurora.data.datasets import ConversationData, Sample
from aurora.processing.prefetch import read_ahead

_FOREVER = 2**60


class BatchLoader:
    """The batches of consecutive steps, in order; resuming is starting at another step."""

    def __init__(
        self,
        data: ConversationData,
        *,
        batch_size: int,
        start_step: int = 0,
        end_step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        """Describe the batches; nothing is read yet. Threads and depth are `data.config`'s.

        Args:
            data: The samples.
            batch_size: Samples of a step over all ranks.
            start_step: First step.
            end_step: Step before which to stop; None never stops.
            rank: This rank.
            world_size: Ranks.
            seed: Of the order.
        """
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._steps = range(start_step, _FOREVER if end_step is None else end_step)
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[list[Sample]]:
        """Read ahead and give one rank's share of each step.

        Yields:
            What `ConversationData.batch` returns for the step.

        Raises:
            ValueError: what reading a batch raised, when that batch is due.
        """
        config = self._data.config
        ahead = read_ahead(self._steps, self._read, depth=config.prefetch_batches, num_threads=config.num_threads)
        try:
            for _, batch in ahead:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            ahead.close()

    def _read(self, step: int) -> list[Sample]:
        return self._data.batch(step, self._batch_size, self._rank, self._world_size, self._seed)
