"""The recipe around the stages: tokenizer, bank, processes, configuration, export."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from aurora.config import load_config
from aurora.data.tinyworld.dataset import through_h264
from aurora.data.tinyworld.scene import sample_scene
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.training import bank
from aurora.training.config import Precision, StageConfig, TokenizerConfig, TrainConfig
from aurora.training.distributed import Launch, World
from aurora.training.export import pixel_table
from aurora.training.frames_task import batch_frames, shuffled
from aurora.training.init import sincos_positions
from aurora.training.loop import is_finished
from aurora.training.run import run_part, train
from aurora.training.tiny import clip_bank, load_tokenizer
from aurora.training.tokenizer import train_tokenizer

Recipe = Callable[[str], TrainConfig]


def test_the_whole_recipe_ends_in_a_checkpoint_that_captions(recipe: Recipe, tmp_path: Path) -> None:
    config = replace(recipe("run"), workers=1, export_dir=str(tmp_path / "export"), scale=0.5)
    config.stages["pretrain"].init_from.clear()  # in this process, without the launcher
    for name in config.stages:
        run_part(World(), config, name)
        assert is_finished(Path(config.run_dir) / name, 2)
    train(config)
    model = AuroraForConditionalGeneration.from_pretrained(tmp_path / "export")
    processor = AuroraProcessor.from_pretrained(tmp_path / "export")
    assert next(model.parameters()).dtype == torch.float32
    frames = clip_bank(config, "val").frames[0]
    text = processor.build_prompt("Describe the video briefly.", len(frames))
    assert text.startswith("USER: 1 <image> 2 <image>")
    inputs = processor(videos=np.asarray(frames), text=text)
    want = pixel_table(processor.image_processor.config)(frames)
    torch.testing.assert_close(inputs["pixel_values_videos"][0], want, rtol=1e-5, atol=1e-5)
    output = model.generate(**inputs, max_new_tokens=3, token_kept_ratio=0.4)
    assert output.shape[0] == 1
    stages = [json.loads(line)["stage"] for line in (tmp_path / "export" / "curve.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == list(config.stages)


def test_two_processes_equal_one(recipe: Recipe) -> None:
    results = []
    for size in (1, 2):
        config = recipe(f"ranks{size}")
        config.stages["pretrain"].init_from.clear()
        if size == 1:
            run_part(World(), config, "pretrain")
        else:
            Launch(2, run_part, config, "pretrain").join()
        lines = (Path(config.run_dir) / "pretrain" / "curve.jsonl").read_text().splitlines()
        results.append([json.loads(line)["grad_norm"] for line in lines if "grad_norm" in line])
    assert len(results[0]) == 4
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def test_tokenizer_is_deterministic_and_total(tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=700, num_scenes=60)
    for name in "ab":
        train_tokenizer(tmp_path / name / "tokenizer.model", config, seed=0)
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()


def test_tokenizer_reads_prompts_and_any_text(prepared: TrainConfig) -> None:
    tokenizer = load_tokenizer(prepared)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for index in range(1, 33):
        assert len(tokenizer.encode(f" {index} ")) == 1, index
    text = "Was ist das?\nEin Bär, 42 % — 你好"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bank_rows_are_the_scenes_of_their_seeds(prepared: TrainConfig) -> None:
    clips = clip_bank(prepared, "train")
    assert clips.frames.shape == (8, 4, 32, 32, 3)
    assert clips.masks.shape == (8, 4, 16, 16)
    assert clips.masks.max() <= 3
    again = bank.open_bank(
        Path(prepared.bank_dir), split="train", num_clips=2, num_frames=4, image_size=32, patch_size=8, workers=1
    )
    np.testing.assert_array_equal(again.frames, clips.frames[:2])
    assert sample_scene(0, "train").seed == 0


def test_a_killed_rendering_goes_on_and_gives_the_same_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "_CHUNK", 3)
    sizes = {"split": "train", "num_clips": 8, "num_frames": 2, "image_size": 32, "patch_size": 8}
    whole = bank.open_bank(tmp_path / "whole", **sizes)
    calls: list[range] = []
    render = bank._render_rows

    def dies_in_second_chunk(seeds: range, *rest: object, **options: object) -> dict[str, object]:
        calls.append(seeds)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render(seeds, *rest, **options)

    monkeypatch.setattr(bank, "_render_rows", dies_in_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        bank.open_bank(tmp_path / "killed", **sizes)
    again = bank.open_bank(tmp_path / "killed", **sizes)
    assert calls == [range(3), range(3, 6), range(3, 6), range(6, 8)]
    for name in ("frames", "targets", "masks"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["train-2x32-p8"]


def test_a_damaged_rendering_starts_anew(tmp_path: Path) -> None:
    writing = tmp_path / ".writing-train-2x32-p8"
    writing.mkdir()
    (writing / "rows.txt").write_text("0\n")
    (writing / "frames.npy").write_bytes(b"\x93NUMPY")
    frames = bank.open_bank(tmp_path, split="train", num_clips=2, num_frames=2, image_size=32, patch_size=8).frames
    assert frames.any(axis=(1, 2, 3, 4)).all()


def test_mp4_keeps_shape_and_roughly_the_pixels(prepared: TrainConfig) -> None:
    frames = np.asarray(clip_bank(prepared, "train").frames[0])
    decoded = through_h264(frames)
    assert decoded.shape == frames.shape
    assert 0 < np.abs(decoded.astype(int) - frames).mean() < 12


def test_an_epoch_shows_every_frame_once() -> None:
    seen = [batch_frames((3, 4), 2, seed=1, step=step) for step in range(12)]
    flat = [(int(c), int(f)) for clips, frames in seen for c, f in zip(clips, frames, strict=True)]
    assert sorted(flat[:12]) == sorted(flat[12:]) == [(c, f) for c in range(3) for f in range(4)]
    assert flat[:12] != flat[12:]
    assert [shuffled(i, 5, seed=0) for i in range(5)] != [shuffled(i, 5, seed=1) for i in range(5)]


def test_positions_start_as_distinct_waves() -> None:
    table = sincos_positions(3, 16)
    assert table.shape == (10, 16)
    assert not table[0].any()
    assert len({tuple(row.tolist()) for row in table[1:].round(decimals=5)}) == 9
    with pytest.raises(ValueError, match="hidden_size=18"):
        sincos_positions(3, 18)


def test_the_experiment_composes() -> None:
    with initialize_config_module("aurora.configs", version_base="1.3"):
        raw = compose("train", overrides=["experiment=aurora_tiny", "scale=0.5"])
    config = load_config(raw, TrainConfig)
    assert list(config.stages) == ["tower", "decoder", "pretrain", "vision", "language"]
    assert config.stages["tower"].precision is Precision.bf16
    assert config.model.vision.grid_size == 12
    assert config.scale == 0.5
    with initialize_config_module("aurora.configs", version_base="1.3"):
        raw = compose("train", overrides=["experiment=aurora_tiny", "+stages.tower.num_step=3"])
    with pytest.raises(ValueError, match="num_step"):
        load_config(raw, TrainConfig)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageConfig(num_steps=0), "stage.num_steps=0"),
        (lambda: StageConfig(token_kept_ratios=[1.5]), "want numbers in"),
        (lambda: StageConfig(num_captions=6), "want 0 to 5"),
        (lambda: TrainConfig(scale=0.0), "scale=0.0"),
        (lambda: TrainConfig(workers=0), "workers=0"),
        (lambda: TrainConfig(export_only=True), "want export_dir"),
        (lambda: TrainConfig(parts=["x"], stages={"tower": StageConfig()}), r"parts=\['x'\]"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_used_run_folder_is_refused_without_resume(recipe: Recipe) -> None:
    config = replace(recipe("used"), resume=False)
    with pytest.raises(ValueError, match="holds a run"):
        train(config)
