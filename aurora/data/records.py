"""LLaVA-style records on disk: finding them, checking them, naming every mistake with its file and line.

A source is a `.jsonl` (one record a line) or `.json` (one array) of
`{"image": file | [frame, ...], "video": file, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}`; a
record without a medium is text alone. Only where each record stands is kept in memory, so a file of millions fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from aurora.processing.chat import IMAGE_TOKEN

KINDS = ("text", "image", "video")
"""What a record shows; a list of several frames counts as a video."""
_ROLES = ("human", "gpt")
_SMALL_FILE = 2**26
"""Bytes of a file that is looked at as a whole, to say what is wrong with it."""


class Placeholders(Enum):
    """What one `<image>` for a clip of several frames becomes."""

    frame = "frame"
    """One placeholder per frame, as the released weights were trained."""
    clip = "clip"
    """One placeholder for the whole clip, all frames in a row behind it."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One file of conversations with its media."""

    path: str = ""
    """The `.jsonl` or `.json` file; `~` is allowed."""
    media: str | None = None
    """Where images and videos are: a folder, or tar shards (a file, a glob, or a folder of tar parts written
    `folder/*.tar*`). Null is the folder of the file."""
    weight: float = 1.0
    """How often a sample is seen in one epoch, above 0; 0.5 draws another half of the source in each epoch."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1000:
            raise ValueError(f"data.sources: weight={self.weight}: want a number in (0, 1000]")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is trained on: sources of conversations, how they become samples, and in which order."""

    path: str | None = None
    """A single source: its `.jsonl` or `.json` file. For several use `sources`."""
    media: str | None = None
    """Media of `path`: a folder or tar shards; null is the folder of the file."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> source, a mixture."""
    max_length: int = 4096
    """Longest sequence, visual tokens included; the end of a longer one is cut off."""
    num_frames: int = 8
    """Frames taken of a video file; a shorter clip gives all it has."""
    placeholders: Placeholders = Placeholders.frame
    """frame | clip: what one `<image>` for a clip becomes."""
    group_batches: int = 32
    """Batches whose samples are sorted by kind and length together; 1 leaves them shuffled."""
    cache_dir: str | None = None
    """Folder of pre-tokenised data; null keeps ids in memory and tokenises at each start."""
    max_unreadable_share: float = 0.01
    """Share of samples whose medium may turn out unreadable before training stops, in [0, 1]."""
    max_mistakes: int = 50
    """Mistakes in the records that are listed before reading stops."""
    check_media: bool = True
    """Look for every image and video file when the data is opened."""
    num_threads: int = 2
    """Threads that decode ahead."""
    prefetch_batches: int = 4
    """Batches that may wait for the model; bounds the memory."""

    def __post_init__(self) -> None:
        names = ("max_length", "num_frames", "group_batches", "max_mistakes", "num_threads", "prefetch_batches")
        for name in names:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"data.{name}={value}: want at least 1")
        if not 0 <= self.max_unreadable_share <= 1:
            raise ValueError(f"data.max_unreadable_share={self.max_unreadable_share}: want a number in [0, 1]")

    def all_sources(self) -> dict[str, SourceConfig]:
        """Return name -> source, `path` included.

        Raises:
            ValueError: if there is none, or one has no file.
        """
        found = dict(self.sources)
        if self.path is not None:
            found["data"] = SourceConfig(path=self.path, media=self.media)
        if not found:
            raise ValueError("data.path=null: want a .jsonl or .json file of conversations, or data.sources")
        for name, source in found.items():
            if not source.path:
                raise ValueError(f"data.sources.{name}.path: no value given; want a .jsonl or .json file")
        return found


def digest_files(config: DataConfig) -> str:
    """Return a name of what the files of records hold; another order or another byte is another name.

    Raises:
        ValueError: if there is no file.
    """
    found = hashlib.sha256()
    for source in config.all_sources().values():
        path = Path(source.path).expanduser()
        try:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"{path}: not readable ({error.strerror}); want a .jsonl or .json file") from None
    return found.hexdigest()[:16]


class Place(NamedTuple):
    """Where a record stands in its file."""

    line: int
    """From 1."""
    offset: int
    """First byte."""
    num_bytes: int


