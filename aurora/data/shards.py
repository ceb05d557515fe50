"""Media in folders or in tar shards, read at random without extracting.

The published AuroraCap training set comes as tars of at most 40 GB, some of them parts of one archive. Parts are
read, in the natural order of their names, as if they were joined; a whole archive is one part. Only headers are read
when shards are opened, and each later read takes exactly the bytes of one member.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol

_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5": "zstd"}


class Media(Protocol):
    """Files by name."""

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        ...

    def local(self, name: str) -> AbstractContextManager[Path]:
        """Give the file as a path for the time of a `with`."""
        ...


class FolderMedia:
    """Files below a folder; absolute names are taken as they are."""

    def __init__(self, folder: Path) -> None:
        """Look below `folder`.

        Raises:
            ValueError: if it is no folder.
        """
        if not folder.is_dir():
            raise ValueError(f"media={folder}: no such folder; want a folder or tar files")
        self._folder = folder

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        return "\0" not in name and (self._folder / name).is_file()

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Give the file as a path."""
        yield self._folder / name


class Member(NamedTuple):
    """A file inside an archive."""

    archive: int
    """Which archive."""
    offset: int
    """First byte of its content in the joined parts."""
    num_bytes: int


class _Joined(io.RawIOBase):
    """The parts of an archive as one seekable file."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.stat().st_size for part in parts))
        self._position = 0
        self._open: tuple[int, io.BufferedReader] | None = None

    @property
    def num_bytes(self) -> int:
        return self._ends[-1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._position >= self.num_bytes:
            return 0
        part = bisect_right(self._ends, self._position)
        start = self._ends[part - 1] if part else 0
        if self._open is None or self._open[0] != part:
            self.close_part()
            self._open = (part, self._parts[part].open("rb"))
        file = self._open[1]
        file.seek(self._position - start)
        count = file.readinto(memoryview(buffer)[: self._ends[part] - self._position])
        self._position += count
        return count

    def close_part(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        self.close_part()
        super().close()


class TarMedia:
    """Files inside tar archives, whole or in parts."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the headers of all archives.

        Args:
            files: Archives and parts, in any order; see `group_parts`.

        Raises:
            ValueError: if a file is no tar, compressed, or cut off: a part is missing.
        """
        self._archives = group_parts(files)
        self._members: dict[str, Member] = {}
        for number, parts in enumerate(self._archives):
            for name, offset, num_bytes in _read_headers(parts):
                self._members[name] = Member(number, offset, num_bytes)

    @property
    def names(self) -> list[str]:
        """Every file, in the order of the archives."""
        return list(self._members)

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        return _normal(name) in self._members

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            ValueError: if it is absent or its archive has changed.
        """
        member = self._members.get(_normal(name))
        if member is None:
            raise ValueError(f"{name}: not in {len(self._archives)} tar archives; want one of their files")
        parts = self._archives[member.archive]
        # A file of its own for each read: threads read at once.
        with _Joined(parts) as raw, io.BufferedReader(raw) as file:
            file.seek(member.offset)
            content = file.read(member.num_bytes)
        if len(content) != member.num_bytes:
            raise ValueError(f"{parts[0]}: {name} ends after {len(content)} of {member.num_bytes} bytes")
        return content

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Give the file as a path for the time of a `with`: decoders want one. It lies in `$TMPDIR`."""
        with tempfile.TemporaryDirectory(prefix="aurora-") as folder:
            path = Path(folder) / PurePosixPath(_normal(name)).name
            path.write_bytes(self.read(name))
            yield path

    def extract(self, folder: Path) -> int:
        """Write every file below `folder`; those that are there with the right size stay.

        Args:
            folder: Made if needed.

        Returns:
            Files written.

        Raises:
            ValueError: if a name leads out of the folder.
        """
        written = 0
        for name, member in self._members.items():
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise ValueError(
                    f"{self._archives[member.archive][0]}: {name!r} leads out of the folder; want it inside"
                )
            target = folder / name
            if target.is_file() and target.stat().st_size == member.num_bytes:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.part")
            beside.write_bytes(self.read(name))
            beside.replace(target)
            written += 1
        return written


def group_parts(files: Sequence[Path]) -> list[list[Path]]:
    """Sort files into archives: the parts of one differ in the letters or digits behind its name.

    `a.tar.part_aa`, `a.tar.part-01`, `a.tar.aa`, `a.tar.000` and `a_part_1.tar`, `a.part1.tar` are parts of `a`.

    Args:
        files: Archives and parts.

    Returns:
        The parts of each archive in order, archives sorted by name.
    """
    groups: dict[Path, list[Path]] = {}
    for file in files:
        stem = re.sub(
            r"(?i)(\.tar)([._-]?part)?[._-]?([a-z]{2}|\d{1,5})$|[._-]part[._-]?([a-z]{2}|\d+)(\.tar)?$", "", file.name
        )
        groups.setdefault(file.with_name(stem.removesuffix(".tar")), []).append(file)
    return [sorted(groups[key], key=_natural) for key in sorted(groups)]


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdecimal() else (0, piece) for piece in re.split(r"(\d+)", path.name)]


def _read_headers(parts: Sequence[Path]) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of every file in the joined parts, which may be several archives in a row."""
    label = str(parts[0]) + (f" (and {len(parts) - 1} more parts)" if len(parts) > 1 else "")
    with _Joined(parts) as raw, io.BufferedReader(raw, 1 << 16) as file:
        start = 0
        while start < raw.num_bytes:
            file.seek(start)
            head = file.read(4)
            for magic, kind in _COMPRESSED.items():
                if head.startswith(magic):
                    raise ValueError(f"{label}: compressed with {kind}, which has no random access; want a plain tar")
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # it would hold millions of headers
                        if member.offset_data + member.size > raw.num_bytes:
                            raise tarfile.ReadError(f"{member.name} is cut off")
                        if member.isfile():
                            yield _normal(member.name), member.offset_data, member.size
                    end = archive.offset
                if end == start:  # tarfile takes a broken header for the end
                    raise tarfile.ReadError("no header")
            except (tarfile.TarError, EOFError, OSError) as error:
                raise ValueError(f"{label}: not a whole tar ({error}) at byte {start}; want all its parts") from None
            start = _next_block(file, end)


def _next_block(file: BinaryIO, start: int) -> int:
    """Skip the zero blocks that end an archive."""
    file.seek(start)
    while block := file.read(_BLOCK):
        if block.strip(b"\0"):
            return start
        start += _BLOCK
    return start


def _normal(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return ("/" if name.startswith("/") else "") + "/".join(parts)


def open_media(where: str | None, *, beside: Path) -> Media:
    """Open the media of a source.

    Args:
        where: A folder, a tar file or a glob of tar files and parts; None is the folder of `beside`.
        beside: The file of records.

    Raises:
        ValueError: if nothing is there or an archive is broken.
    """
    if where is None:
        return FolderMedia(beside.parent)
    path = Path(where).expanduser()
    if path.is_dir():
        return FolderMedia(path)
    return TarMedia(find_shards(where))


def find_shards(where: str) -> list[Path]:
    """Return the tar files and parts that a path or a glob names.

    Raises:
        ValueError: if there is none.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return [path]
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not files:
        raise ValueError(
            f"media={where}: no such folder or file; want a folder, a tar file, or a glob such as 'x.tar*'"
        )
    return files
