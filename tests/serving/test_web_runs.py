import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aurora.captioning import BUNDLED_MODEL
from aurora.data.bundled import MEDIA, read_clips
from aurora.generation.sampling import SamplingConfig
from aurora.model.merge import MergeConfig, Schedule
from aurora.processing.image import AspectRatio
from aurora.runtime import RuntimeConfig
from aurora.serving import web_view
from aurora.serving.web_runs import (
    BUNDLED,
    FOLDER,
    HUB_ID,
    Limits,
    Loaded,
    Models,
    Sessions,
    Wish,
    caption,
    encode,
    prompts_for,
)

CLIP = read_clips(MEDIA)[0]
PROMPT = "Describe the video in detail."


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Models(RuntimeConfig(device="cpu")).load(str(BUNDLED_MODEL))


def wish(**changed: object) -> Wish:
    values = {"path": MEDIA / CLIP.file, "prompt": PROMPT, "merge": MergeConfig(token_kept_ratio=0.2)}
    return Wish(**{**values, **changed})


def test_a_caption_grows_and_ends_with_figures(loaded):
    steps = list(caption(loaded, wish(), lambda: ""))
    texts = [step.caption for step in steps]
    assert texts[0] == ""
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert CLIP.facts["colour"] in texts[-1]
    assert CLIP.facts["shape"] in texts[-1]
    made = steps[-1].figures
    assert all(step.figures is None for step in steps[:-1])
    assert set(made.seconds) == {"read", "preprocess", "encode", "prefill", "decode"}
    merged = steps[-1].merged
    text = loaded.model.config.text
    per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    assert made.cache_bytes == per_token * merged.num_tokens
    assert made.cache_bytes_unmerged == per_token * 8 * 144
    assert made.memory_bytes is None or made.memory_bytes > 50e6


def test_the_caption_is_the_one_of_generate(loaded):
    *_, last = caption(loaded, wish(sampling=SamplingConfig(max_new_tokens=20)), lambda: "")
    pixels = loaded.processor.image_processor.preprocess_frames(last.merged.visual.frames)
    inputs = loaded.processor(text=loaded.processor.build_prompt(PROMPT, len(pixels)))
    ids = loaded.model.generate(
        inputs["input_ids"], pixel_values_videos=pixels[None], token_kept_ratio=0.2, max_new_tokens=20
    )
    assert last.caption == loaded.processor.decode(ids[0], skip_special_tokens=True).strip()
    assert last.figures.new_tokens == 20


@pytest.mark.parametrize(
    ("merge", "tokens"),
    [
        (MergeConfig(token_kept_ratio=1.0), 1152),
        (MergeConfig(token_kept_ratio=0.2), 384),
        (MergeConfig(visual_token_budget=512), 512),
    ],
)
def test_counts_are_those_the_model_delivers(loaded, merge, tokens):
    merged = encode(loaded, wish(merge=merge))
    assert merged.num_tokens == sum(map(sum, merged.prefix.features.counts)) == tokens
    assert f'data-tokens="{tokens}"' in web_view.maps(merged)


def test_another_aspect_ratio_leaves_the_shared_model_alone(loaded, tmp_path):
    file = tmp_path / "wide.png"
    Image.fromarray(np.arange(40 * 160 * 3, dtype=np.uint8).reshape(40, 160, 3)).save(file)
    before = loaded.processor.image_processor.config.aspect_ratio
    padded = encode(loaded, wish(path=file, aspect_ratio=AspectRatio.pad))
    own = encode(loaded, wish(path=file))
    assert not np.array_equal(padded.pictures[0], own.pictures[0])
    assert loaded.processor.image_processor.config.aspect_ratio is before
    assert own.visual.is_image


def test_a_run_stops_within_a_step(loaded):
    reasons, pieces = [""], []
    sampling = SamplingConfig(min_new_tokens=600, max_new_tokens=600)
    for step in caption(loaded, wish(sampling=sampling), lambda: reasons[-1]):
        pieces.append(step)
        if step.caption:
            reasons.append("cancelled")
    assert pieces[-1].stopped == "cancelled"
    assert pieces[-1].figures is None
    assert len(pieces[-1].caption) < 600
    deadline = time.monotonic() + 5
    while any(thread.name == "aurora-generate" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the generation goes on"
        time.sleep(0.05)


def test_a_run_that_is_cancelled_while_it_encodes_generates_nothing(loaded):
    (only,) = caption(loaded, wish(), lambda: "cancelled")
    assert (only.caption, only.stopped) == ("", "cancelled")


def test_sessions_are_apart_and_time_is_bounded():
    sessions = Sessions()
    assert sessions.begin("a", 1)
    assert sessions.begin("b", 1)
    assert not sessions.begin("c", 1)
    first, second = sessions.stopper("a", 60), sessions.stopper("b", 60)
    assert sessions.cancel("a")
    assert (first(), second()) == ("cancelled", "")
    assert sessions.busy("a")
    sessions.end("a")
    assert not sessions.busy("a")
    assert not sessions.cancel("a")
    assert sessions.cancel("b", "moved on")
    assert second() == "moved on"
    late = sessions.stopper("c", 0.01)
    time.sleep(0.02)
    assert late().startswith("stopped after 0.01 s")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_frames": 33}, "frames=33: want 1 to 32"),
        ({"num_frames": 0}, "frames=0: want 1 to 32"),
        ({"sampling": SamplingConfig(max_new_tokens=2000)}, "new tokens=2000: want at most 1024"),
        ({"prompt": "x" * 5000}, "prompt: got 5000 letters"),
        ({"prompt": " "}, "prompt: is empty"),
        ({"prompt": "what is <image>?"}, "prompt: holds <image>"),
    ],
)
def test_wishes_beyond_the_limits_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        wish(**changed).check(Limits())


