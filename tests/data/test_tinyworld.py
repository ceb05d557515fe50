"""TinyWorld: deterministic, diverse, truthful in pictures and in words, and safe on disk."""

import hashlib
import json
import re
import string
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from aurora.data.tinyworld import (
    FRAME_TASKS,
    SLOT_WORDS,
    SLOTS,
    Category,
    DatasetConfig,
    caption_prompts,
    captions,
    frame_masks,
    frame_targets,
    language,
    qa_pairs,
    render_clip,
    render_frame,
    sample_scene,
    storyboard,
    text_corpus,
    write_dataset,
    write_mp4,
)
from aurora.data.tinyworld.scene import CAMERAS, COLOURS, HELD_OUT_PAIRS, SHAPES, main_centre, to_frame

GOLDEN_BACKGROUND = "city"
GOLDEN_MEAN = (168.02, 170.25, 179.29)


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def test_same_seed_same_clip_and_other_seed_another() -> None:
    first, again = sample_scene(7), sample_scene(7)
    assert first == again
    assert np.array_equal(render_clip(first), render_clip(again))
    assert sample_scene(8) != first
    assert replace(sample_scene(7, "val"), split="train") != first


def test_clip_is_pinned() -> None:
    scene = sample_scene(3, "test")
    assert scene.slots["background"] == GOLDEN_BACKGROUND
    clip = render_clip(scene)
    assert clip.shape == (8, 96, 96, 3)
    assert clip.dtype == np.uint8
    # Means, not bytes: sine and cosine may differ in the last bit between machines.
    assert np.allclose(clip.mean(axis=(0, 1, 2)), GOLDEN_MEAN, atol=0.02)


def test_splits_hold_out_pairs() -> None:
    pairs: dict[str, Counter[tuple[str, str]]] = {split: Counter() for split in ("train", "val", "test", "heldout")}
    for split, counter in pairs.items():
        for seed in range(600):
            scene = sample_scene(seed, split)
            counter[(scene.colour, scene.shape)] += 1
            assert scene.held_out == ((scene.colour, scene.shape) in HELD_OUT_PAIRS)
    assert not HELD_OUT_PAIRS & set(pairs["train"])
    assert not HELD_OUT_PAIRS & set(pairs["val"])
    assert set(pairs["heldout"]) == HELD_OUT_PAIRS
    share = sum(pairs["test"][pair] for pair in HELD_OUT_PAIRS) / 600
    assert 0.06 < share < 0.15
    assert len(HELD_OUT_PAIRS) / (len(COLOURS) * len(SHAPES)) == pytest.approx(0.1, abs=0.01)
    assert {c for c, _ in pairs["train"]} == set(COLOURS)
    assert {s for _, s in pairs["train"]} == set(SHAPES)


def test_bad_split_and_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="split='dev': want one of train"):
        sample_scene(0, "dev")
    with pytest.raises(ValueError, match="seed=-1"):
        sample_scene(-1)


def test_every_value_of_every_slot_occurs_evenly() -> None:
    scenes = [sample_scene(seed) for seed in range(1500)]
    for slot, values in SLOTS.items():
        counts = Counter(scene.slots[slot] for scene in scenes)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.6 * 1500 / len(values), (slot, counts)
    assert len({tuple(scene.slots.values()) for scene in scenes}) > 1490


def test_main_object_starts_on_its_side_and_stays_in_view() -> None:
    sides = {"left": (0.0, 0.36), "center": (0.36, 0.64), "right": (0.64, 1.0)}
    for seed in range(300):
        scene = sample_scene(seed)
        low, high = sides[scene.start]
        x, _ = to_frame(scene, *main_centre(scene, 0.0), 0.0)
        assert low <= x <= high
        x, y = to_frame(scene, *main_centre(scene, np.linspace(0, 1, 8)), np.linspace(0, 1, 8))
        assert np.mean((x > 0.02) & (x < 0.98) & (y > 0.02) & (y < 0.98)) >= 0.75, scene


