"""Each baseline delivers the count asked for, and what it says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from aurora.evaluation.baselines import BASELINES, TowerFrames, encode_reduced
from aurora.evaluation.baselines.attention_pruning import attention_weights
from aurora.evaluation.baselines.average_pooling import window_of_patch
from aurora.evaluation.baselines.frames import run_tower
from aurora.evaluation.variants import MEANINGS, MERGING, encode_variant
from aurora.model.merge import SizeBias, TextPositions, TextSizeBias
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor

NUM_PATCHES = 36
REDUCING = [name for name in BASELINES if name != "no_merging"]


@pytest.fixture(scope="module")
def model(random_checkpoint):
    return AuroraForConditionalGeneration.from_pretrained(random_checkpoint)


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 3, 48, 48, generator=generator) for _ in range(2)]


def frames_of(hidden, grid):
    """Frames behind a tower that is not looked at."""
    return TowerFrames(hidden, grid, hidden, None)


def test_without_reduction_a_prefix_is_what_encode_gives(model, clips, random_checkpoint):
    whole = model.encode(pixel_values_videos=clips)
    kept = encode_reduced(model, BASELINES["no_merging"], clips, NUM_PATCHES, [0, 1])
    for ours, expected in zip(kept.features.frames, whole.features.frames, strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert kept.features.counts == whole.features.counts
    inputs = AuroraProcessor.from_pretrained(random_checkpoint)(text=["Hi <image>", "Hi <image>"])
    answers = [model.generate(**inputs, prefix=prefix, max_new_tokens=12).tolist() for prefix in (kept, whole)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", REDUCING)
def test_every_count_is_delivered(name, model, clips, random_checkpoint):
    inputs = AuroraProcessor.from_pretrained(random_checkpoint)(text=["Hi <image>", "Hi <image>"])
    for count in (1, 2, 5, 7, 17, 18, 19, 31, 35, 36):
        prefix = encode_reduced(model, BASELINES[name], clips, count, [0, 1])
        assert prefix.features.counts == [[count] * 3] * 2
        assert [plan.num_visual_tokens for plan in prefix.features.plans[0]] == [count] * 3
        sizes = torch.stack(prefix.features.sizes[0])
        if name in ("average_pooling", "merging_after_encoder"):
            assert sizes.sum(dim=1).tolist() == [NUM_PATCHES] * 3
        else:
            assert bool((sizes == 1).all())
        made = model.generate(**inputs, prefix=prefix, max_new_tokens=3, return_dict=True)
        assert made.visual_token_counts == [[count] * 3] * 2


@pytest.mark.parametrize("name", ["random_drop", "uniform_drop", "class_attention", "mean_attention"])
def test_dropping_keeps_patches_as_they_are_in_raster_order(name, model, clips):
    whole = torch.stack(encode_reduced(model, BASELINES["no_merging"], clips, NUM_PATCHES, [0, 1]).features.frames[0])
    kept = torch.stack(encode_reduced(model, BASELINES[name], clips, 10, [0, 1]).features.frames[0])
    same = ((kept[:, :, None] - whole[:, None]).abs().amax(dim=-1) < 1e-4).int()  # (F, 10, N)
    assert bool((same.sum(dim=2) == 1).all())
    places = same.argmax(dim=2)
    assert bool((places.diff(dim=1) > 0).all())


def test_random_drop_depends_on_the_seed_of_its_clip_alone(model, clips):
    def kept(chosen, seeds):
        return [
            torch.stack(clip)
            for clip in encode_reduced(model, BASELINES["random_drop"], chosen, 9, seeds).features.frames
        ]

    both = kept([clips[0], clips[0]], [4, 5])
    assert not torch.allclose(both[0], both[1])
    torch.testing.assert_close(kept([clips[0]], [5])[0], both[1])
    hidden = torch.arange(NUM_PATCHES, dtype=torch.float32)[None, :, None].expand(200, -1, 1)
    counts = torch.bincount(BASELINES["random_drop"](frames_of(hidden, (6, 6)), 9, 0).tokens.long().flatten())
    assert counts.min() > 20  # of 50 expected: all patches have their chance, and frames differ


@pytest.mark.parametrize("grid", [(12, 12), (6, 6), (3, 9), (1, 5), (7, 2)])
def test_windows_hold_every_patch_once_and_are_compact(grid):
    rows, columns = grid
    for count in range(1, rows * columns + 1):
        window = window_of_patch(grid, count).reshape(grid)
        sizes = torch.bincount(window.flatten(), minlength=count)
        assert len(sizes) == count
        assert sizes.min() >= 1
        for index in range(count):
            places = (window == index).nonzero()
            height, width = (places.max(dim=0).values - places.min(dim=0).values + 1).tolist()
            assert height * width == len(places)  # a rectangle


def test_average_pooling_is_pytorchs_where_windows_are_squares():
    hidden = torch.randn(2, 36, 5)
    pooled = BASELINES["average_pooling"](frames_of(hidden, (6, 6)), 9, 0)
    picture = rearrange(hidden, "f (h w) c -> f c h w", h=6)
    expected = rearrange(F.avg_pool2d(picture, 2), "f c h w -> f (h w) c")
    torch.testing.assert_close(pooled.tokens, expected)
    assert pooled.sizes.tolist() == [[4.0] * 9] * 2


def test_uniform_drop_takes_a_grid():
    hidden = torch.arange(36, dtype=torch.float32)[None, :, None]
    kept = BASELINES["uniform_drop"](frames_of(hidden, (6, 6)), 4, 0).tokens.flatten().tolist()
    assert kept == [7, 10, 25, 28]  # the middles of four windows of 3 x 3


def test_attention_weights_are_those_of_the_last_block(model, clips):
    frames = run_tower(model.model, clips[0])
    weights = attention_weights(frames)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3]))
    block = frames.last_block
    assert block is model.model.vision_tower.blocks[3]  # of five the fourth is the last that runs
    normed = block.norm1(frames.last_input)
    _, _, v = block.attn.project(normed)
    out = block.attn.out_proj(rearrange(torch.einsum("fhqk,fkhd->fqhd", weights, v), "f q h d -> f q (h d)"))
    expected, _ = block.attn(normed, key_bias=None, backend="eager")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_attention_pruning_keeps_what_is_looked_at_most(model, clips):
    frames = run_tower(model.model, clips[0])
    weights = attention_weights(frames)
    for name, received in (("class_attention", weights[:, :, 0].mean(1)), ("mean_attention", weights.mean((1, 2)))):
        best = received[:, 1:].argmax(dim=1)
        kept = BASELINES[name](frames, 1, 0).tokens[:, 0]
        torch.testing.assert_close(kept, frames.hidden[torch.arange(3), best])
    without_class = frames._replace(last_input=frames.last_input[:, 1:])
    with pytest.raises(ValueError, match="no class token; want mean_attention"):
        BASELINES["class_attention"](without_class, 1, 0)


def test_merging_after_the_encoder_keeps_the_mean_and_joins_equals():
    torch.manual_seed(0)
    hidden = torch.randn(2, 36, 8)
    merged = BASELINES["merging_after_encoder"](frames_of(hidden, (6, 6)), 5, 0)
    torch.testing.assert_close((merged.tokens * merged.sizes[..., None]).sum(dim=1), hidden.sum(dim=1))
    kinds = torch.eye(4)[torch.arange(32) // 8][None]
    tokens = BASELINES["merging_after_encoder"](frames_of(kinds, (4, 8)), 4, 0).tokens[0]
    assert sorted(tokens.tolist()) == sorted(torch.eye(4).tolist())


def test_wrong_counts_and_models_are_refused(model, clips):
    for count in (0, 37):
        with pytest.raises(ValueError, match=f"num_tokens={count}: want 1 to 36"):
            encode_reduced(model, BASELINES["uniform_drop"], clips, count, [0, 1])
    with pytest.raises(ValueError, match="no_merging: asked for 9 tokens of a frame, want 36"):
        encode_reduced(model, BASELINES["no_merging"], clips, 9, [0, 1])
    model.config.feature_select_strategy = "full"
    try:
        with pytest.raises(ValueError, match="want a model with feature_select_strategy=default, got full"):
            encode_reduced(model, BASELINES["uniform_drop"], clips, 9, [0, 1])
    finally:
        model.config.feature_select_strategy = "default"


def test_variants_at_equal_ratios_have_equal_counts_but_for_the_published_rule(model, clips):
    counts = {name: encode_variant(model, name, 0.25, clips, [0, 1]).features.counts[0][0] for name in MEANINGS}
    assert counts.pop("constant") == counts.pop("linear") > 9
    assert set(counts.values()) == {9}
    assert set(MEANINGS) == set(MERGING) | set(REDUCING)
    with pytest.raises(ValueError, match="variant 'exakt': want one of exact, constant"):
        encode_variant(model, "exakt", 0.25, clips, [0, 1])


def test_variants_of_merging_are_what_their_meaning_says(model, clips):
    """The settings that reach the model, and the merges in each of its layers."""
    found = {name: encode_variant(model, name, 0.3, clips, [0, 1]).features for name in MERGING}
    merges = {name: features.merges[0] for name, features in found.items()}
    r = {name: features.plans[0][0].r for name, features in found.items()}
    assert {name for name, merge in merges.items() if merge.size_bias is SizeBias.keys} == {"size_bias"}
    assert {name for name, merge in merges.items() if merge.text_size_bias is TextSizeBias.visual} == {"text_size_bias"}
    assert {name for name, merge in merges.items() if merge.text_positions is TextPositions.original} == {
        "original_positions"
    }
    assert len(set(r["constant"])) == 1
    assert list(r["linear"]) == sorted(r["linear"], reverse=True)
    assert r["linear"][0] > r["constant"][0]
    assert sum(r["linear"]) == sum(r["constant"])
    assert {r[name] for name in MERGING if name not in ("constant", "linear")} == {r["exact"]}


def test_raster_order_sorts_tokens_and_counts_positions_one_by_one(model, clips):
    merged = encode_variant(model, "exact", 0.25, clips, [0, 1]).features
    spread = encode_variant(model, "original_positions", 0.25, clips, [0, 1]).features
    ordered = encode_variant(model, "raster_order", 0.25, clips, [0, 1]).features
    for clip in range(2):
        for frame in range(3):
            order = spread.centres[clip][frame].sort(stable=True).indices
            torch.testing.assert_close(ordered.frames[clip][frame], merged.frames[clip][frame][order])
            torch.testing.assert_close(ordered.sizes[clip][frame], merged.sizes[clip][frame][order])
    assert any(order != sorted(order) for order in [spread.centres[0][0].tolist()])
    assert [merge.text_positions.value for merge in ordered.merges] == ["merged"] * 2
    ids = torch.tensor([[1, model.config.image_token_index, 5]] * 2)
    lengths = [model.model.splice(ids, features).next_position.tolist() for features in (ordered, spread)]
    assert lengths == [[[2 + 27]] * 2, [[2 + 108]] * 2]


def test_random_choices_of_a_clip_do_not_depend_on_numpys_global_state(model, clips):
    seen = []
    for state in (0, 1):
        np.random.seed(state)
        torch.manual_seed(state)
        seen.append(torch.stack(encode_variant(model, "random_drop", 0.25, clips[:1], [3]).features.frames[0]))
    torch.testing.assert_close(seen[0], seen[1])
