"""What the bundled aurora-tiny says: right about the demo clips, changing as a clip changes, and never by luck."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aurora.captioning import BUNDLED_MODEL
from aurora.data.bundled import MEDIA, read_clips
from aurora.data.tinyworld import Category, Scene, caption_prompts, render_clip, sample_scene, write_mp4
from aurora.data.tinyworld.scene import COLOURS, MOTIONS
from aurora.evaluation.run import noise_like
from aurora.evaluation.structured import StructuredCaptioner
from aurora.evaluation.tinyvdc import REQUIRED, parse, score
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import sample_frames

Frames = NDArray[np.uint8]
NUM_FRAMES = 8
MERGED = {"token_kept_ratio": 0.4, "schedule": "exact"}
OPPOSITE = {"leftward": "rightward", "rightward": "leftward", "upward": "downward", "downward": "upward"}
MIRRORED = {"leftward": "rightward", "rightward": "leftward", "left": "right", "right": "left"}
REVERSED = {"left": "right", "right": "left", "inward": "outward", "outward": "inward"}
"""Camera moves of a clip that is played backwards."""
ENOUGH = 0.75
"""Share of the clips that must be right before and after a change; the model is small and not always right."""


@cache
def captioner(*categories: Category) -> StructuredCaptioner:
    questions = {category.value: caption_prompts(category)[0] for category in categories or tuple(Category)}
    model = AuroraForConditionalGeneration.from_pretrained(BUNDLED_MODEL)
    processor = AuroraProcessor.from_pretrained(BUNDLED_MODEL)
    return StructuredCaptioner(model, processor, questions, max_new_tokens=80)


def through_mp4(frames: Frames, folder: Path, name: str) -> Frames:
    """What a model sees of a clip that was written to a file."""
    write_mp4(np.ascontiguousarray(frames), folder / f"{name}.mp4")
    return sample_frames(folder / f"{name}.mp4", NUM_FRAMES).frames


def stated(clips: list[Frames], *categories: Category) -> list[dict[str, str]]:
    """Facts of each clip as its captions of these categories state them."""
    made = [
        row
        for start in range(0, len(clips), 6)
        for row in captioner(*categories).caption(clips[start : start + 6], **MERGED)
    ]
    return [{k: v for name, text in row.captions.items() for k, v in parse(name, text).items()} for row in made]


def scenes_with(count: int, **wanted: tuple[str, ...]) -> list[Scene]:
    """The first scenes of the test split whose facts are among the wanted ones, as many of each value of the first."""
    first = next(iter(wanted))
    per_value = count // len(wanted[first])
    found: dict[str, list[Scene]] = {value: [] for value in wanted[first]}
    for seed in range(5000):
        scene = sample_scene(seed, "test")
        chosen = found.get(scene.slots[first], [])
        if all(scene.slots[slot] in values for slot, values in wanted.items()) and len(chosen) < per_value:
            chosen.append(scene)
    assert {len(chosen) for chosen in found.values()} == {per_value}
    return [scene for chosen in found.values() for scene in chosen]


def test_demo_clips_are_described_rightly_in_four_of_five_categories() -> None:
    clips = read_clips(MEDIA)
    assert len(clips) >= 3
    made = captioner().caption([sample_frames(MEDIA / clip.file, NUM_FRAMES).frames for clip in clips])
    wrong = {}
    for clip, (captions, _) in zip(clips, made, strict=True):
        for category, text in captions.items():
            facts = {slot: clip.facts[slot] for slot in REQUIRED[category]}
            if parse(category, text) != facts:
                wrong.setdefault(clip.file, []).append((category, text, facts))
    assert {file: found for file, found in wrong.items() if len(found) > 1} == {}


def test_the_demo_clips_change_as_they_are_reversed_mirrored_and_recoloured(tmp_path: Path) -> None:
    for clip in read_clips(MEDIA):
        facts, frames = clip.facts, sample_frames(MEDIA / clip.file, NUM_FRAMES).frames
        scene = sample_scene(clip.seed, "test")
        colour = next(name for name in COLOURS if name not in (scene.colour, scene.tiny_colour))
        painted = render_clip(replace(scene, colour=colour), num_frames=NUM_FRAMES, image_size=frames.shape[1])
        clips = [frames[::-1], frames[:, :, ::-1], through_mp4(painted, tmp_path, clip.file)]
        backward, mirrored, recoloured = stated(clips, Category.main_object, Category.camera)
        assert backward["camera"] == REVERSED.get(facts["camera"], facts["camera"]), clip
        assert mirrored["camera"] == MIRRORED.get(facts["camera"], facts["camera"]), clip
        assert mirrored["start"] == MIRRORED.get(facts["start"], facts["start"]), clip
        assert recoloured["colour"] == colour, clip
        if facts["motion"] in OPPOSITE:
            assert backward["motion"] == OPPOSITE[facts["motion"]], clip
            assert mirrored["motion"] == MIRRORED.get(facts["motion"], facts["motion"]), clip


def test_a_reversed_clip_moves_the_other_way(tmp_path: Path) -> None:
    scenes = scenes_with(12, motion=tuple(OPPOSITE))
    clips = [render_clip(scene) for scene in scenes]
    forward = stated([through_mp4(clip, tmp_path, "a") for clip in clips], Category.main_object)
    backward = stated([through_mp4(clip[::-1], tmp_path, "b") for clip in clips], Category.main_object)
    pairs = [(scene.motion, a.get("motion"), b.get("motion")) for scene, a, b in zip(scenes, forward, backward)]
    right = [a == motion and b == OPPOSITE[motion] for motion, a, b in pairs]
    assert np.mean(right) >= ENOUGH, pairs


def test_a_mirrored_clip_changes_sides(tmp_path: Path) -> None:
    scenes = scenes_with(12, motion=MOTIONS[:4], camera=("left", "right"))
    clips = [render_clip(scene) for scene in scenes]
    asked = (Category.main_object, Category.camera)
    before = stated([through_mp4(clip, tmp_path, "a") for clip in clips], *asked)
    after = stated([through_mp4(clip[:, :, ::-1], tmp_path, "b") for clip in clips], *asked)
    for slot in ("motion", "start", "camera"):
        pairs = [(scene.slots[slot], a.get(slot), b.get(slot)) for scene, a, b in zip(scenes, before, after)]
        right = [a == fact and b == MIRRORED.get(fact, fact) for fact, a, b in pairs]
        assert np.mean(right) >= ENOUGH, (slot, pairs)


def test_a_recoloured_object_changes_its_colour_word(tmp_path: Path) -> None:
    scenes = scenes_with(8, colour=COLOURS)
    others = []
    for scene in scenes:
        shift = 3 if COLOURS[(COLOURS.index(scene.colour) + 3) % len(COLOURS)] != scene.tiny_colour else 5
        others.append(replace(scene, colour=COLOURS[(COLOURS.index(scene.colour) + shift) % len(COLOURS)]))
    rows = [
        stated([through_mp4(render_clip(scene), tmp_path, "a") for scene in group], Category.main_object)
        for group in (scenes, others)
    ]
    pairs = [
        (scene.colour, a.get("colour"), other.colour, b.get("colour"))
        for scene, other, a, b in zip(scenes, others, *rows, strict=True)
    ]
    assert np.mean([a == colour and b == wanted for colour, a, wanted, b in pairs]) >= ENOUGH, pairs


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Scene], list[Frames], list[dict[str, str]]]:
    """Test clips with what the bundled model says about them in the five categories."""
    folder = tmp_path_factory.mktemp("clips")
    scenes = [sample_scene(seed, "test") for seed in range(700, 720)]
    clips = [through_mp4(render_clip(scene), folder, str(scene.seed)) for scene in scenes]
    return scenes, clips, describe(clips)


def describe(clips: list[Frames]) -> list[dict[str, str]]:
    return [
        row.captions
        for start in range(0, len(clips), 6)
        for row in captioner().caption(clips[start : start + 6], **MERGED)
    ]


def test_most_facts_are_right_and_only_about_the_clip_itself(described) -> None:
    scenes, _, captions = described
    facts = [scene.to_dict() for scene in scenes]
    own = score(captions, facts, resamples=50)
    other = score([*captions[5:], *captions[:5]], facts, resamples=50)
    assert own.mean.accuracy >= 0.7
    assert min(entry.accuracy for entry in own.categories.values()) >= 0.4
    assert other.mean.accuracy <= other.mean.chance + 0.03


def test_noise_tells_nothing(described) -> None:
    scenes, clips, captions = described
    made = describe([noise_like(clip, scene.seed) for scene, clip in zip(scenes, clips, strict=True)])
    report = score(made, [scene.to_dict() for scene in scenes], resamples=50)
    assert report.mean.accuracy <= report.mean.chance + 0.03
    assert score(captions, [scene.to_dict() for scene in scenes], resamples=50).mean.accuracy > 2 * report.mean.accuracy