@pytest.mark.parametrize("content", [b"", b"no video", (MEDIA / CLIP.file).read_bytes()[:9000]])
def test_broken_files_are_refused(loaded, tmp_path, content):
    file = tmp_path / "broken.mp4"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.mp4: "):
        encode(loaded, wish(path=file))


def test_the_chooser_takes_what_it_may():
    models = Models(RuntimeConfig(), ["owner/seven", BUNDLED], any_model=False)
    assert models.choices == ["owner/seven", BUNDLED]
    assert models.path_of("owner/seven", "") == "owner/seven"
    assert models.path_of(BUNDLED, "/etc") == str(BUNDLED_MODEL)
    for choice in (FOLDER, HUB_ID, "/etc"):
        with pytest.raises(ValueError, match="want one of owner/seven, aurora-tiny"):
            models.path_of(choice, "/etc")


def test_a_named_model_is_checked_before_it_is_loaded(tmp_path):
    models = Models(RuntimeConfig(), any_model=True)
    assert models.path_of(FOLDER, f" {tmp_path} ") == str(tmp_path)
    assert models.path_of(HUB_ID, "wchai/AuroraCap-7B-VID-xtuner") == "wchai/AuroraCap-7B-VID-xtuner"
    for choice, typed in [
        (FOLDER, ""),
        (FOLDER, str(tmp_path / "none")),
        (HUB_ID, ""),
        (HUB_ID, "../etc"),
        (HUB_ID, "a"),
    ]:
        with pytest.raises(ValueError, match=r"folder|hub id"):
            models.path_of(choice, typed)
    kept = models.load(str(BUNDLED_MODEL))
    with pytest.raises(ValueError, match=str(tmp_path)):
        models.load(str(tmp_path))
    assert models.ready(str(BUNDLED_MODEL)) is kept, "a mistake unloads nothing"


def test_a_model_is_loaded_once():
    models = Models(RuntimeConfig(device="cpu"))
    assert models.ready(str(BUNDLED_MODEL)) is None
    first = models.load(str(BUNDLED_MODEL))
    assert models.load(str(BUNDLED_MODEL)) is first is models.ready(str(BUNDLED_MODEL))


def test_presets_speak_the_models_words():
    own, general = prompts_for(BUNDLED), prompts_for("owner/seven")
    assert set(own) == set(general)
    assert len(own) == 5
    assert own["camera"] != general["camera"]


def test_limits_are_checked():
    with pytest.raises(ValueError, match=r"limits\.max_frames=0: want at least 1"):
        Limits(max_frames=0)


def test_messages_are_escaped(loaded):
    assert "<script>" not in web_view.note("<script>alert(1)</script>", "error")
    assert 'role="alert"' in web_view.note("x", "error")
    assert web_view.note("") == ""
    *_, last = caption(loaded, wish(sampling=SamplingConfig(max_new_tokens=4)), lambda: "")
    assert "&lt;b&gt;" in web_view.figures(last.merged, last.figures, "<b>")
    assert "384 of 1,152 (33%)" in web_view.figures(last.merged, last.figures, "x")


def test_a_schedule_that_keeps_more_than_asked_is_explained(loaded):
    published = MergeConfig(token_kept_ratio=0.2)
    assert "keeps more than asked" in web_view.maps(encode(loaded, wish(merge=published)))
    for merge in (MergeConfig(token_kept_ratio=0.2, schedule=Schedule.exact), MergeConfig(visual_token_budget=64)):
        assert "more than asked" not in web_view.maps(encode(loaded, wish(merge=merge)))


def test_a_map_without_merging_says_so(loaded):
    drawn = web_view.maps(encode(loaded, wish(merge=MergeConfig())))
    assert "Nothing merged" in drawn
    assert "outlined" not in drawn


def test_long_clips_show_some_of_their_frames(loaded):
    drawn = web_view.maps(encode(loaded, wish(num_frames=12)))
    assert drawn.count("<figure") == web_view.SHOWN_FRAMES
    assert "8 of 12 frames are shown" in drawn
    assert Path(CLIP.file).name not in drawn
