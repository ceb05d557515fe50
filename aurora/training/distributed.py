"""Processes that train together: launching, gradient averaging over gloo, and dying with the parent."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among those that share a stage."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints, curves and progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process of the world."""
        if self.size > 1:
            dist.barrier()

    def agree(self, value: int) -> int:
        """Return rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in one flattened all-reduce."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat.div_(self.size)
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))


def _worker(rank: int, size: int, store: str, parent: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if os.getppid() != parent:
        raise SystemExit(1)
    if size == 1:
        target(World(), *args)
        return
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        target(World(rank, size), *args)
    finally:
        dist.destroy_process_group()


class Launch:
    """A group of one-thread processes that run `target(world, *args)`; `join` waits and re-raises a failure."""

    def __init__(self, size: int, target: Callable[..., None], *args: Any) -> None:
        """Start `size` processes."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._folder = tempfile.TemporaryDirectory(prefix="aurora-train-")
        store = str(Path(self._folder.name) / "store")
        self._context = spawn(_worker, (size, store, os.getpid(), target, args), nprocs=size, join=False)

    def join(self) -> None:
        """Wait for all processes.

        Raises:
            torch.multiprocessing.ProcessRaisedException: if one failed; the others are stopped.
        """
        while not self._context.join():
            pass
        self._folder.cleanup()


def stop_if_orphaned(parent: int) -> None:
    """Leave when the launching process is gone, so that a killed run leaves nothing behind.

    Raises:
        SystemExit: if the parent process is no longer `parent`.
    """
    if os.getppid() != parent:
        raise SystemExit(1)
