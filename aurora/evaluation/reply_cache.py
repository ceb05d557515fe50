"""Replies of a judge on disk, keyed by what was asked: a killed run asks for nothing that it has."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class ReplyCache:
    """An SQLite file of replies; several runs may share it, and each reply is there whole or not at all."""

    def __init__(self, path: str | Path) -> None:
        """Open or create the file, with the folders above it.

        Args:
            path: The file.

        Raises:
            ValueError: if the file is something else, damaged or not writable.
        """
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
            # A reply survives the end of this process at any moment; against a power cut it is not forced to the disk.
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            self._database.execute("SELECT key, reply FROM replies LIMIT 1").fetchall()
        except sqlite3.Error as error:
            raise self._refusal(error) from error

    def get(self, key: str) -> str | None:
        """The reply to a request, or None."""
        return self._one("SELECT reply FROM replies WHERE key = ?", key)

    def put(self, key: str, reply: str) -> None:
        """Keep a reply."""
        self._one("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, reply)

    def __len__(self) -> int:
        with self._lock:
            return int(self._database.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._database.close()

    def _one(self, statement: str, *values: str) -> str | None:
        try:
            with self._lock:
                row = self._database.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise self._refusal(error) from error
        return None if row is None else str(row[0])

    def _refusal(self, error: sqlite3.Error) -> ValueError:
        return ValueError(f"judge.cache={self.path}: {error}; want an SQLite file of ours, or a new one")


def reply_key(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a reply depends on.

    Args:
        content: Plain values: the model, its settings and the messages.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode(errors="replace")).hexdigest()
