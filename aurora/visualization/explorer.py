"""A page to explore what merged: one HTML file that fetches nothing, works from disk and follows its reader's theme.

The page is `aurora/assets/explorer.html`; here its data is put in.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from aurora.visualization.figure import png_bytes
from aurora.visualization.film import TracedRun
from aurora.visualization.merge_map import Picture

_PLACE = "{{DATA}}"
_MAX_PATCHES = 1 << 16
"""Tokens are numbered with 16 bits in the page."""


def explorer_page(
    pictures: Sequence[Picture], runs: Sequence[TracedRun], *, title: str, seconds: Sequence[float] = ()
) -> str:
    """Make the page.

    Args:
        pictures: What the tower saw, (H, W, 3) uint8 each.
        runs: Encoder runs over these frames; the page lists them from the most tokens to the fewest.
        title: Heading, such as the name of the file.
        seconds: When each frame of a clip is shown.

    Returns:
        The text of the HTML file.

    Raises:
        ValueError: if there is no run, frames and traces differ in number, or a frame has too many patches.
    """
    grid = _check(pictures, runs)
    height, width, _ = pictures[0].shape
    ordered = sorted(runs, key=lambda run: -int(run.token_counts()[:, -1].sum()))
    data = {
        "title": title,
        "grid": grid,
        "size": [width, height],
        "pictures": [_data_uri(png_bytes(picture), "image/png") for picture in pictures],
        "seconds": [round(float(second), 3) for second in seconds],
        "runs": [_run_data(run) for run in ordered],
    }
    # "<" is written so that no name can end the script element.
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    page = (resources.files("aurora") / "assets" / "explorer.html").read_text(encoding="utf-8")
    return page.replace(_PLACE, text)


def _run_data(run: TracedRun) -> dict[str, Any]:
    num_layers = run.num_layers
    groups = [np.stack([run.groups(frame, layer) for layer in range(num_layers)]) for frame in range(len(run.traces))]
    return {
        "name": run.name,
        "tokens": run.token_counts().tolist(),
        # Per frame, (layers, rows, columns) as little-endian 16-bit numbers.
        "groups": [base64.b64encode(group.astype("<u2").tobytes()).decode() for group in groups],
        "similarity": [_medians(run, frame) for frame in range(len(run.traces))],
    }


def _medians(run: TracedRun, frame: int) -> list[float | None]:
    """Median similarity of the pairs that each layer merged in a frame; None where it merged none."""
    alone = TracedRun(run.name, [run.traces[frame]])
    found = [alone.similarities(layer) for layer in range(run.num_layers)]
    return [round(float(np.median(values)), 4) if values.size else None for values in found]


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _check(pictures: Sequence[Picture], runs: Sequence[TracedRun]) -> tuple[int, int]:
    if not runs or any(len(run.traces) != len(pictures) for run in runs):
        counts = [len(run.traces) for run in runs]
        raise ValueError(f"runs: got {counts} traced frames, want at least one run, each over {len(pictures)} frames")
    grids = {frame.trace.grid for run in runs for frame in run.traces}
    if len(grids) != 1:
        raise ValueError(f"runs: got patch grids {sorted(grids)}, want one")
    rows, columns = grids.pop()
    if rows * columns > _MAX_PATCHES:
        raise ValueError(f"runs: got {rows * columns} patches a frame, want at most {_MAX_PATCHES} in the explorer")
    return rows, columns
