"""docs/gallery.md: each picture is there, small, and made by the command that the page names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "gallery.md"
MAX_BYTES, MAX_TOTAL_BYTES = 500_000, 3_000_000


class Entry(NamedTuple):
    """A block of commands and the pictures shown until the next one."""

    commands: str
    pictures: list[str]


def entries() -> list[Entry]:
    """Read the page."""
    _, *parts = PAGE.read_text(encoding="utf-8").split("```bash\n")
    split = [part.partition("```") for part in parts]
    return [Entry(commands, re.findall(r"!\[.+?\]\((.+?)\)", text)) for commands, _, text in split]


def test_at_least_eight_pictures_each_by_the_command_above_it() -> None:
    shown = [(entry.commands, picture) for entry in entries() for picture in entry.pictures]
    assert len({picture for _, picture in shown}) >= 8
    for commands, picture in shown:
        assert f"docs/{picture}" in commands
        assert (PAGE.parent / picture).is_file()


def test_pictures_are_small_and_all_shown() -> None:
    files = list((PAGE.parent / "images" / "gallery").iterdir())
    assert {f"images/gallery/{file.name}" for file in files} == {p for entry in entries() for p in entry.pictures}
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < MAX_BYTES
    assert sum(sizes) < MAX_TOTAL_BYTES


def _steps(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        steps = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            steps.append(np.asarray(image.convert("RGB")).astype(int))
        return steps


def _difference(got: np.ndarray, want: np.ndarray, *, slack_px: int) -> float:
    """Mean difference, at the best of the shifts up or down that another font may cause."""
    rows = len(want)
    return min(
        float(np.abs(got[max(0, shift) : rows + shift] - want[max(0, -shift) : rows - shift]).mean())
        for shift in range(-slack_px, slack_px + 1, 2)
    )


@pytest.mark.slow
def test_the_commands_make_these_pictures(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "aurora").symlink_to(ROOT / "aurora")
    made = tmp_path / "docs" / "images" / "gallery"
    made.mkdir(parents=True)
    for commands, pictures in entries():
        if "chromium " in commands and shutil.which("chromium") is None:
            commands = commands.partition("chromium ")[0]
            pictures = []
        done = subprocess.run(
            ["bash", "-euc", commands], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{commands}\n{done.stderr}"
        for picture in pictures:
            new, old = tmp_path / "docs" / picture, PAGE.parent / picture
            if new.suffix == ".svg":  # the same paths and texts, but for digits that another processor may round
                assert abs(len(new.read_text()) / len(old.read_text()) - 1) < 0.05
                continue
            steps = list(zip(_steps(new), _steps(old), strict=True))
            for got, want in steps:
                assert got.shape == want.shape
                # A browser's fonts differ between machines, and near-ties between processors.
                assert _difference(got, want, slack_px=60 if "explorer" in picture else 0) < (
                    12 if "explorer" in picture else 4
                )
