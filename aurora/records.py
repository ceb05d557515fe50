"""Results as JSON lines: one object per line, on disk as soon as it exists, so that a killed run loses nothing.

And a lock, for files that one run at a time may write.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class JsonLines:
    """An append-only `.jsonl` file that a later run continues.

    Opening it reads what is there. A last line that was cut in half is removed; any other line that is not a JSON
    object means that this is somebody else's file, and it is left alone.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Open or create the file, with the folders above it.

        Args:
            path: The file.
            overwrite: Begin anew instead of continuing.

        Raises:
            ValueError: if the path is a folder, or the file holds something other than JSON lines.
        """
        self.path = Path(path).expanduser()
        if self.path.is_dir():
            raise ValueError(f"output={self.path}: this is a folder, want a .jsonl file")
        if self.path.exists() and not self.path.is_file():  # reading a device may never end
            raise ValueError(f"output={self.path}: this is a device or a pipe, want a .jsonl file")
        self.rows: list[dict[str, Any]] = []
        complete = 0
        if self.path.exists():
            self.rows, complete = _parse(self.path)
        if overwrite:
            self.rows, complete = [], 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)  # nothing is left to write when the file is closed
        self._file.truncate(complete)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and have the operating system store it.

        Raises:
            OSError: if the disk refuses it, with the file's name; what was stored before stays.
        """
        self.rows.append(dict(row))
        # The bytes of a file's name need not be text: such a one becomes an escape that JSON reads back.
        line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that `JsonLines` wrote, without a last line cut in half; none if it is missing.

    Raises:
        ValueError: if the file holds something other than JSON lines.
    """
    return _parse(path)[0] if path.exists() else []


def lock_file(path: Path, what: str) -> IO[str]:
    """Keep others out until the file returned is closed, or this process ends in any way.

    Args:
        path: The lock; made if it is missing.
        what: What it guards, for the message, such as `run_dir=outputs/a`.

    Raises:
        ValueError: if another process holds it.
    """
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        setting = what.partition("=")[0]
        raise ValueError(f"{what}: another run writes there now; want its end, or another {setting}") from None
    except OSError:
        pass  # a file system without locks
    return lock


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows there are, and the number of bytes that are complete lines."""
    rows = []
    content = path.read_bytes()
    *lines, tail = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _as_object(line)
        if row is None:
            raise ValueError(f"output={path}, line {number}: got {line[:40]!r}, want a JSON object on each line")
        rows.append(row)
    if tail and not tail.startswith(b"{"):
        raise ValueError(f"output={path}: got {tail[:40]!r} as last line, want JSON lines or a new file")
    return rows, len(content) - len(tail)


def _as_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
