"""Merge plans: the published r schedule, and what exact, linear, list and budget promise."""

from typing import Any

import pytest

from aurora.model.merge import MergeConfig, MergePlan, Schedule, plan_clip, plan_merge
from aurora.model.vision import VisionConfig
from tests.golden import load_index

GRIDS = [(rows, columns) for rows in range(2, 41) for columns in range(2, 41)]
SCHEDULE = load_index("r_schedule")


def _vision(layers: int) -> VisionConfig:
    return VisionConfig(num_layers=layers)


def _plan(config: MergeConfig, height: int, width: int, *, layers: int = 32, active: int | None = None) -> MergePlan:
    active = layers - 1 if active is None else active
    return plan_merge(config, height_px=height, width_px=width, vision=_vision(layers), num_active_layers=active)


def _clip(config: MergeConfig, num_frames: int, height: int, width: int, layers: int = 32) -> tuple[MergePlan, ...]:
    return plan_clip(
        config,
        num_frames=num_frames,
        height_px=height,
        width_px=width,
        vision=_vision(layers),
        num_active_layers=layers - 1,
    )


def _assert_sound(plan: MergePlan, num_patches: int, active: int) -> None:
    assert len(plan.r) == active
    assert len(plan.tokens) == active + 1
    assert plan.tokens[0] == plan.num_patches == num_patches
    assert plan.tokens[-1] == plan.num_visual_tokens >= 1
    for before, r, after in zip(plan.tokens[:-1], plan.r, plan.tokens[1:], strict=True):
        assert 0 <= r <= before // 2  # the class token comes on top and is never merged
        assert after == before - r


@pytest.mark.parametrize("row", SCHEDULE["rows"], ids=lambda row: f"{row['height']}x{row['width']}-{row['kept_ratio']}")
def test_constant_is_the_published_schedule(row: dict[str, Any]) -> None:
    config = MergeConfig(token_kept_ratio=row["kept_ratio"])
    last, before = (_plan(config, row["height"], row["width"], active=active) for active in (32, 31))
    assert last.r[0] == row["r"]
    assert max(last.r) == row["r"]
    assert [n + 1 for n in last.tokens] == row["tokens_per_hidden_state_incl_cls"]
    assert last.num_visual_tokens == row["visual_tokens_last_layer"]
    assert before.num_visual_tokens == row["visual_tokens_selected_layer_m2"]
    assert before.num_patches == row["patches"]


def test_the_reference_has_36_rows() -> None:
    assert len(SCHEDULE["rows"]) == 36


@pytest.mark.parametrize(
    "case", SCHEDULE["float_truncation_examples"], ids=lambda c: f"{c['height']}x{c['width']}-{c['kept']}"
)
def test_r_is_floored_in_the_published_double_precision_order(case: dict[str, Any]) -> None:
    plan = _plan(
        MergeConfig(token_kept_ratio=float(case["kept"])), case["height"], case["width"], layers=case["layers"]
    )
    assert plan.r[0] == case["r_reference"] != case["r_exact_arithmetic"]


@pytest.mark.parametrize(
    "case", SCHEDULE["sides_not_multiple_of_patch_kept_0_5"], ids=lambda c: f"{c['height']}x{c['width']}"
)
def test_r_counts_pixels_that_fill_no_patch(case: dict[str, Any]) -> None:
    plan = _plan(MergeConfig(token_kept_ratio=0.5), case["height"], case["width"])
    assert (plan.r[0], plan.tokens[0] + 1, plan.num_visual_tokens + 1) == (
        case["r"],
        case["tokens0"],
        case["tokens_m2"],
    )


