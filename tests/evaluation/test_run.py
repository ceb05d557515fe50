"""The evaluation from mp4 files to tables, on a checkpoint with random weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from aurora import cli
from aurora.config import load_config
from aurora.data.tinyworld.language import Category, caption_prompts, captions
from aurora.data.tinyworld.scene import sample_scene
from aurora.evaluation import clip_captions, run
from aurora.evaluation.report import Measured, Point, markdown, to_record
from aurora.evaluation.run import EvaluateConfig, checkpoint_digest, evaluate, noise_like
from aurora.evaluation.structured import StructuredCaptioner
from aurora.evaluation.tinyvdc import score
from aurora.model.merge import Schedule
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor

ROOT = Path(__file__).parents[2]
QUESTIONS = {category.value: caption_prompts(category)[0] for category in Category}


def load(folder: Path, max_new_tokens: int = 24) -> StructuredCaptioner:
    model = AuroraForConditionalGeneration.from_pretrained(folder)
    return StructuredCaptioner(model, AuroraProcessor.from_pretrained(folder), QUESTIONS, max_new_tokens=max_new_tokens)


def some_clips(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 8, 48, 48, 3), dtype=np.uint8))


def settings(folder: Path, checkpoint: Path, **more: object) -> EvaluateConfig:
    named = {"num_clips": 5, "ratios": [1.0, 0.25], "clip_px": 48, "max_new_tokens": 6, "threads": 1, **more}
    return EvaluateConfig(
        model_path=str(checkpoint), data_dir=str(folder / "clips"), output=str(folder / "out"), **named
    )


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "captions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "merging",
    [{}, {"token_kept_ratio": 0.25, "schedule": "exact"}, {"token_kept_ratio": 0.3, "slowfast": True}],
    ids=["unmerged", "exact", "slowfast"],
)
def test_one_reading_gives_the_ids_of_one_generate_per_question(random_checkpoint, merging):
    captioner = load(random_checkpoint)
    clips = some_clips(3)
    made = captioner.caption(clips, **merging)
    model, processor = captioner.model, captioner.processor
    seen = set()
    for frames, (written, counts) in zip(clips, made, strict=True):
        pixels = processor.image_processor.preprocess_frames(frames)[None]
        for name, question in QUESTIONS.items():
            inputs = processor(text=processor.build_prompt(question, 8))
            output = model.generate(
                inputs["input_ids"], pixel_values_videos=pixels, max_new_tokens=24, return_dict=True, **merging
            )
            assert written[name] == processor.decode(output.sequences[0], skip_special_tokens=True).strip()
            assert counts == output.visual_token_counts[0]
            seen.add(written[name])
    assert len(seen) > 5  # or equality would say little


def test_short_answers_leave_and_long_ones_go_on(random_checkpoint):
    """With an end-of-text id that turns up here and there, every row ends where it does alone."""
    captioner = load(random_checkpoint)
    model, clips = captioner.model, some_clips(4)
    pixels = torch.stack([captioner.processor.image_processor.preprocess_frames(frames) for frames in clips])
    prompts = [captioner.processor.build_prompt(question, 8) for question in QUESTIONS.values()] * len(clips)
    inputs = captioner.processor(text=prompts)
    prefix = model.encode(pixel_values_videos=pixels)
    whole = model.generate(**inputs, prefix=prefix, max_new_tokens=30, eos_token_id=-1).tolist()
    assert len(whole) == 20
    ends = {token: len({ids.index(token) if token in ids else 30 for ids in whole}) for ids in whole for token in ids}
    stop = max(ends, key=ends.get)
    assert ends[stop] >= 3
    made = model.generate(**inputs, prefix=prefix, max_new_tokens=30, eos_token_id=stop, return_dict=True)
    for ids, expected, length, reason in zip(made.sequences.tolist(), whole, made.num_generated, made.stopped_by):
        assert length == (expected.index(stop) + 1 if stop in expected else 30)
        assert ids[:length] == expected[:length]
        assert reason == ("eos" if stop in expected else "length")


def test_clips_may_differ_in_length_and_full_contexts_are_refused(random_checkpoint):
    captioner = load(random_checkpoint)
    long, short = some_clips(2)[0], some_clips(2)[1][:5]
    together = captioner.caption([long, short], token_kept_ratio=0.5)
    assert together == [captioner.caption([clip], token_kept_ratio=0.5)[0] for clip in (long, short)]
    assert [len(made.visual_tokens) for made in together] == [8, 5]
    with pytest.raises(ValueError, match=r"clips: got none"):
        captioner.caption([])
    with pytest.raises(ValueError, match=r"leave no room .*max_seq_len=512"):
        captioner.caption([np.concatenate([long] * 2)])


def test_points_are_the_first_ratio_then_the_others_by_schedule():
    config = EvaluateConfig(ratios=[1.0, 0.4], schedules=[Schedule.exact, Schedule.constant], noise=True, num_clips=3)
    assert [point.name for point in config.points] == ["unmerged", "exact 0.4", "constant 0.4", "unmerged, noise"]
    assert config.points[1].merging == {"token_kept_ratio": 0.4, "schedule": "exact"}


def test_an_evaluation_reads_files_scores_them_and_continues(random_checkpoint, tmp_path, capsys, monkeypatch):
    config = settings(tmp_path, random_checkpoint, noise=True, schedules=[Schedule.exact, Schedule.constant])
    record = evaluate(config)
    rows = rows_of(tmp_path)
    assert len(rows) == 4 * 5
    assert len(list((tmp_path / "clips" / "clips").glob("test_*.mp4"))) == 5
    assert [point["name"] for point in record["points"]] == [
        "unmerged", "exact 0.25", "constant 0.25", "unmerged, noise"]  # fmt: skip
    assert [point["visual_tokens_per_frame"] for point in record["points"]][:2] == [36, 9]
    assert record["points"][2]["visual_tokens_per_frame"] > 9
    for row in rows:
        assert set(row["captions"]) == {category.value for category in Category}
        assert row["settings"]["model_sha256"] == checkpoint_digest(random_checkpoint)
    by_noise = {
        noise: [row["captions"] for row in rows if row["noise"] is noise and row["ratio"] == 1]
        for noise in (True, False)
    }
    assert by_noise[True] != by_noise[False]
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text() == printed
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == record
    for text in ("main_object", "exact 0.25", "noise instead of frames", "captions of the next clip", "tiny_colour"):
        assert text in printed

    log = tmp_path / "out" / "captions.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-3]) + b'{"video": "cl')
    batches = []
    caption_batch = clip_captions._caption_batch
    monkeypatch.setattr(clip_captions, "_caption_batch", lambda batch: batches.append(batch) or caption_batch(batch))
    again = evaluate(config)
    assert [(batch.point.name, len(batch.clips)) for batch in batches] == [("unmerged, noise", 3)]
    assert [row["captions"] for row in rows_of(tmp_path)] == [row["captions"] for row in rows]
    assert [point["scores"] for point in again["points"]] == [point["scores"] for point in record["points"]]
    batches.clear()
    evaluate(settings(tmp_path, random_checkpoint, num_clips=6))
    assert [len(batch.clips) for batch in batches] == [1, 1]


def test_captions_follow_the_file_and_not_its_name(random_checkpoint, tmp_path):
    """With the files of two clips exchanged, so are their captions: no other way leads to the model."""
    config = settings(tmp_path, random_checkpoint, ratios=[1.0], num_clips=3)
    evaluate(config)
    before = [row["captions"] for row in rows_of(tmp_path)]
    files = sorted((tmp_path / "clips" / "clips").glob("*.mp4"))
    files[0].rename(tmp_path / "kept")
    files[1].rename(files[0])
    (tmp_path / "kept").rename(files[1])
    evaluate(settings(tmp_path, random_checkpoint, ratios=[1.0], num_clips=3, overwrite=True, batch_size=1))
    after = [row["captions"] for row in rows_of(tmp_path)]
    assert before[0] != before[1]
    assert after == [before[1], before[0], before[2]]


def test_other_weights_are_captioned_anew(random_checkpoint, tmp_path):
    other = shutil.copytree(random_checkpoint, tmp_path / "other")
    (other / "README.md").write_text("a card does not change what a model says")
    assert checkpoint_digest(other) == checkpoint_digest(random_checkpoint)
    evaluate(settings(tmp_path, random_checkpoint, ratios=[0.25], num_clips=2))
    model = AuroraForConditionalGeneration.from_pretrained(other)
    torch.nn.init.normal_(model.model.projector.linear_2.weight, std=1.0)
    model.save_pretrained(other)
    evaluate(settings(tmp_path, other, ratios=[0.25], num_clips=2))
    rows = rows_of(tmp_path)
    assert len(rows) == 4
    assert [row["captions"] for row in rows[:2]] != [row["captions"] for row in rows[2:]]


@pytest.mark.slow
def test_two_processes_write_the_captions_of_one(random_checkpoint, tmp_path):
    alone = settings(tmp_path / "a", random_checkpoint, batch_size=2)
    evaluate(alone)
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "experiment=tinyvdc", "num_clips=5", "threads=2"]
    command += [f"model_path={random_checkpoint}", "ratios=[1.0,0.25]", "schedules=[exact]", "noise=false"]
    command += ["clip_px=48", "max_new_tokens=6", f"data_dir={tmp_path / 'clips'}", f"output={tmp_path / 'b' / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| unmerged" in done.stdout
    wanted = {(row["video"], row["ratio"]): row["captions"] for row in rows_of(tmp_path / "a")}
    assert {(row["video"], row["ratio"]): row["captions"] for row in rows_of(tmp_path / "b")} == wanted


def gold(count: int) -> tuple[list[dict[str, str]], list[dict[str, object]]]:
    scenes = [sample_scene(seed, "test") for seed in range(count)]
    texts = [{name.value: text for name, text in captions(scene, scene.seed).items()} for scene in scenes]
    return texts, [scene.to_dict() for scene in scenes]


def test_tables_state_what_was_measured():
    texts, scenes = gold(40)
    worse = [{**text, "camera": ""} for text in texts]
    measured = [
        Measured(
            point=Point(ratio=ratio, schedule="exact"), scores=score(written, scenes, resamples=50), other_clip=None,
            visual_tokens=[8 * tokens] * 40, num_frames=8, seconds=[0.5] * 40,
        )
        for ratio, written, tokens in ((1.0, texts, 144), (0.2, worse, 29))
    ]  # fmt: skip
    record = to_record(measured, model="m", clips="40 clips", settings={}, environment={})
    assert [point["retention"] for point in record["points"]] == [1.0, pytest.approx(0.8)]
    text = markdown(record)
    (merged,) = [line for line in text.splitlines() if line.startswith("| exact 0.2")]
    cells = [cell.strip() for cell in merged.strip("|").split("|")]
    assert cells[:3] == ["exact 0.2", "29", "80.0"]
    assert cells[4] == "80.0"
    held_out = sum(bool(scene["held_out"]) for scene in scenes)
    assert f"100.0 (n={held_out})" in text
    assert {len(line) for line in text.splitlines() if line.startswith("| exact")} == {len(merged)}


def test_captions_of_other_clips_score_chance():
    texts, scenes = gold(800)
    other = score([*texts[1:], texts[0]], scenes, resamples=50).mean
    assert abs(other.accuracy - other.chance) < 0.03


def test_noise_is_the_same_again_and_shows_nothing():
    frames = np.zeros((8, 48, 48, 3), np.uint8)
    noise = noise_like(frames, 3)
    assert np.array_equal(noise, noise_like(frames, 3))
    assert not np.array_equal(noise, noise_like(frames, 4))
    assert noise.shape == frames.shape
    assert 106 < noise.mean() < 111
    assert 45 < noise.std() < 48


def test_the_experiment_is_the_table_of_the_model_card():
    with initialize_config_module("aurora.configs", version_base="1.3"):
        config = load_config(compose("evaluate", ["experiment=tinyvdc"]), EvaluateConfig)
        plain = load_config(compose("evaluate"), EvaluateConfig)
    assert plain == EvaluateConfig()
    assert (config.num_clips, config.split, config.ratios) == (500, "test", [1.0, 0.4, 0.2, 0.1])
    assert len(config.points) == 8


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("ratios=[1.2]", "ratios=[1.2]: want numbers in (0, 1]"),
        ("ratios=[]", "ratios=[]: want at least one"),
        ("schedules=[list]", "schedules: got list"),
        ("num_clips=0", "num_clips=0"),
        ("split=training", "split='training'"),
        ("clip_px=33", "image_size=33"),
        ("num_clip=3", "did you mean num_clips?"),
        ("model_path=nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_a_mistake_gets_one_line(setting, wanted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.run(run.main, [setting])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert wanted in error
    assert not list(tmp_path.iterdir())


def test_the_dataset_verb_writes_what_training_reads(tmp_path, capsys, monkeypatch):
    from aurora.data.tinyworld.command import main

    monkeypatch.chdir(tmp_path)
    cli.run(main, ["split=val", "num_clips=2", "image_size=32", "num_frames=3"])
    assert capsys.readouterr().out == "outputs/tinyworld_val/conversations.jsonl\n"
    folder = tmp_path / "outputs" / "tinyworld_val"
    assert len(list((folder / "clips").glob("*.mp4"))) == 2
    records = [json.loads(line) for line in (folder / "conversations.jsonl").read_text().splitlines()]
    assert len(records) == 12
    assert all((folder / record["video"]).is_file() for record in records)
    cli.run(main, ["split=val", "num_clips=3", "image_size=32", "num_frames=3", "folder=my, clips"])
    assert len(list((tmp_path / "my, clips" / "clips").iterdir())) == 3