class Mistake(NamedTuple):
    """Something wrong in a file of records."""

    where: str
    """`file:line`."""
    what: str
    """What was found and what was wanted."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class DataError(ValueError):
    """A file of records with mistakes; the message lists them."""

    def __init__(self, mistakes: list[Mistake], *, bounded: bool) -> None:
        """Keep the mistakes; `bounded` says that reading stopped before the end."""
        self.mistakes = mistakes
        count = f"{len(mistakes)} mistake{'s' * (len(mistakes) != 1)}" + (" or more" if bounded else "")
        self.summary = f"data: {count}"
        """The number alone."""
        super().__init__(f"{self.summary}:\n  " + ";\n  ".join(map(str, mistakes)))


class Record(NamedTuple):
    """One checked record."""

    conversations: list[Mapping[str, Any]]
    """LLaVA messages."""
    kind: str
    """text, image or video."""
    frames: tuple[str, ...]
    """Image files; several are the frames of a clip. Empty for text and for a video file."""
    video: str | None
    """Video file."""

    @property
    def media(self) -> tuple[str, ...]:
        """Every file the record names."""
        return self.frames if self.video is None else (self.video,)

    @property
    def num_placeholders(self) -> int:
        """Placeholders in all questions."""
        return sum(m["value"].count(IMAGE_TOKEN) for m in self.conversations if m["from"] == "human")


def check_record(raw: Any, *, num_frames: int) -> Record:
    """Check one record.

    Args:
        raw: What the JSON holds.
        num_frames: Frames a video file will give, for the number of placeholders.

    Raises:
        ValueError: with what is wrong; several mistakes are joined by `; `.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"got a JSON {type(raw).__name__}, want an object with conversations")
    wrong: list[str] = []
    frames, video = _check_media(raw, wrong)
    messages = _check_messages(raw, wrong)
    if wrong:
        raise ValueError("; ".join(wrong))
    kind = "video" if video is not None or len(frames) > 1 else "image" if frames else "text"
    record = Record(messages, kind, frames, video)
    if kind == "text" and (found := record.num_placeholders):
        counted, keys = _counted(found), ", ".join(map(str, raw))
        raise ValueError(f"too many placeholders: {counted} without an image or a video (keys: {keys}), want none")
    _check_placeholders(record, len(frames) or num_frames)
    return record


def _check_media(raw: Mapping[str, Any], wrong: list[str]) -> tuple[tuple[str, ...], str | None]:
    """Return frames and video file; note what is wrong with them."""
    image, video = raw.get("image"), raw.get("video")
    if image is not None and video is not None:
        wrong.append("image and video are both given, want one of them")
    frames: tuple[str, ...] = ()
    for key, value in (("image", image), ("video", video)):
        if isinstance(value, list):
            bad = [item for item in value if not (isinstance(item, str) and item)]
            if bad or not value:
                wrong.append(f"{key}: got {_short(value)}, want a file name or a list of frames, not empty")
            else:
                frames = tuple(value)
        elif value is not None and not (isinstance(value, str) and value):
            wrong.append(f"{key}: got {_short(value)}, want a file name or a list of frames")
    if isinstance(image, str) and image:
        frames = (image,)
    return frames, video if isinstance(video, str) and video else None


def _check_messages(raw: Mapping[str, Any], wrong: list[str]) -> list[Mapping[str, Any]]:
    """Return the messages; note what is wrong with them."""
    if "conversations" not in raw:
        known = ", ".join(map(str, raw)) or "none"
        wrong.append(f"no key conversations (keys: {known}); want a list of messages with from and value")
        return []
    messages = raw["conversations"]
    if not isinstance(messages, list) or not messages:
        wrong.append(f"conversations: got {_short(messages)}, want a list of messages with from and value")
        return []
    before = len(wrong)
    for number, message in enumerate(messages):
        if what := _message_mistake(message):
            wrong.append(f"conversations[{number}]: {what}")
    if len(wrong) == before:
        roles = [message["from"] for message in messages]
        if "human" not in roles:
            wrong.append("conversations: got no question, want one message from human")
            return messages
        if roles[-1] == "human":
            wrong.append(f"conversations[{len(roles) - 1}]: a question without an answer, want one from gpt")
        # An answer in front of the first question is left out, as in LLaVA; a later one would be lost unseen.
        wrong += [
            f"conversations[{number}]: an answer behind an answer, want a question from human between them"
            for number in range(roles.index("human") + 1, len(roles))
            if roles[number - 1] == roles[number] == "gpt"
        ]
    return messages


def _message_mistake(message: Any) -> str:
    """Say what is wrong with a message, or nothing."""
    if not isinstance(message, dict):
        return f"got {_short(message)}, want an object with from and value"
    if missing := [key for key in ("from", "value") if key not in message]:
        return f"no key {' and '.join(missing)}; want from and value"
    if message["from"] not in _ROLES:
        return f"from: got {_short(message['from'])}, want human or gpt"
    value = message["value"]
    if not isinstance(value, str):
        return f"value: got {_short(value)}, want text"
    if message["from"] == "gpt":
        if not value.strip():
            return "empty answer, want text"
        if IMAGE_TOKEN in value:
            return f"{IMAGE_TOKEN} in an answer, want it in a question"
    return ""


def _check_placeholders(record: Record, num_frames: int) -> None:
    found = record.num_placeholders
    if record.kind == "text" or found in (1, num_frames):
        return
    size = "too few" if found < num_frames else "too many"
    wanted = "want 1" if num_frames == 1 else f"want 1 for the clip or {num_frames}, one per frame"
    frames = f"{num_frames} frame{'s' * (num_frames != 1)}"
    raise ValueError(f"{size} placeholders: {_counted(found)} for {frames}, {wanted}")


