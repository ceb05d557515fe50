"""The sweep: its cells, what a cell measures, going on after a stop, sharing out, and what the report says."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from aurora.captioning import BUNDLED_MODEL
from aurora.config import load_config
from aurora.data.tinyworld.dataset import DatasetConfig, write_dataset
from aurora.data.tinyworld.language import Category, caption_prompts
from aurora.data.tinyworld.scene import sample_scene
from aurora.evaluation import sweep as module
from aurora.evaluation import tinyvdc
from aurora.evaluation.structured import StructuredCaptioner
from aurora.evaluation.sweep import CaptionJob, Cell, SweepConfig, measure_cell, share_right, sweep
from aurora.evaluation.sweep_report import markdown, to_record
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import sample_frames
from aurora.runtime import Dtype

ROOT = Path(__file__).parents[2]
CATEGORIES = list(tinyvdc.CATEGORIES)


def settings(folder, checkpoint, **changes):
    base = {
        "model_path": str(checkpoint), "ratios": [1.0, 0.25], "variants": ["constant", "random_drop"],
        "variant_ratios": [0.25], "num_seeds": 2, "num_clips": 3, "clip_px": 48, "max_new_tokens": 6, "threads": 1,
        "batch_size": 2, "output": str(folder / "out"), "figures": False,
    }  # fmt: skip
    return SweepConfig(**base | changes)


def cell_row(variant, ratio, seed, scores, tokens=10.0):
    return {
        "variant": variant, "ratio": ratio, "seed": seed, "categories": CATEGORIES, "scores": scores,
        "visual_tokens": tokens, "num_frames": 1, "num_patches": 100, "kv_mib": 1.0, "peak_mib": None,
        "seconds": {"encode": 0.1, "prefill": 0.2, "decode": 0.3}, "wall_s": 45.0, "environment": {"device": "cpu"},
    }  # fmt: skip


def report_of(curve, others=(), num_clips=40):
    """A record from (ratio, mean score) of merging, and (variant, ratio, mean score) of others."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, (2, num_clips, 5))
    rows = [
        cell_row(variant, ratio, seed, (value + noise[seed]).tolist(), tokens=100 * ratio)
        for variant, ratio, value in [*(("exact", *point) for point in curve), *others]
        for seed in (0, 1)
    ]
    return to_record(rows, model="toy", settings={"dtype": "float32"})


def test_the_cells_are_twelve_ratios_and_the_variants_for_each_seed():
    config = SweepConfig()
    cells = config.cells
    assert len(config.ratios) == 12
    assert len(cells) == len(set(cells)) == 3 * (12 + 12 * len(config.variant_ratios))
    assert {0.4, 0.2} <= set(config.variant_ratios)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    shares = [SweepConfig(part=part, num_parts=4).cells[part::4] for part in range(4)]
    assert sorted(cell for share in shares for cell in share) == sorted(cells)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": [0.5]}, r"ratios=\[0.5\]: want numbers in \(0, 1\], and 1.0 among them"),
        ({"ratios": [1.0, 0.0]}, "want numbers in"),
        ({"variant_ratios": [0.33]}, r"variant_ratios=\[0.33\]: want some of ratios="),
        ({"variants": ["fastv"]}, "variants: got fastv, want some of constant, linear"),
        ({"variants": ["exact"]}, "variants: got exact"),
        ({"part": 2, "num_parts": 2}, "part=2: want 0 to 1, as num_parts=2"),
        ({"num_clips": 0}, "num_clips=0: want at least 1"),
        ({"split": "tset"}, "split='tset': want one of"),
        ({"clip_px": 47}, "clip_px=47: want an even number"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**changes)


def test_a_ratio_the_model_cannot_reach_is_refused_before_anything_runs(random_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"token_kept_ratio=0\.02.*leaves 3; want a count of at least 3"):
        sweep(settings(tmp_path, random_checkpoint, ratios=[1.0, 0.25, 0.02]))
    assert not (tmp_path / "out").exists()


def test_figures_without_matplotlib_are_refused_before_anything_runs(random_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="figures=true: needs matplotlib"):
        sweep(settings(tmp_path, random_checkpoint, figures=True))
    assert not (tmp_path / "out").exists()


