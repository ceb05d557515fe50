"""The numbers that the repository states are those of its result files, and those are of the weights in it."""

import json
from pathlib import Path

import pytest

from aurora.captioning import BUNDLED_MODEL
from aurora.evaluation.report import markdown
from aurora.evaluation.session import checkpoint_digest
from aurora.evaluation.sweep import RATIOS
from aurora.evaluation.sweep_report import claim, comparison
from aurora.evaluation.variants import EQUAL_COUNT, MEANINGS

ROOT = Path(__file__).parents[2]


def read(name):
    return json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["tinyvdc_cpu.json", "sweep_cpu.json"])
def test_results_are_of_the_weights_in_the_package(name):
    assert read(name)["settings"]["model_sha256"] == checkpoint_digest(BUNDLED_MODEL)


def test_the_bundled_model_meets_what_was_asked_of_it():
    """On 500 unseen clips: the mean, each category, what is left when tokens merge, and noise."""
    record = read("tinyvdc_cpu.json")
    points = {point["name"]: point for point in record["points"]}
    whole = points["unmerged"]["scores"]
    assert whole["mean"]["num_clips"] == 500
    assert whole["mean"]["accuracy"] >= 0.75
    assert min(entry["accuracy"] for entry in whole["categories"].values()) >= 0.5
    for name, tokens, least in (("exact 0.4", 58, 0.98), ("exact 0.2", 29, 0.95), ("exact 0.1", 14, 0.9)):
        assert points[name]["visual_tokens_per_frame"] == tokens
        assert points[name]["retention"] >= least
    assert {"constant 0.4", "constant 0.2", "constant 0.1"} <= set(points)
    assert whole["held_out"]["mean"]["num_clips"] > 20
    noise = points["unmerged, noise"]["scores"]["mean"]
    assert abs(noise["accuracy"] - noise["chance"]) <= 0.03
    assert points["unmerged"]["other_clip"]["accuracy"] <= whole["mean"]["chance"]


def test_the_model_card_and_the_readme_state_these_numbers():
    record = read("tinyvdc_cpu.json")
    card = (BUNDLED_MODEL / "README.md").read_text(encoding="utf-8")
    rows = [line for line in markdown(record).splitlines() if line.startswith("|")]
    assert len(rows) > 20
    without_times = [row if row in card else row[: row.rindex("|", 0, -1) + 1] for row in rows]
    assert [row for row in without_times if row not in card.splitlines()] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    means = {point["name"]: point["scores"]["mean"] for point in record["points"]}
    for name in ("unmerged", "exact 0.4", "exact 0.2", "exact 0.1"):
        accuracy, low, high = (100 * means[name][key] for key in ("accuracy", "low", "high"))
        assert f"{accuracy:.1f} ({low:.1f}-{high:.1f})" in readme


def test_a_second_run_of_the_recipe_is_within_three_points_and_the_card_states_it():
    shipped, second = (
        {point["name"]: 100 * point["scores"]["mean"]["accuracy"] for point in read(name)["points"]}
        for name in ("tinyvdc_cpu.json", "tinyvdc_cpu_second_run.json")
    )
    assert shipped.keys() == second.keys()
    assert all(abs(shipped[name] - second[name]) <= 3 for name in shipped)
    assert read("tinyvdc_cpu_second_run.json")["settings"]["model_sha256"] != checkpoint_digest(BUNDLED_MODEL)
    card = (BUNDLED_MODEL / "README.md").read_text(encoding="utf-8")
    for label, means in (("shipped", shipped), ("second run", second)):
        cells = " | ".join(f"{mean:.1f}" for mean in means.values())
        assert f"| {label} | {cells} |" in card
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    unmerged, few = second["unmerged"], second["exact 0.1"]
    assert f"{unmerged:.1f} % of the facts rightly unmerged and {few:.1f} % at 14 tokens" in readme


def test_the_sweep_is_the_whole_one_and_its_page_and_the_readme_say_what_it_found():
    record = read("sweep_cpu.json")
    assert (record["num_seeds"], record["num_clips"]) == (3, 150)
    points = {(point["variant"], point["ratio"]): point for point in record["points"]}
    assert {ratio for variant, ratio in points if variant == "exact"} == set(RATIOS)
    for ratio in (0.4, 0.2):
        for variant in MEANINGS:
            tokens = points[variant, ratio]["tokens_per_frame"]
            assert (tokens == points["exact", ratio]["tokens_per_frame"]) is (variant in EQUAL_COUNT)
    page = (ROOT / "docs" / "results" / "sweep_cpu.md").read_text(encoding="utf-8")
    assert all(sentence in page for sentence in (claim(record), *comparison(record)))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    at = points["exact", 0.3]["of_unmerged"]
    stated = f"keeps {100 * at['value']:.1f} % (95 % interval {100 * at['low']:.1f} to {100 * at['high']:.1f})"
    assert stated in readme
    assert "is confirmed for aurora-tiny: at 0.3 (43 of 144 tokens a frame)" in readme
    assert "is confirmed" in claim(record)
