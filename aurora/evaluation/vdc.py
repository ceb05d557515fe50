"""VDC as it is published: a folder with captions, questions and videos, in the layouts that the authors have used.

`VDC_1k.jsonl` (hub data set) has a row for each video with `video_id`, `video_name` and `<category>_caption`;
`VDC_1k_captions.jsonl` (their code) has `video_id` and `captions`. `<category>.jsonl` maps a video id to a list of
`question`, `answer` and `category`, one video a line; where an id stands twice, the last line counts, as in their
script. Files are found wherever they are below the folder: VDCScore_qa/, annotations/, post_eval/, videos/...
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora.evaluation.config import VdcConfig

CAPTION_FILES = ("VDC_1k.jsonl", "VDC_1k_captions.jsonl")
VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of VDCscore."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VdcClip:
    """One video with its reference captions and questions."""

    video_id: str
    path: str | None
    """None where no file of that name is below the folder."""
    captions: Mapping[str, str]
    """Category -> reference caption."""
    questions: Mapping[str, Sequence[Question]]
    """Category -> questions; a category without any is absent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vdc:
    """A folder that was read."""

    clips: list[VdcClip]
    notes: dict[str, int]
    """What is odd about the files, such as questions without an answer; empty where nothing is."""


def read_vdc(config: VdcConfig, num_clips: int | None = None) -> Vdc:
    """Read a folder in the published format.

    Args:
        config: The folder, the categories, and what to do about missing files.
        num_clips: Take the first so many of the captions file; None takes all.

    Returns:
        Its clips in the order of the captions file, those without a file included only with `allow_missing`.

    Raises:
        ValueError: if no folder is named, a file is missing or is something else, or videos are missing.
    """
    if config.root is None:
        raise ValueError("data.root: no value given; want data.root=... (a folder with VDC_1k.jsonl and the videos)")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.root={config.root}: no such folder; want one with {CAPTION_FILES[0]} and the videos")
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    notes: Counter[str] = Counter()
    questions = {name: _questions(_find(files, (f"{name}.jsonl",), root), notes) for name in config.categories}
    videos: dict[str, str] = {}
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            videos.setdefault(path.name, str(path))
            videos.setdefault(path.stem, str(path))
    rows: dict[str, dict[str, Any]] = {}
    for place, row in _rows(_find(files, CAPTION_FILES, root)):
        if not isinstance(row.get("video_id"), str):
            raise ValueError(f"{place}: got no video_id, want a row for each video")
        notes["rows of captions that replace another"] += row["video_id"] in rows
        rows[row["video_id"]] = row
    chosen = list(rows.items())[:num_clips]
    clips = [_clip(video_id, row, questions, videos) for video_id, row in chosen]
    if not clips:
        raise ValueError(f"data.root={config.root}: the captions file is empty, want a row for each video")
    for name, by_video in questions.items():
        if without := sum(clip.video_id not in by_video for clip in clips):
            notes[f"videos without questions on {name}"] = without
    if missing := [clip.video_id for clip in clips if clip.path is None]:
        if not config.allow_missing or len(missing) == len(clips):
            raise ValueError(
                f"data.root={config.root}: {len(missing)} of {len(clips)} videos are missing, such as {missing[0]}; "
                "want a file of each video_name or video_id" + ("" if config.allow_missing else ", or allow_missing")
            )
        notes["videos that are missing"] = len(missing)
    return Vdc(clips=clips, notes={what: count for what, count in notes.items() if count})


def _find(files: Sequence[Path], names: Sequence[str], root: Path) -> Path:
    """The file of one of these names that is nearest to the root."""
    for name in names:
        found = [path for path in files if path.name == name]
        if found:
            return min(found, key=lambda path: (len(path.parts), path))
    raise ValueError(f"data.root={root}: found no {' or '.join(names)}; want the published file there or in a folder")


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their places."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: got {line[:40]!r}, want a JSON object on each line")
            yield place, row


def _questions(path: Path, notes: Counter[str]) -> dict[str, list[Question]]:
    """Questions by video id, where there are any."""
    by_video: dict[str, list[Question]] = {}
    for place, row in _rows(path):
        for video_id, entries in row.items():
            if not isinstance(entries, list):
                raise ValueError(f"{place}: got no list for {video_id!r}, want its questions")
            notes[f"lines of {path.name} that replace another"] += video_id in by_video
            by_video[video_id] = []
            for entry in entries:
                texts = [entry.get(key) if isinstance(entry, dict) else None for key in ("question", "answer")]
                if all(isinstance(text, str) and text.strip() for text in texts):
                    by_video[video_id].append(Question(question=str(texts[0]), answer=str(texts[1])))
                else:
                    notes[f"questions of {path.name} without question or answer"] += 1
    return {video_id: entries for video_id, entries in by_video.items() if entries}


def _clip(
    video_id: str,
    row: Mapping[str, Any],
    questions: Mapping[str, Mapping[str, Sequence[Question]]],
    videos: Mapping[str, str],
) -> VdcClip:
    nested = row.get("captions")
    texts = nested if isinstance(nested, dict) else row
    captions = {name: texts.get(f"{name}_caption") for name in questions}
    names = [Path(str(row.get("video_name") or "")).name, video_id]
    return VdcClip(
        video_id=video_id,
        path=next((videos[name] for name in names if name in videos), None),
        captions={name: text for name, text in captions.items() if isinstance(text, str) and text.strip()},
        questions={name: by_video[video_id] for name, by_video in questions.items() if video_id in by_video},
    )
