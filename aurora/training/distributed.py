"""Processes that train together: launching, averaging gradients, sharding, and dying with the parent."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException, spawn

from aurora.training.config import Precision
from aurora.training.scaler import compute_dtype

_CPU = torch.device("cpu")
_BUCKET_NUMBERS = 2**24
"""Numbers that one all-reduce of gradients takes at most: bounds the copy it needs."""


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among those that share a stage."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    """Where this process computes."""

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
        tensor = torch.tensor(value, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over the ranks, in double precision."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in flattened all-reduces of bounded size."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            flat.div_(self.size)
            for tensor, piece in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(piece.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors in a row, of one dtype, so that a group has few numbers or is one tensor."""
    groups: list[list[Tensor]] = []
    numbers = 0
    for tensor in tensors:
        numbers += tensor.numel()
        if not groups or numbers > _BUCKET_NUMBERS or groups[-1][0].dtype != tensor.dtype:
            groups.append([])
            numbers = tensor.numel()
        groups[-1].append(tensor)
    return groups


@contextmanager
def torchrun_world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun has started, each on its own GPU; without torchrun, a world of this one alone.

    Args:
        device: Kind of device; of several GPUs each process takes that of its local rank.
    """
    if not launched_by_torchrun():
        yield World(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process, or Slurm through submitit, whose ranks are then put the same way."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "RANK" not in os.environ:
        from submitit.helpers import TorchDistributedEnvironment  # type: ignore[import-untyped, unused-ignore]

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return dist.is_torchelastic_launched() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def shard(root: nn.Module, layers: Iterable[nn.Module], *, world: World, precision: Precision) -> None:
    """Shard a model over the ranks with FSDP2, in place; its parameters become `DTensor`s of the same names.

    Each of `layers` is gathered for its own forward and backward and freed between them; all other parameters are
    gathered once for the whole step. So only what every rank runs equally often may be in `layers`.

    Args:
        root: Its forward is the forward pass of a micro-batch.
        layers: Modules inside it.
        world: The ranks.
        precision: Of products; gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    dtype = None if precision is Precision.fp32 else compute_dtype(precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)


def release(root: nn.Module) -> None:
    """Let go of what a forward pass without a backward has gathered; weights may change before the next one."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(root, FSDPModule):
        root.reshard()


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Hold the whole model on every rank for the time of a `with`; does nothing where it is not sharded.

    Args:
        root: What `shard` was given.
    """
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not root, recurse=False)


def _worker(rank: int, size: int, store: str, parent: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what happened
    torch.set_num_threads(1)
    if os.getppid() != parent:
        raise SystemExit(1)
    try:
        if size == 1:
            target(World(), *args)
            return
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        target(World(rank, size), *args)
    except (ValueError, OSError, FloatingPointError) as error:
        Path(f"{store}.error").write_text(str(error))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Launch:
    """A group of one-thread processes that run `target(world, *args)`; `join` waits and re-raises a failure."""

    def __init__(self, size: int, target: Callable[..., None], *args: Any) -> None:
        """Start `size` processes."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._folder = tempfile.TemporaryDirectory(prefix="aurora-train-")
        self._store = str(Path(self._folder.name) / "store")
        self._context = spawn(_worker, (size, self._store, os.getpid(), target, args), nprocs=size, join=False)

    def join(self) -> None:
        """Wait for all processes; if the wait is broken off, stop them.

        Raises:
            ValueError: what a process said of its settings, its data or its disk; the others are stopped.
            OSError: if one was killed.
            torch.multiprocessing.ProcessException: if one failed in another way.
        """
        try:
            while not self._context.join():
                pass
        except ProcessException as error:
            said = Path(f"{self._store}.error")
            if said.exists():
                raise ValueError(said.read_text()) from None
            if isinstance(error, ProcessExitedException):  # the kernel's out-of-memory killer, or a person
                raise OSError(f"training: {error}; the same command goes on from the last checkpoint") from None
            raise
        finally:
            for process in self._context.processes:
                process.terminate()
            for process in self._context.processes:
                process.join()
            self._folder.cleanup()


def stop_if_orphaned(parent: int) -> None:
    """Leave when the launching process is gone, so that a killed run leaves nothing behind.

    Raises:
        SystemExit: if the parent process is no longer `parent`.
    """
    if os.getppid() != parent:
        raise SystemExit(1)
