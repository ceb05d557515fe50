"""The demo on a checkpoint with random weights: what it prints and leaves behind."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from aurora.data import bundled
from aurora.demo import demo
from aurora.evaluation.tinyvdc import parse
from aurora.modeling import AuroraForConditionalGeneration


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "SEEDS", (1, 2))
        patch.setattr(bundled, "CLIP_FRAMES", 9)
        patch.setattr(bundled, "CLIP_PX", 64)
        bundled.make_media(folder)
    return folder


def test_clips_come_with_true_captions(media: Path) -> None:
    clips = bundled.read_clips(media)
    assert len(clips) == 2
    for clip in clips:
        assert (media / clip.file).stat().st_size > 500
        assert len(clip.facts) == 12
        assert parse("detailed", clip.caption) == clip.facts


def test_rendering_again_gives_the_same_list(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "SEEDS", (1, 2))
    monkeypatch.setattr(bundled, "CLIP_FRAMES", 2)
    monkeypatch.setattr(bundled, "CLIP_PX", 64)
    bundled.make_media(tmp_path)
    assert (tmp_path / bundled.CLIPS_FILE).read_text() == (media / bundled.CLIPS_FILE).read_text()


def test_no_two_bundled_clips_share_a_name() -> None:
    names = {f"{s['background']}_{s['shape']}" for s in (bundled.sample_scene(n, "test").slots for n in bundled.SEEDS)}
    assert len(names) == len(bundled.SEEDS)


@pytest.mark.parametrize("content", ["[", '[{"file": "a.mp4"}]', "7"], ids=["not json", "fields", "not a list"])
def test_a_broken_list_of_clips_is_refused_by_name(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clips\.json.*make_media"):
        bundled.read_clips(tmp_path)
    (tmp_path / bundled.CLIPS_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"clips\.json.*want a list"):
        bundled.read_clips(tmp_path)


def test_demo_prints_a_table_and_saves_pictures(
    media: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("aurora.demo.MAX_NEW_TOKENS", 6)
    printed = io.StringIO()
    console = Console(file=printed, width=80, highlight=False)
    output = tmp_path / "outputs" / "demo"
    results = demo(model_path=tiny_checkpoint, media=media, output=output, ratios=(1.0, 0.1), console=console)

    model = AuroraForConditionalGeneration.from_pretrained(tiny_checkpoint)
    clips = bundled.read_clips(media)
    assert list(results) == [clip.file for clip in clips]
    text = printed.getvalue()
    for clip in clips:
        whole, merged = results[clip.file]
        planned = [p.num_visual_tokens for p in model.model.plan(8, 64, 64, model.merge_config(token_kept_ratio=0.1))]
        assert (whole.counts, merged.counts) == ([64] * 8, planned)
        assert whole.patches == merged.patches == 8 * 64
        assert set(merged.seconds) == {"encode", "prefill", "decode", "warmup"}
        picture = output / f"merge_{Path(clip.file).stem}.png"
        assert str(picture) in text
        assert np.asarray(Image.open(picture)).std() > 10
        assert clip.caption.split()[0] in text
        assert f"{sum(planned)} of 512" in text
    assert len(list(output.iterdir())) == 2
    assert "\x1b" not in text  # no escape codes where the terminal cannot show them
    prose = [line for line in text.splitlines() if "what merged:" not in line and "visual_input=" not in line]
    assert [line for line in prose if len(line) > 80] == []