def test_a_cell_scores_what_the_evaluation_scores_on_files(tmp_path):
    """aurora-tiny at one ratio: frames from memory, prefix and batch of the sweep against mp4 files and `caption`."""
    num_clips = 3
    write_dataset(DatasetConfig(folder=str(tmp_path), split="test", num_clips=num_clips, first_seed=num_clips))
    job = CaptionJob(Cell("exact", 0.06, 1), num_clips, "test", 96, 2, str(BUNDLED_MODEL), "cpu", Dtype.float32, 160)
    row = measure_cell(job)
    captioner = StructuredCaptioner(
        AuroraForConditionalGeneration.from_pretrained(BUNDLED_MODEL),
        AuroraProcessor.from_pretrained(BUNDLED_MODEL),
        {category.value: caption_prompts(category)[0] for category in Category},
    )
    videos = sorted((tmp_path / "clips").glob("*.mp4"))
    clips = [sample_frames(video, 8).frames for video in videos]
    made = captioner.caption(clips, token_kept_ratio=0.06, schedule="exact")
    scenes = [sample_scene(seed, "test").to_dict() for seed in range(num_clips, 2 * num_clips)]
    expected = tinyvdc.score([captions for captions, _ in made], scenes)
    assert 0.5 < expected.mean.accuracy < 1  # or equality would say little
    assert np.mean(row["scores"]) == pytest.approx(expected.mean.accuracy, abs=1e-4)
    assert row["visual_tokens"] == 8 * 9
    assert (row["num_frames"], row["num_patches"]) == (8, 144)
    assert row["kv_mib"] == pytest.approx(72 * 2 * 4 * 192 * 4 / 2**20, abs=1e-3)
    assert set(row["seconds"]) == {"encode", "prefill", "decode"}
    assert min(row["seconds"].values()) > 0
    assert row["wall_s"] > num_clips * sum(row["seconds"].values())
    json.dumps(row)


def test_the_share_right_is_that_of_the_scorer():
    scene = sample_scene(3, "test").to_dict()
    caption = f"The {scene['size']} {scene['colour']} {scene['shape']} shows no motion."
    for category in CATEGORIES:
        whole = tinyvdc.score([{category: caption}], [scene]).categories[category].accuracy
        assert share_right(category, caption, scene) == pytest.approx(whole)


def test_a_sweep_reports_and_goes_on_where_it_was_stopped(random_checkpoint, tmp_path, capsys, monkeypatch):
    config = settings(tmp_path, random_checkpoint)
    record = sweep(config)
    assert [(point["variant"], point["ratio"], point["tokens_per_frame"]) for point in record["points"]] == [
        ("exact", 1.0, 36), ("exact", 0.25, 9), ("constant", 0.25, 16), ("random_drop", 0.25, 9)]  # fmt: skip
    assert record["num_clips"] == 6
    shown = capsys.readouterr()
    assert "[8/8] random_drop 0.25, seed 1" in shown.err
    assert "min left" in shown.err
    folder = tmp_path / "out"
    assert (folder / "report.md").read_text() in shown.out
    assert json.loads((folder / "report.json").read_text()) == record

    cells = folder / "cells.jsonl"
    lines = cells.read_bytes().splitlines(keepends=True)
    cells.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    measured = []
    monkeypatch.setattr(module, "measure_cell", lambda job: measured.append(job.cell) or measure_cell(job))
    again = sweep(config)
    assert measured == config.cells[5:]
    without_times = [{k: v for k, v in point.items() if k != "seconds"} for point in again["points"]]
    assert without_times == [{k: v for k, v in point.items() if k != "seconds"} for point in record["points"]]
    measured.clear()
    sweep(config)
    assert measured == []
    sweep(settings(tmp_path, random_checkpoint, num_clips=2))  # other clips: nothing of the above counts
    assert len(measured) == 8