@pytest.mark.parametrize("layers", [6, 32])
@pytest.mark.parametrize("ratio", [1.0, 0.8, 0.5, 0.2, 0.1, 0.01])
def test_exact_delivers_the_rounded_share_or_names_the_smallest(ratio: float, layers: int) -> None:
    refused = 0
    for rows, columns in GRIDS:
        patches, active = rows * columns, layers - 1
        want, smallest = max(1, round(ratio * patches)), -(-patches // 2**active)
        config = MergeConfig(token_kept_ratio=ratio, schedule=Schedule.exact)
        if want < smallest:
            refused += 1
            with pytest.raises(ValueError, match=rf"{ratio}.*\b{want}\b.*\b{smallest}\b"):
                _plan(config, rows * 14, columns * 14, layers=layers)
            continue
        plan = _plan(config, rows * 14, columns * 14, layers=layers)
        _assert_sound(plan, patches, active)
        assert plan.num_visual_tokens == want
    assert (refused > 0) == (ratio == 0.01 and layers == 6)


@pytest.mark.parametrize("inflection", [-1.0, -0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("ratio", [1.0, 0.8, 0.5, 0.2, 0.1, 0.01])
def test_linear_has_the_total_of_constant(ratio: float, inflection: float) -> None:
    for layers in (6, 32):
        for rows, columns in GRIDS[::3]:
            config = MergeConfig(token_kept_ratio=ratio, schedule=Schedule.linear, inflection=inflection)
            plan = _plan(config, rows * 14, columns * 14, layers=layers)
            _assert_sound(plan, rows * columns, layers - 1)
            constant = _plan(MergeConfig(token_kept_ratio=ratio), rows * 14, columns * 14, layers=layers)
            assert sum(plan.r) == sum(constant.r)


def test_linear_slopes_where_it_says() -> None:
    falling, even, rising = (
        _plan(MergeConfig(token_kept_ratio=0.2, schedule=Schedule.linear, inflection=inflection), 378, 378).r
        for inflection in (-1.0, 0.0, 1.0)
    )
    assert sum(falling[:10]) > 1.4 * sum(even[:10]) > 1.4 * 1.4 * sum(rising[:10])
    assert max(even) - min(even) <= 1
    # Merging early leaves fewer tokens to compute in the layers behind.
    tokens = [sum(_running(729, r)) for r in (falling, even, rising)]
    assert tokens[0] < tokens[1] < tokens[2]


def _running(start: int, r: tuple[int, ...]) -> list[int]:
    return [start - sum(r[:layer]) for layer in range(len(r) + 1)]


def test_list_is_r_per_layer_that_runs() -> None:
    plan = _plan(MergeConfig(schedule=Schedule.list, r=[3, 0, 100, 1, 2]), 70, 70, layers=6)
    assert plan.r == (3, 0, 11, 1, 2)  # 100 is clamped to half of 22
    assert plan.tokens == (25, 22, 22, 11, 10, 8)
    for wrong in ([1, 2], [1] * 7, []):
        with pytest.raises(ValueError, match=rf"merge\.r.*{len(wrong)}.*5"):
            _plan(MergeConfig(schedule=Schedule.list, r=wrong), 70, 70, layers=6)


@pytest.mark.parametrize("slowfast", [False, True])
@pytest.mark.parametrize("schedule", [Schedule.constant, Schedule.exact, Schedule.linear])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 8])
def test_a_budget_is_kept_and_used(num_frames: int, schedule: Schedule, slowfast: bool) -> None:
    refused = kept = 0
    for budget in (1, 7, 8, 16, 77, 333, 2048):
        for rows, columns in GRIDS[:: 7 if num_frames == 8 else 13]:
            patches = rows * columns
            config = MergeConfig(visual_token_budget=budget, schedule=schedule, slowfast=slowfast)
            num_slow = 1 if slowfast and num_frames > 1 else 0
            if budget < num_slow * patches + (num_frames - num_slow):
                refused += 1
                with pytest.raises(
                    ValueError, match=rf"visual_token_budget={budget}\b.*{num_slow * patches + num_frames - num_slow}"
                ):
                    _clip(config, num_frames, rows * 14, columns * 14)
                continue
            kept += 1
            plans = _clip(config, num_frames, rows * 14, columns * 14)
            assert len(plans) == num_frames
            for plan in plans:
                _assert_sound(plan, patches, 31)
            total = sum(plan.num_visual_tokens for plan in plans)
            assert total <= budget
            assert total == num_frames * patches or budget - total < num_frames
            if num_slow:
                assert plans[0].num_visual_tokens == patches
    assert kept
    assert refused or num_frames == 1


def test_a_budget_that_few_layers_cannot_reach_is_refused_before_encoding() -> None:
    with pytest.raises(ValueError, match=r"visual_token_budget=8\b.*\b46\b"):  # ceil(729 / 2 ** 4) = 46
        _clip(MergeConfig(visual_token_budget=8), 1, 378, 378, layers=5)


@pytest.mark.parametrize("slowfast", [False, True])
def test_clips_repeat_the_frame_plan(slowfast: bool) -> None:
    config = MergeConfig(token_kept_ratio=0.4, slowfast=slowfast)
    frame = _plan(MergeConfig(token_kept_ratio=0.4), 378, 378)
    plans = _clip(config, 4, 378, 378)
    assert [p.num_visual_tokens for p in plans] == [729 if slowfast else 326, 326, 326, 326]
    assert plans[-1] == frame
    assert _clip(config, 1, 378, 378) == (frame,)  # one frame is an ordinary merged one


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"token_kept_ratio": 0.0}, r"merge\.token_kept_ratio=0\.0: want .*\(0, 1\]"),
        ({"token_kept_ratio": 1.4}, r"merge\.token_kept_ratio=1\.4: want .*\(0, 1\]"),
        ({"token_kept_ratio": -0.2}, r"merge\.token_kept_ratio=-0\.2"),
        ({"token_kept_ratio": float("nan")}, r"merge\.token_kept_ratio=nan"),
        ({"inflection": 1.5}, r"merge\.inflection=1\.5: want .*\[-1, 1\]"),
        ({"schedule": Schedule.list, "r": [1, -1]}, r"merge\.r=\[1, -1\]"),
        ({"visual_token_budget": 0}, r"merge\.visual_token_budget=0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MergeConfig(**fields)


def test_a_frame_without_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="13x70"):
        _plan(MergeConfig(), 13, 70)
    with pytest.raises(ValueError, match="num_frames=0"):
        _clip(MergeConfig(), 0, 70, 70)
