"""Which files a user means: one, those of a folder, or those a glob matches."""

from __future__ import annotations

import glob
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"})
"""With the image suffixes: what is taken from a folder."""


def find_inputs(visual_input: str) -> list[Path]:
    """Turn what the user named into files.

    Args:
        visual_input: A file, a folder (its images and videos, one level) or a glob; a path that exists as it stands
            is never read as a glob.

    Returns:
        The files, sorted; at least one.

    Raises:
        ValueError: if a folder holds no image or video.
        FileNotFoundError: if nothing is there.
    """
    path = Path(visual_input).expanduser()
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and file.is_file()
        )
        if not files:
            raise ValueError(f"visual_input={visual_input}: no image or video in this folder, want at least one")
        return files
    if path.exists():
        return [path]
    if glob.has_magic(visual_input):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not Path(name).is_dir())  # noqa: PTH207
        if not files:
            raise FileNotFoundError(f"visual_input={visual_input}: no file matches this pattern")
        return files
    raise FileNotFoundError(f"visual_input={visual_input}: no such file or folder")
