"""Reading ahead: the next files are decoded in threads while the model works on the present ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(
    items: Sequence[T], read: Callable[[T], R], *, depth: int, num_threads: int = 1
) -> Generator[tuple[T, R | Exception], None, None]:
    """Read items in order, some of them before they are asked for.

    PyAV and NumPy let go of the interpreter while they work, so threads are enough. Closing the iterator drops what has
    not begun and waits for nothing.

    Args:
        items: What to read.
        read: Reads one item; called in a thread.
        depth: Items that may be read and not yet be taken, at least 1; bounds the memory.
        num_threads: Items that are read at once.

    Yields:
        Each item with what was read, or with the exception that reading raised.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    rest = iter(items)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="aurora-read")
    try:
        while True:
            while len(waiting) < depth and (item := next(rest, None)) is not None:
                waiting.append((item, pool.submit(read, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield item, error if error is not None else future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