def test_foreign_files_are_named_and_left_alone(random_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    for name, content in (("cells.jsonl", "notes\n"), ("cells-0-of-2.jsonl", "{}\n"), ("cells-1-of-2.jsonl", "[1]\n")):
        file = tmp_path / "out" / name
        file.write_text(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            sweep(settings(tmp_path, random_checkpoint))
        assert file.read_text() == content
        file.unlink()


def test_seeds_have_clips_of_their_own(random_checkpoint, tmp_path, monkeypatch):
    seen = []
    frames = module._frames
    monkeypatch.setattr(module, "_frames", lambda clip, *rest: seen.append(clip) or frames(clip, *rest))
    sweep(settings(tmp_path, random_checkpoint, seed=4, variants=[]))
    assert seen == [12, 13, 14] * 2 + [15, 16, 17] * 2


def test_parts_share_the_cells_and_the_last_one_reports(random_checkpoint, tmp_path, capsys):
    first, second = (settings(tmp_path, random_checkpoint, part=part, num_parts=2) for part in range(2))
    assert sweep(first) is None
    assert "4 of 8 cells are other parts' and missing" in capsys.readouterr().out
    record = sweep(second)
    assert record is not None
    assert len(record["points"]) == 4
    assert {file.name for file in (tmp_path / "out").glob("cells*")} == {"cells-0-of-2.jsonl", "cells-1-of-2.jsonl"}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    changes = {"ratios": [1.0, 0.04], "variants": ["random_drop"], "variant_ratios": [0.04], "num_clips": 2}
    changes |= {"clip_px": 96, "max_new_tokens": 160}
    one = sweep(settings(tmp_path / "one", BUNDLED_MODEL, **changes))
    two = sweep(settings(tmp_path / "two", BUNDLED_MODEL, threads=2, **changes))
    for point in (*one["points"], *two["points"]):
        del point["seconds"]
    assert one["points"] == two["points"]
    assert len({point["accuracy"]["value"] for point in one["points"]}) == 3


@pytest.mark.parametrize(
    ("curve", "verdict"),
    [
        ([(1.0, 0.9), (0.5, 0.9), (0.3, 0.88), (0.1, 0.5)], "is confirmed for toy: at 0.3 (30 of 100 tokens"),
        ([(1.0, 0.9), (0.5, 0.7), (0.3, 0.89)], "is denied for toy: at 0.3 (30 of 100 tokens a frame) it keeps 98.9 %"),
        ([(1.0, 0.9), (0.3, 0.855)], "is undecided for toy"),
        ([(1.0, 0.9), (0.4, 0.9)], "was not tested: no ratio 0.3"),
    ],
)  # fmt: skip
def test_the_claim_is_checked_at_every_ratio_from_its_own_up(curve, verdict):
    claim = report_of(curve)["claim"]
    assert verdict in claim
    if "denied" in verdict:
        assert "lowest 77.8 %" in claim
        assert "at 0.5" in claim
    if "confirmed" in verdict:
        assert "it keeps 97.8 %" in claim
        assert claim.endswith("the lowest ratio whose interval lies above 95 % is 0.3, 30 tokens.")


def test_the_claim_is_undecided_where_the_mean_is_above_and_the_interval_is_not():
    right = [[1.0] * 5] * 36 + [[0.6] * 5] * 4  # 0.96 on average, with a standard error of 0.02
    rows = [cell_row("exact", 1.0, 0, [[1.0] * 5] * 40), cell_row("exact", 0.3, 0, right, tokens=30.0)]
    record = to_record(rows, model="toy", settings={})
    found = record["points"][1]["of_unmerged"]
    assert found["low"] < 0.95 < found["value"]
    assert "is undecided for toy" in record["claim"]


def test_a_baseline_within_the_noise_is_level():
    merged = np.random.default_rng(0).uniform(0.5, 1, (40, 5))
    swings = np.where(np.arange(40) % 2, 0.1, -0.12)[:, None]  # one point below on average, within its standard error
    others = {"uniform_drop": merged + swings, "random_drop": merged + 0.1}
    rows = [cell_row("exact", ratio, 0, merged.tolist(), tokens=30.0) for ratio in (1.0, 0.3)]
    rows += [cell_row(name, 0.3, 0, scores.tolist(), tokens=30.0) for name, scores in others.items()]
    record = to_record(rows, model="toy", settings={})
    (sentence,) = record["comparison"]
    assert "is level with uniform drop" in sentence
    assert "is behind random drop (-10.0)" in sentence
    assert "ahead" not in sentence


def test_a_model_that_knows_nothing_gets_a_report_all_the_same():
    rows = [cell_row("exact", ratio, seed, [[0.0] * 5] * 3) for ratio in (1.0, 0.3) for seed in (0, 1)]
    record = to_record(rows, model="toy", settings={})
    assert record["claim"].endswith("was not tested: toy states no fact rightly without merging.")
    json.dumps(record, allow_nan=False)
    assert markdown(record)


def test_shares_and_differences_are_paired():
    record = report_of([(1.0, 0.9), (0.3, 0.81)], [("uniform_drop", 0.3, 0.61), ("raster_order", 0.3, 0.81)])
    merged, raster, uniform = record["points"][1:]
    assert merged["of_unmerged"]["value"] == pytest.approx(0.9, abs=2e-3)
    assert merged["accuracy"]["high"] - merged["accuracy"]["low"] > 0.001
    width = merged["of_unmerged"]["high"] - merged["of_unmerged"]["low"]
    assert width < 0.002  # the noise of a clip is the same on both sides
    assert uniform["versus_merging"]["value"] == pytest.approx(-0.2)
    assert uniform["versus_merging"]["high"] < -0.199
    assert merged["tasks_of_unmerged"] == pytest.approx([0.9] * 5, abs=0.01)
    assert merged["versus_merging"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert record["comparison"] == ["At 30 tokens a frame merging inside the encoder is ahead of uniform drop (+20.0)."]
    text = markdown(record)
    assert record["comparison"][0] in text
    assert "- raster order: exact, tokens sorted" in text
    assert raster["versus_merging"]["value"] == 0
    assert text.endswith("; 8 cells in 6.0 minutes of one process.\n")


@pytest.mark.slow
def test_a_killed_sweep_goes_on(random_checkpoint, tmp_path):
    arguments = [
        sys.executable, "scripts/sweep.py", f"model_path={random_checkpoint}", "ratios=[1.0,0.5,0.25]", "variants=[]",
        "variant_ratios=[]", "num_seeds=2", "num_clips=3", "clip_px=48", "max_new_tokens=40", "threads=2",
        "figures=false", f"output={tmp_path}",
    ]  # fmt: skip
    running = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "cells.jsonl").exists() or not (tmp_path / "cells.jsonl").read_bytes().count(b"\n"):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    done = (tmp_path / "cells.jsonl").read_bytes().count(b"\n")
    assert done < 6
    finished = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert f"/{6 - done}]" in finished.stderr
    assert (tmp_path / "cells.jsonl").read_bytes().count(b"\n") == 6


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_multirun_with_a_launcher_shares_out_the_parts(random_checkpoint, tmp_path, launcher):
    if importlib.util.find_spec(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher") is None:
        pytest.skip("needs hydra-joblib-launcher and hydra-submitit-launcher")
    arguments = [
        sys.executable, "scripts/sweep.py", "-m", "part=0,1", "num_parts=2", f"hydra/launcher={launcher}",
        f"model_path={random_checkpoint}", "ratios=[1.0,0.25]", "variants=[uniform_drop]", "variant_ratios=[0.25]",
        "num_seeds=1", "num_clips=2", "clip_px=48", "max_new_tokens=6", "threads=1", "figures=false",
        f"output={tmp_path}/out",
    ]  # fmt: skip
    before = set(ROOT.iterdir())
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out/report.json").read_text())["points"]) == 3
    assert {file.name for file in (tmp_path / "out").glob("cells*")} == {"cells-0-of-2.jsonl", "cells-1-of-2.jsonl"}
    assert set(ROOT.iterdir()) == before


def test_a_cluster_composes_the_parts():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_module("aurora.configs", version_base="1.3"):
        raw = compose("sweep", ["hydra/launcher=submitit_slurm", "num_parts=4", "part=3"], return_hydra_config=True)
    assert "submitit" in raw.hydra.launcher._target_
    del raw.hydra
    config = load_config(raw, SweepConfig)
    assert len(config.cells[config.part :: config.num_parts]) == 54
