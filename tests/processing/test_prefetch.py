"""Reading ahead: order, bounds, errors, and leaving early."""

import threading
import time

import pytest

from aurora.processing.prefetch import read_ahead


def test_items_come_in_order_with_their_errors() -> None:
    def read(item: int) -> int:
        time.sleep(0.002 * (5 - item))
        if item == 3:
            raise OSError("gone")
        return 10 * item

    got = list(read_ahead(range(1, 5), read, depth=3, num_threads=3))
    assert [item for item, _ in got] == [1, 2, 3, 4]
    assert [value for item, value in got if item != 3] == [10, 20, 40]
    assert str(got[2][1]) == "gone"
    assert list(read_ahead([], read, depth=2)) == []


def test_no_more_is_read_than_the_depth_allows() -> None:
    begun: list[int] = []
    reader = read_ahead(range(20), lambda item: begun.append(item), depth=4, num_threads=4)
    next(reader)
    time.sleep(0.05)
    assert sorted(begun) == [0, 1, 2, 3]
    next(reader)
    time.sleep(0.05)
    assert sorted(begun) == [0, 1, 2, 3, 4]
    reader.close()


def test_leaving_waits_for_nothing_and_begins_nothing() -> None:
    release, begun = threading.Event(), []

    def read(item: int) -> int:
        begun.append(item)
        if item:
            release.wait(10)
        return item

    reader = read_ahead(range(6), read, depth=5)
    assert next(reader) == (0, 0)
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 5
    release.set()
    time.sleep(0.05)
    assert begun in ([0], [0, 1])


def test_what_is_no_error_is_raised() -> None:
    def read(item: int) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(read_ahead([1], read, depth=1))