@pytest.mark.parametrize("camera", CAMERAS)
def test_camera_moves_what_rests(camera: str) -> None:
    scene = replace(sample_scene(1), camera=camera, landmark_x=0.5, sky_x=0.5)
    first, last = frame_targets(scene, 0.0), frame_targets(scene, 1.0)
    shift = np.sign(last["landmark_x"] - first["landmark_x"])
    assert shift == {"left": 1, "right": -1}.get(camera, 0)
    assert np.sign(last["view"] - first["view"]) == {"inward": -1, "outward": 1}.get(camera, 0)
    if camera == "vertical":
        assert last["landmark_y"] > first["landmark_y"]


def test_main_mask_and_pixels_follow_the_targets() -> None:
    # The median colour under the main mask is nearest to the main colour, and the mask lies where x and y say.
    from aurora.data.tinyworld.backdrop import PALETTE

    right = total = 0
    for seed in range(80):
        scene = replace(sample_scene(seed), weather="clear", time="noon", size="large")
        targets, mask = frame_targets(scene, 0.5), frame_masks(scene, 0.5)
        assert mask.shape == (144, 16)
        assert mask.dtype == np.uint8
        assert mask.max() <= 3
        grid = mask.reshape(12, 12, 4, 4).transpose(0, 2, 1, 3).reshape(48, 48)
        pixels = render_frame(scene, 0.5)[1::2, 1::2][grid == 1].astype(float)
        if len(pixels) < 40:
            continue
        median = np.median(pixels, axis=0)
        nearest = min(COLOURS, key=lambda c: float(np.abs(median - np.asarray(PALETTE[c])).sum()))
        rows, columns = np.nonzero(grid == 1)
        if 2 < targets["main_x"] < 9 and 2 < targets["main_y"] < 9:
            assert abs(columns.mean() / 4 - targets["main_x"] - 0.5) < 1.6, scene
            assert abs(rows.mean() / 4 - targets["main_y"] - 0.5) < 1.6, scene
        total, right = total + 1, right + (nearest == scene.colour)
    assert total > 60
    assert right / total > 0.97


def test_frame_targets_are_in_range() -> None:
    for seed in range(100):
        for t in (0.0, 0.4, 1.0):
            targets = frame_targets(sample_scene(seed), t)
            assert set(targets) == set(FRAME_TASKS)
            assert all(0 <= value < FRAME_TASKS[name] for name, value in targets.items())


@pytest.mark.parametrize(("slot", "values"), [(s, SLOTS[s]) for s in ("weather", "time", "background", "count")])
def test_each_value_looks_different_in_every_frame(slot: str, values: tuple[str, ...]) -> None:
    scene = sample_scene(11)
    scenes = [replace(scene, **{slot: value}) for value in values]  # type: ignore[arg-type]
    clips = [render_clip(other, num_frames=4).astype(int) for other in scenes]
    for i, clip in enumerate(clips):
        for other in clips[:i]:
            difference = np.abs(clip - other).max(axis=-1) > 24  # (frames, H, W)
            assert difference.mean(axis=(1, 2)).min() > 0.008, (slot, values[i])


def test_other_sizes_show_the_same_picture() -> None:
    scene = sample_scene(5)
    small = render_clip(scene, num_frames=2)
    for size, factor in ((192, 2), (384, 4)):
        large = render_clip(scene, num_frames=2, image_size=size).astype(float)
        shrunk = large.reshape(2, 96, factor, 96, factor, 3).mean(axis=(2, 4))
        assert np.abs(shrunk - small).mean() < 12
    assert frame_masks(scene, 0.0, 378, 14).shape == (729, 16)
    with pytest.raises(ValueError, match="patch_size=7"):
        frame_masks(scene, 0.0, 96, 7)


def test_captions_name_their_slots_and_vary() -> None:
    scene = sample_scene(2)
    for category in Category:
        wordings = {captions(scene, seed)[category] for seed in range(60)}
        assert len(wordings) >= 6, category
        assert captions(scene, 1) == captions(scene, 1)
        assert caption_prompts(category) == caption_prompts(category.value)
    with pytest.raises(ValueError, match="category='long'"):
        caption_prompts("long")


def all_templates() -> list[str]:
    groups = (language._SHORT, language._MAIN, language._TINY, language._PLACE)
    return [t for group in (*groups, language._BACKGROUND, language._LENS, language._CAMERA) for t in group]


