"""Our model and our task in lmms-eval as published, in an environment of its own: `make test-lmms`."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from aurora.captioning import BUNDLED_MODEL
from aurora.data.tinyworld.dataset import DatasetConfig, write_dataset
from aurora.data.tinyworld.language import caption_prompts
from aurora.evaluation.run import EvaluateConfig, evaluate
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-lmms" / "bin" / "python"
NUM_CLIPS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-lmms, which `make test-lmms` installs"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    write_dataset(DatasetConfig(folder=str(folder / "outputs/lmms"), split="test", num_clips=NUM_CLIPS))
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHON, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_task_gives_our_accuracy_to_the_last_digit(folder: Path) -> None:
    command = str(ROOT / "tests/evaluation/lmms_command.py")
    printed = run(
        folder, command, "--model", "aurora", "--model_args", "token_kept_ratio=0.1,schedule=exact",
        "--tasks", "tinyvdc", "--include_path", str(ROOT / "aurora/evaluation/lmms_eval"), "--output_path", "out",
        "--log_samples",
    )  # fmt: skip
    assert "|tinyvdc|" in printed
    results = json.loads(next((folder / "out").rglob("*_results.json")).read_text())
    samples = next((folder / "out").rglob("*_samples_tinyvdc.jsonl")).read_text().splitlines()
    assert len(samples) == NUM_CLIPS * 5
    ours = evaluate(
        EvaluateConfig(
            ratios=[0.1],
            num_clips=NUM_CLIPS,
            data_dir=str(folder / "outputs/lmms"),
            output=str(folder / "ours"),
            threads=1,
        )
    )
    accuracy = ours["points"][0]["scores"]["mean"]["accuracy"]
    assert 0.9 < accuracy < 1  # or equality would say little
    assert results["results"]["tinyvdc"]["tinyvdc,none"] == accuracy


def test_what_the_adapter_answers(folder: Path) -> None:
    printed = run(folder, str(ROOT / "tests/evaluation/lmms_worker.py"), str(folder))
    found = json.loads(printed.split("REPORT ")[1].splitlines()[0])
    first, second = found["captions"]
    assert first != second
    model = AuroraForConditionalGeneration.from_pretrained(BUNDLED_MODEL)
    processor = AuroraProcessor.from_pretrained(BUNDLED_MODEL)
    clip = sorted((folder / "outputs/lmms/clips").glob("*.mp4"))[0]
    pixels = processor(videos=str(clip))["pixel_values_videos"]
    prompt = processor.build_prompt(caption_prompts("main_object")[0], 8)
    inputs = processor(text=prompt)
    merging = {"token_kept_ratio": 0.4, "schedule": "exact"}
    made = model.generate(inputs["input_ids"], pixel_values_videos=pixels, max_new_tokens=80, **merging)
    assert first == processor.decode(made[0], skip_special_tokens=True).strip()

    assert found["from_images"] == found["with_placeholder"] == found["sampled_off"] == first
    assert found["until"] == first.split(found["word"])[0].strip() != first
    assert found["mixed"][0] == first
    assert found["mixed"][2] == second
    assert found["groups"] == [2, 1, 1, 1, 1]

    loss, greedy = found["own"]
    assert greedy
    assert not found["other"][1]
    assert loss < 0.1 < found["other"][0]
    assert found["own_with_space"] == found["own"]
    assert not found["by_function"][1]
    assert found["text_alone"][0] > loss
    ids = processor(text=f"{prompt} {first}")["input_ids"]
    labels = ids.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    with torch.no_grad():
        expected = model(ids, pixel_values_videos=pixels, labels=labels, **merging).loss.item()
    assert math.isclose(loss, expected, rel_tol=1e-3, abs_tol=1e-5)
    assert [error.split(":")[0] for error in found["errors"]] == ["model_args", "visual", "missing.mp4"]
