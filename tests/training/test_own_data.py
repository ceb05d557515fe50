"""A newcomer's 20 samples and the commands of the README's section, from the check of the records to a caption."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aurora.data.tinyworld import render_clip, sample_scene, write_mp4
from tests.data.datasets import turns, write_jsonl

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "white": (240, 240, 240)}


def write_samples(folder: Path) -> list[dict[str, Any]]:
    """Ten photos of three shapes and two formats, five clips, three lists of frames and two texts."""
    folder.mkdir()
    records: list[dict[str, Any]] = []
    for number in range(10):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        size = [(120, 90), (64, 128), (100, 100)][number % 3]
        file = f"photo_{number}.{('png', 'jpg')[number % 2]}"
        Image.new("RGB", size, colour).save(folder / file)
        records.append({"image": file, "conversations": turns("<image>\nWhich colour is it?", f"It is {name}.")})
    for number in range(8):
        frames = render_clip(sample_scene(number, "train"), num_frames=12 if number < 5 else 3)
        if number < 5:
            write_mp4(frames, folder / f"clip_{number}.mp4" if number else folder / "clip.mp4")
            record: dict[str, Any] = {"video": f"clip_{number}.mp4" if number else "clip.mp4"}
            asked = "<image>\nDescribe the video."
        else:
            names = [f"frame_{number}_{i}.png" for i in range(3)]
            for name, frame in zip(names, np.asarray(frames), strict=True):
                Image.fromarray(frame).save(folder / name)
            record, asked = {"image": names}, "<image><image><image>\nDescribe the frames."
        records.append(record | {"conversations": turns(asked, f"Scene {number}.", "Is it drawn?", "Yes.")})
    records += [{"conversations": turns("Hello!", "Hello.")}, {"conversations": turns("And now?", "Nothing.")}]
    return records


def readme_commands() -> list[list[str]]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Train on your own data")[1].split("\n## ")[0]
    [block] = re.findall(r"^```bash\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [command[:2] for command in commands] == [[".venv/bin/aurora", v] for v in ("prepare", "train", "caption")]
    return [[sys.executable, "-m", "aurora.cli", *command[1:]] for command in commands]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_alone_trains_twenty_samples(tmp_path: Path) -> None:
    records = write_samples(tmp_path / "my")
    assert len(records) == 20
    write_jsonl(tmp_path / "my" / "data.jsonl", records)
    check, train, caption = readme_commands()
    done = run(check, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 samples, 20 in an epoch" in done.stdout
    done = run(train, tmp_path)
    assert done.returncode == 0, done.stderr
    first, *_, summary, exported = done.stdout.splitlines()
    assert first.startswith("finetune: 50 steps of 4, ")
    assert summary.startswith("finetune: 50 steps in ")
    assert exported == "exported to outputs/finetune/model"
    curve = (tmp_path / "outputs" / "finetune" / "finetune" / "curve.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, curve)]
    assert losses[-1] < losses[0] / 2, losses
    done = run(caption, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

    records[6] |= {"image": "nowhere.png"}
    records[10] |= {"conversations": turns("Describe the video.", "Scene.")}
    records[12] |= {"conversations": turns("<image>\nDescribe the video.", "")}
    del records[19]["conversations"]
    write_jsonl(tmp_path / "my" / "data.jsonl", records)
    for command in (check, [*train, "run_dir=outputs/other"]):
        done = run(command, tmp_path)
        assert done.returncode == 2
        lines = [line.split(": ")[0] for line in done.stderr.splitlines()]
        assert lines == [*(f"my/data.jsonl:{number}" for number in (7, 11, 13, 20)), "error"]
