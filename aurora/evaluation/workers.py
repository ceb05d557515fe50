"""Single-threaded processes that share the work of a CPU: they stop with Ctrl-C and do not outlive the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess

import torch


class _Worker(SpawnProcess):
    """Begins with Ctrl-C held back until `_start`: Python would print where it was, which is the import of torch."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, over fork and exec
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    """A forked process may inherit a lock of one of torch's threads; hence spawned ones."""

    Process = _Worker


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Start processes that compute with one thread each.

    Args:
        workers: How many; for 1 there is no pool, and this process does the work.

    Yields:
        The pool, or None.

    Raises:
        ValueError: if one of them is killed.
    """
    if workers == 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers, mp_context=_Context(), initializer=_start)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ValueError(
            "a captioning process was killed, perhaps for memory; want threads=1 or a smaller batch_size. "
            "What is captioned is kept: the same command continues"
        ) from error
    except BaseException:
        for process in multiprocessing.active_children():  # nobody waits for what they compute
            if isinstance(process, _Worker):
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_leave_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _leave_with(parent: BaseProcess | None) -> None:
    assert parent is not None
    parent.join()
    os._exit(1)