def test_at_least_40_templates_without_slot_words() -> None:
    templates = all_templates()
    assert len(set(templates)) >= 40
    for template in templates:
        fixed = re.sub(r"\{\w+\}", "", template)
        assert not set(words_of(fixed.lower())) & SLOT_WORDS, template


def test_no_word_before_a_slot_depends_on_its_value() -> None:
    for template in all_templates():
        for _, field, _, _ in string.Formatter().parse(template):
            assert field is None or field in SLOTS
        assert not re.search(r"\b(a|an|are|is) \{(count|colour|tiny_colour|weather|background)\}", template), template


def test_first_word_of_each_class_is_its_own() -> None:
    for slot, values in SLOTS.items():
        firsts = [language.CAMERA_PHRASES.get(value, value).split()[0] for value in values]
        assert len(set(firsts)) == len(values), slot


def test_vocabulary_is_small_and_questions_cover_all_slots() -> None:
    vocabulary: set[str] = set()
    for seed in range(400):
        scene = sample_scene(seed)
        pairs = qa_pairs(scene, seed)
        assert {pair.slot for pair in pairs} == set(SLOTS)
        assert all(1 <= len(pair.answer.split()) <= 3 for pair in pairs)
        for text in (*captions(scene, seed).values(), *(f"{p.question} {p.answer}" for p in pairs)):
            vocabulary.update(words_of(text))
    assert vocabulary >= SLOT_WORDS
    assert len(vocabulary) <= 250


def test_storyboard_tells_every_slot() -> None:
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for seed in range(150):
        scene = sample_scene(seed)
        frames = storyboard(scene, seed)
        assert len(frames) == 8
        for frame in frames:
            flat = {word for entity in frame for word in entity}
            for slot in set(SLOTS) - {"motion", "start", "camera", "tiny_shape"}:
                assert scene.slots[slot] in flat, slot
            assert flat & {scene.tiny_shape, language.PLURALS[scene.tiny_shape]}
        for t in (0, 7):
            (spot,) = [entity for entity in frames[t] if "landmark" in entity]
            seen[scene.camera, spot[1] + str(t)].add(str(seed))
    assert {"za0", "ze7"} <= {k for c, k in seen if c == "outward"}


def test_text_corpus_holds_every_word() -> None:
    lines = list(text_corpus(300, 0))
    corpus = set(words_of(" ".join(lines)))
    assert corpus >= SLOT_WORDS
    assert set(language.STORY_WORDS) <= corpus
    assert {word for c in Category for p in caption_prompts(c) for word in words_of(p)} <= corpus


def test_mp4_is_h264_and_shows_the_clip(tmp_path: Path) -> None:
    clip = render_clip(sample_scene(4))
    path = tmp_path / "clip.mp4"
    write_mp4(clip, path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == clip.shape
    assert np.abs(frames.astype(int) - clip).mean() < 8
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    first = hashlib.sha256(path.read_bytes()).hexdigest()
    write_mp4(clip, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == first


def test_mp4_refuses_odd_sides_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="95 x 96"):
        write_mp4(np.zeros((2, 95, 96, 3), np.uint8), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="float64"):
        write_mp4(np.zeros((2, 96, 96, 3)), tmp_path / "a.mp4")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_dataset_on_disk(tmp_path: Path) -> None:
    config = DatasetConfig(folder=str(tmp_path / "world"), split="test", num_clips=2, num_frames=4)
    path = write_dataset(config, progress=False)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 2 * 6
    assert len({record["id"] for record in records}) == 12
    for record in records:
        assert (path.parent / record["video"]).is_file()
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
    facts = [json.loads(line) for line in (path.parent / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert facts[1]["colour"] == sample_scene(1, "test").colour
    clip = path.parent / facts[0]["video"]
    stamp = clip.stat().st_mtime_ns
    assert write_dataset(config, progress=False).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    assert clip.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="want another path"):
        write_dataset(replace(config, crf=30), progress=False)


@pytest.mark.parametrize("wrong", [{"split": "dev"}, {"num_clips": 0}, {"image_size": 97}])
def test_dataset_config_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        DatasetConfig(**wrong)  # type: ignore[arg-type]
