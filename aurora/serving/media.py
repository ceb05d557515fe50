"""Images and videos that a client sends: `data:` URLs, and files of one folder if the server allows that.

Nothing is fetched from the network, and no path a client names is opened outside of that folder.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from aurora.processing.video import SampledVideo, load_visual


class Media(NamedTuple):
    """One image or video."""

    visual: SampledVideo
    """Its frames."""
    key: str
    """Equal for equal content and frames."""


def load_media(url: str, name: str, *, num_frames: int, folder: Path | None = None) -> Media:
    """Read what a URL holds.

    Args:
        url: `data:<type>;base64,<content>`, or `file:///...` below `folder`. The content decides what it is, not the
            type that it claims.
        name: What messages call it, such as `image 1`.
        num_frames: Frames to take of a video; one that is shorter gives all it has.
        folder: Where files may be read from; None is nowhere.

    Raises:
        ValueError: if it may not be read, or is neither an image nor a video; the message names no path of this
            machine.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        content = _data(url, name)
        # The name may not end in the word that a format is known by, as the content decides.
        with tempfile.NamedTemporaryFile(prefix="aurora-") as file:
            file.write(content)
            file.flush()
            visual = _load(Path(file.name), name, num_frames)
        return Media(visual, f"{hashlib.sha256(content).hexdigest()} {num_frames}")
    if scheme == "file" and folder is not None:
        path = _allowed(url, name, folder)
        state = path.stat()
        visual = _load(path, name, num_frames)
        return Media(visual, f"{path} {state.st_mtime_ns} {state.st_size} {num_frames}")
    if scheme in ("http", "https"):
        raise ValueError(f"{name}: got an address, which this server does not fetch; want the content as a data: URL")
    want = "a data: URL" if folder is None else f"a data: URL or a file:// URL below {folder}"
    raise ValueError(f"{name}: got {url[:40]!r}, want {want}")


def _data(url: str, name: str) -> bytes:
    """Content of a `data:` URL (RFC 2397)."""
    head, comma, content = url.partition(",")
    if not comma:
        raise ValueError(f"{name}: got a data: URL without a comma, want data:<type>;base64,<content>")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return base64.b64decode("".join(unquote(content).split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}: its base64 is broken or cut short") from None


def _allowed(url: str, name: str, folder: Path) -> Path:
    parts = urlsplit(url)
    root = folder.resolve()
    path = Path(unquote(parts.path))
    try:
        inside = parts.netloc in ("", "localhost") and path.resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
        inside = False
    if not inside or not path.is_file():  # one answer, so that nobody can ask what exists elsewhere
        raise ValueError(f"{name}: no such file below the folder that this server reads from")
    return path.resolve()


def _load(path: Path, name: str, num_frames: int) -> SampledVideo:
    try:
        return load_visual(path, num_frames, strict=False)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None