def _counted(placeholders: int) -> str:
    return f"{placeholders} placeholder{'s' * (placeholders != 1)} {IMAGE_TOKEN}"


def scan(path: Path) -> Iterator[tuple[Place, Any, str]]:
    """Read a file of records one by one.

    Args:
        path: `.jsonl` or `.json`; what it begins with decides.

    Yields:
        Where a record stands, what its JSON holds, and what is wrong with the JSON (then there is no record).

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            file.seek(0)
            yield from _scan_array(file.read()) if head.startswith(b"[") else _scan_lines(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; want a .jsonl or .json file of conversations") from None
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror}); want a .jsonl or .json file") from None


def _scan_lines(file: Any) -> Iterator[tuple[Place, Any, str]]:
    offset = 0
    if (keys := _keys_of_one_object(file)) is not None:
        yield Place(1, 0, 0), None, f"got one object over several lines (keys: {keys}), want one a line, or an array"
        return
    for line, content in enumerate(file, start=1):
        place = Place(line, offset, len(content))
        offset += len(content)
        if not content.strip():
            continue
        try:
            yield place, json.loads(content.decode("utf-8-sig" if line == 1 else "utf-8")), ""
        except UnicodeDecodeError as error:
            yield place, None, f"not UTF-8 (byte {error.start} of the line), want JSON in UTF-8"
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield place, None, f"bad JSON ({reason}), want one object a line"


def _keys_of_one_object(file: Any) -> str | None:
    """Return the keys if the whole file is one object over several lines: each of these would be a mistake."""
    first = file.readline().strip()
    content = first + file.read(_SMALL_FILE) if first in (b"{", b"\xef\xbb\xbf{") else b""
    file.seek(0)
    try:
        return ", ".join(json.loads(content.decode("utf-8-sig")))
    except (ValueError, RecursionError):
        return None


def _scan_array(content: bytes) -> Iterator[tuple[Place, Any, str]]:
    """Read a JSON array element by element: `json.loads` would lose where each one stands."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Place(line, error.start, 0), None, "not UTF-8, want JSON in UTF-8"
        return
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    line, counted, offset = 1, 0, 0
    wanted, last = "", False
    while not last:
        start = _skip_blanks(text, position)
        line += text.count("\n", counted, start)
        offset += len(text[counted:start].encode())
        counted = start
        place = Place(line, offset, 0)
        if text[start : start + 1] == "]" and wanted != "value":
            return
        try:
            raw, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            line += text.count("\n", counted, getattr(error, "pos", counted))
            yield Place(line, offset, 0), None, f"bad JSON ({reason}); the rest of the file is not read"
            return
        yield place._replace(num_bytes=len(text[start:end].encode())), raw, ""
        position = _skip_blanks(text, end)
        following = text[position : position + 1]
        if following not in (",", "]"):
            line += text.count("\n", counted, position)
            yield Place(line, offset, 0), None, "bad JSON (want , or ] behind a record); the rest is not read"
            return
        wanted, last, position = "value", following == "]", position + 1


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def read_record(path: Path, place: Place, *, num_frames: int) -> Record:
    """Read one record again.

    Args:
        path: Its file.
        place: Where it stands.
        num_frames: See `check_record`.

    Raises:
        ValueError: if the file has changed.
    """
    try:
        with path.open("rb") as file:
            file.seek(place.offset)
            raw = json.loads(file.read(place.num_bytes).decode("utf-8-sig"))
        return check_record(raw, num_frames=num_frames)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}:{place.line}: changed while in use ({error}); want the file as it was") from None


def read_source(
    path: Path,
    *,
    num_frames: int,
    exists: Callable[[str], bool] | None = None,
    mistakes: list[Mistake],
    max_mistakes: int,
) -> Iterator[tuple[Place, Record]]:
    """Read and check every record of a file; stops when the list of mistakes is full.

    Args:
        path: The file.
        num_frames: See `check_record`.
        exists: Whether there is a file of this name among the media; None does not look.
        mistakes: Takes what is wrong.
        max_mistakes: Its bound.

    Yields:
        Records without a mistake, with their places.

    Raises:
        ValueError: if the file cannot be read.
    """
    seen: set[str] = set()
    for place, raw, problem in scan(path):
        record = None
        if not problem:
            try:
                record = check_record(raw, num_frames=num_frames)
            except ValueError as error:
                problem = str(error)
        if record is not None and exists is not None:
            absent = [name for name in record.media if name not in seen and not exists(name)]
            seen.update(set(record.media) - set(absent) if len(seen) < 100_000 else ())
            if absent:
                more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
                problem = f"no such file: {absent[0]}{more}"
        if problem:
            mistakes.append(Mistake(f"{path}:{place.line}", problem))
            if len(mistakes) >= max_mistakes:
                return
        elif record is not None:
            yield place, record


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
