"""The mini VDC: its parser reads every gold caption, and its score is what it says."""

import ast
from pathlib import Path

import numpy as np
import pytest

from aurora.data.tinyworld.language import captions
from aurora.data.tinyworld.scene import SLOTS, Scene, sample_scene
from aurora.evaluation import tinyvdc
from aurora.evaluation.tinyvdc import CATEGORIES, REQUIRED, format_report, parse, score


def gold(count: int, split: str = "test") -> tuple[list[Scene], list[dict[str, str]]]:
    scenes = [sample_scene(seed, split) for seed in range(count)]
    texts = [{k.value: v for k, v in captions(scene, scene.seed).items()} for scene in scenes]
    return scenes, texts


def test_parser_recovers_every_slot_of_2000_scenes() -> None:
    scenes, texts = gold(2000)
    for scene, text in zip(scenes, texts, strict=True):
        for category in CATEGORIES:
            want = {slot: scene.slots[slot] for slot in REQUIRED[category]}
            assert parse(category, text[category]) == want, (scene.seed, category, text[category])


def test_parser_does_not_import_the_world() -> None:
    tree = ast.parse(Path(tinyvdc.__file__).read_text(encoding="utf-8"))
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert names
    assert not [name for name in names if "aurora" in name or "tinyworld" in name or name.startswith(".")]


def test_detailed_asks_for_everything_and_slots_are_known() -> None:
    assert set(REQUIRED["detailed"]) == set(SLOTS)
    assert all(set(slots) <= set(SLOTS) for slots in REQUIRED.values())


@pytest.mark.parametrize(
    ("category", "caption", "want"),
    [
        ("short", "", {}),
        ("short", "The red star and the blue star show no motion in the city.", {
            "shape": "star", "motion": "no", "background": "city"}),
        ("camera", "The camera uses left panning or right panning.", {}),
        ("camera", "Left panning, at the right.", {"camera": "left", "start": "right"}),
        ("main_object", "the LARGE pink cross shows upward motion", {
            "size": "large", "colour": "pink", "shape": "cross", "motion": "upward"}),
        ("background", "One stick of the meadow", {"count": "one", "tiny_shape": "stick", "background": "meadow"}),
        ("background", "a green meadow with boxes at night", {
            "background": "meadow", "tiny_shape": "box", "time": "night"}),
    ],
)  # fmt: skip
def test_parse_examples(category: str, caption: str, want: dict[str, str]) -> None:
    assert parse(category, caption) == want


def test_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="category='long'"):
        parse("long", "text")


def test_gold_captions_score_one_and_empty_ones_zero() -> None:
    scenes, texts = gold(60)
    facts = [scene.to_dict() for scene in scenes]
    report = score(texts, facts, resamples=100)
    assert report.mean.accuracy == report.mean.low == 1.0
    assert score([{} for _ in facts], facts, resamples=100).mean.accuracy == 0.0
    assert "mean" in format_report(report)


def test_captions_of_other_clips_score_chance() -> None:
    scenes, texts = gold(1500)
    facts = [scene.to_dict() for scene in scenes]
    order = np.random.default_rng(0).permutation(len(texts))
    report = score([texts[i] for i in order], facts, resamples=200)
    for category, entry in report.categories.items():
        assert abs(entry.accuracy - entry.chance) < 0.04, (category, entry)
    assert report.mean.low < report.mean.accuracy < report.mean.high


def test_chance_is_the_best_constant_caption() -> None:
    scenes, texts = gold(150)
    facts = [scene.to_dict() for scene in scenes]
    report = score([texts[0]] * len(facts), facts, resamples=100)
    for entry in report.categories.values():
        assert entry.accuracy <= entry.chance + 1e-9
    same = [facts[0]] * 5
    assert score([texts[0]] * 5, same, resamples=100).mean.chance == 1.0


def test_interval_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    scenes, texts = gold(900)
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        chosen = rng.integers(0, 900, 80)
        wrong = rng.random(80) < 0.5
        mixed = [{} if bad else texts[i] for i, bad in zip(chosen, wrong, strict=True)]
        mean = score(mixed, [scenes[i].to_dict() for i in chosen], resamples=200).mean
        covered += mean.low <= 0.5 <= mean.high
    assert covered >= 50


def test_held_out_pairs_are_reported_apart() -> None:
    scenes, texts = gold(300)
    facts = [scene.to_dict() for scene in scenes]
    blind = [{} if scene.held_out else text for scene, text in zip(scenes, texts, strict=True)]
    report = score(blind, facts, resamples=100)
    assert report.held_out is not None
    assert report.held_out.mean.accuracy == 0.0
    assert 0.0 < report.mean.accuracy < 1.0
    assert report.held_out.mean.num_clips == sum(scene.held_out for scene in scenes)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 captions for 0 clips"):
        score([{}], [])
