"""Functions of the lmms-eval task `tinyvdc`; see tinyvdc.yaml beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aurora.data.tinyworld.language import caption_prompts
from aurora.evaluation.tinyvdc import CATEGORIES, score

FOLDER = Path("outputs/lmms")
"""Of the clips, from where lmms-eval runs; the same as in tinyvdc.yaml."""


def process_docs(dataset: Any) -> Any:
    """Five documents of each clip, one for each caption, next to each other.

    Args:
        dataset: One row a clip: the file's name and the facts.

    Returns:
        The dataset with five times as many rows and a column `category`.
    """

    def five(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        count = len(rows["video"])
        repeated = {key: [value for value in values for _ in CATEGORIES] for key, values in rows.items()}
        return {**repeated, "category": [*CATEGORIES] * count}

    return dataset.map(five, batched=True)


def doc_to_visual(doc: Mapping[str, Any]) -> list[str]:
    """Path of the clip."""
    return [str(FOLDER / doc["video"])]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """What `aurora evaluate` asks for this category."""
    return caption_prompts(doc["category"])[0]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keep a caption with the facts of its clip for `accuracy`."""
    return {"tinyvdc": {**doc, "caption": results[0]}}


def accuracy(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of the facts that the captions state rightly, all categories alike, as `tinyvdc.score` counts them.

    Args:
        rows: From `process_results`.

    Returns:
        In [0, 1].
    """
    scenes = {row["video"]: row for row in sorted(rows, key=lambda row: str(row["video"]))}
    captions: dict[str, dict[str, str]] = {video: {} for video in scenes}
    for row in rows:
        captions[row["video"]][row["category"]] = row["caption"]
    return score(list(captions.values()), list(scenes.values())).mean.accuracy
