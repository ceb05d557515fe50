"""Token merging in timm's ViT: the numbers of the ToMe reference, and the promises that hold for every tower."""

import copy
import importlib
import io
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from aurora import apply_token_merging
from aurora.model.merge import MergeConfig, Schedule, SizeBias, plan_merge
from aurora.model.token_merging import TokenMerging
from aurora.model.vision import VisionConfig, interpolate_positions
from aurora.runtime import define_missing_torchvision_ops
from aurora.visualization.merge_map import group_map
from tests.golden import assert_close_to_golden, load_index, load_tensors
from tests.golden_models import clip_state_dict, tower_plan, vision_tower

pytestmark = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")

CASES = [(name, case) for name in ("a", "b") for case in load_index("vit_index")["cases"][name]]
SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}


@pytest.fixture(scope="module")
def vit() -> Any:
    """The module timm.models.vision_transformer."""
    define_missing_torchvision_ops()
    return importlib.import_module("timm.models.vision_transformer")


def tiny(vit: Any, **changes: Any) -> Any:
    """Random ViT of 64 patches, every parameter drawn."""
    model = vit.VisionTransformer(**SIZE | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1) * 0.5)
    return model.eval()


def images(rows: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


class QuickGELU(nn.Module):
    """Written out here, since timm's is another class in each version."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def golden_vit(vit: Any, name: str, pixels: Tensor) -> Any:
    """timm's ViT with the golden weights, its position table stretched to the image as the reference does it."""
    raw = load_index("vit_index")["configs"][name]
    width = raw["hidden_size"]
    model = vit.VisionTransformer(
        img_size=tuple(pixels.shape[-2:]), patch_size=raw["patch_size"], embed_dim=width,
        depth=raw["num_hidden_layers"], num_heads=raw["num_attention_heads"],
        mlp_ratio=raw["intermediate_size"] / width, pre_norm=True, num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer=QuickGELU if raw["hidden_act"] == "quick_gelu" else nn.GELU,
    )  # fmt: skip
    state = clip_state_dict(load_tensors(f"vit_{name}_weights"))
    grid = (pixels.shape[2] // 14, pixels.shape[3] // 14)
    table = interpolate_positions(state.pop("pos_embed"), raw["image_size"] // 14, grid)
    out = {"pos_embed": table[None], "cls_token": state.pop("cls_token")[None, None]}
    out["patch_embed.proj.weight"] = state.pop("patch_embed.weight")
    for key, tensor in state.items():
        if ".q_proj." in key:
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[key.replace("q_proj", "qkv")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            out[key.replace("out_proj", "proj").replace("norm_post", "norm")] = tensor
    model.load_state_dict(out)
    return model.eval()


@pytest.mark.parametrize("size_bias", list(SizeBias), ids=lambda bias: bias.name)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_timm_equals_the_tome_goldens(vit: Any, name: str, case: str, size_bias: SizeBias) -> None:
    source, ratio = case.rsplit(".r", 1)
    pixels = load_tensors(f"vit_{name}_cases")[f"{source}.pixel_values"]
    golden = load_tensors(f"vit_{name}_cases" if size_bias is SizeBias.off else f"vit_propattn_{name}_cases")
    model = golden_vit(vit, name, pixels)
    with torch.no_grad(), apply_token_merging(model, float(ratio), size_bias=size_bias, trace=True) as merging:
        states = model.forward_intermediates(
            pixels, indices=[4, 5], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        for state, (patches, prefix) in zip(("hidden_m2", "hidden_m1"), states, strict=True):
            assert_close_to_golden(torch.cat([prefix, patches], dim=1), golden[f"{case}.{state}"])
        counts = load_index("vit_index")["cases"][name][case]["tokens_per_state"]
        plan = merging.plan
        assert [1 + count for count in plan.tokens] == counts
        trace = merging.trace
        want = golden.get(f"{case}.size_final", torch.ones(1, 1 + plan.num_patches, 1))  # absent where r is 0
        if size_bias is SizeBias.keys:
            assert torch.equal(trace.sizes[-1], want.expand_as(trace.sizes[-1]))
        # And what our own tower says of who went where.
        ours = vision_tower(name)
        wish = MergeConfig(token_kept_ratio=float(ratio))
        own = ours(pixels, plan=tower_plan(ours, pixels, wish, feature_layer=-1), feature_layer=-1,
                   size_bias=size_bias, trace=True).trace  # fmt: skip
        assert trace.grid == own.grid
        for kind in ("sizes", "sources"):
            for theirs, mine in zip(getattr(trace, kind), getattr(own, kind), strict=True):
                assert torch.equal(theirs, mine)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 0.5},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "map_pool": {"global_pool": "map", "class_token": False},
    "registers": {"reg_tokens": 3},
    "pre_norm": {"pre_norm": True},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_no_merge_changes_nothing_and_size_one_has_no_bias(vit: Any, variant: str, fused: bool) -> None:
    model, x = tiny(vit, **VARIANTS[variant]), images()
    for block in model.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        want = model(x)
        for settings in ({}, {"token_kept_ratio": 1.0}, {"r": 0}, {"r": [0] * 4, "size_bias": "keys"}):
            with apply_token_merging(model, **settings):
                assert torch.equal(model(x), want)
        with apply_token_merging(model, 0.3) as merging:
            merged = model(x)
            assert merged.shape == want.shape
            assert not torch.allclose(merged, want)
            merging.set(r=[0, 0, 0, 20])
            late = model(x)
            merging.set(size_bias="keys")
            assert torch.equal(model(x), late)  # nothing is merged before the last attention
            merging.set(r=[20, 0, 0, 0])
            early = model(x)
            merging.set(size_bias="off")
            assert not torch.allclose(model(x), early)


def test_identical_patches_with_the_size_bias_are_worth_as_many(vit: Any) -> None:
    # Proportional attention is exact where what merges is identical: then merging changes nothing at all.
    model = tiny(vit, pos_embed="none")
    one, two = images(2, 4, 4).repeat(1, 1, 8, 8), images(2, 8, 4).repeat(1, 1, 4, 8)
    with torch.no_grad():
        for pixels in (one, two):  # of two patches in rows, each has its like in the other set
            want = model(pixels)
            with apply_token_merging(model, r=[20, 6, 2, 0], size_bias="keys") as merging:
                assert_close_to_golden(model(pixels), want)
                merging.set(size_bias="off")
                assert not torch.allclose(model(pixels), want, rtol=1e-4)


def test_registers_stand_aside(vit: Any) -> None:
    model, x = tiny(vit, reg_tokens=3), images()
    with torch.no_grad(), apply_token_merging(model, 0.2, trace=True) as merging:
        model(x)
        trace = merging.trace
        num_visual = merging.plan.num_visual_tokens
    assert trace.num_prefix_tokens == 4
    labels = group_map(trace, row=1)  # what merge pictures are drawn from
    assert labels.shape == (8, 8)
    assert sorted(set(labels.flatten().tolist())) == list(range(num_visual))
    for size, source in zip(trace.sizes, trace.sources, strict=True):
        assert (size[:, :4] == 1).all()
        assert torch.equal(source[:, :4], torch.arange(4).expand(2, -1))
        assert (source[:, 4:] >= 4).all()
        assert (size.sum(1) == 4 + 64).all()
        for row in range(2):
            assert torch.equal(torch.bincount(source[row]).float(), size[row, :, 0])


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on the modules themselves."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def test_remove_gives_the_module_back_exactly(vit: Any) -> None:
    model, x = tiny(vit), images()
    before, keys = state_of(model), list(model.state_dict())
    with torch.no_grad():
        want = model(x)
        merging = apply_token_merging(model, 0.3)
        assert list(model.state_dict()) == keys
        assert [type(block) for block in model.blocks] == [vit.Block] * 4
        assert not torch.equal(model(x), want)
        merging.remove()
        merging.remove()
        assert torch.equal(model(x), want)
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(after[key] is value or after[key] == value for key, value in before.items())
    assert "removed" in repr(merging)
    with pytest.raises(RuntimeError, match="inside"), apply_token_merging(model, 0.3):
        raise RuntimeError("inside")
    assert state_of(model).keys() == before.keys()


def test_applying_again_replaces(vit: Any) -> None:
    model, x = tiny(vit), images()
    first = apply_token_merging(model, 0.3)
    second = apply_token_merging(model, 0.6, trace=True)
    assert "removed" in repr(first)
    first.remove()  # of no effect on the second
    with torch.no_grad():
        model(x)
        assert second.trace.sizes[-1].shape[1] == 1 + second.plan.num_visual_tokens
        second.set(0.3)
        model(x)
        assert second.trace.sizes[-1].shape[1] == 1 + second.plan.num_visual_tokens == 21
    second.remove()
    assert "forward" not in vars(model.blocks[0])


@pytest.mark.parametrize("schedule", ["constant", "exact", "linear"])
def test_plans_are_those_of_our_tower(vit: Any, schedule: str) -> None:
    model = tiny(vit, dynamic_img_size=True)
    merging = apply_token_merging(model, 0.3, schedule=schedule, feature_layer=-2, trace=True)
    config = MergeConfig(token_kept_ratio=0.3, schedule=Schedule[schedule])
    vision = VisionConfig(num_layers=4, patch_size=4, image_size=32)
    for height, width in ((32, 32), (20, 44)):
        plan = plan_merge(config, height_px=height, width_px=width, vision=vision, num_active_layers=3)
        assert merging.plan_for(height, width) == plan
        with torch.no_grad():
            model(images(1, height, width))
        assert merging.trace.grid == (height // 4, width // 4)
        assert [size.shape[1] - 1 for size in merging.trace.sizes] == list(plan.tokens[1:])  # three of four layers
        assert len(merging.sources) == 3
        assert [s.shape for s in merging.trace.similarities] == [(1, r) for r in plan.r]
    assert merging.plan.num_patches == 64


def test_padded_images_count_whole_patches(vit: Any) -> None:
    model = tiny(vit, dynamic_img_size=True, dynamic_img_pad=True)
    with torch.no_grad(), apply_token_merging(model, 0.3, trace=True) as merging:
        model(images(1, 30, 33))
        assert merging.trace.grid == (8, 9)
        assert merging.trace.sizes[-1].shape[1] - 1 == merging.plan_for(30, 33).num_visual_tokens


def test_feature_maps_are_whole_again(vit: Any) -> None:
    model, x = tiny(vit, reg_tokens=1), images()
    with torch.no_grad():
        plain = model.forward_intermediates(x, [0, 3], intermediates_only=True)
        with apply_token_merging(model, 0.3) as merging:
            maps = model.forward_intermediates(x, [0, 3], intermediates_only=True)
            final, again = model.forward_intermediates(x, [0, 3], False, True)
            assert final.shape == (2, 2 + 20, 32)
            as_dict = model.forward_intermediates(x, 1, output_dict=True, return_prefix_tokens=True)
            assert as_dict["image_intermediates"][0].shape == (2, 32, 8, 8)
            (pair,) = model.forward_intermediates(x, 1, return_prefix_tokens=True, intermediates_only=True)
            assert (pair[0].shape, pair[1].shape) == ((2, 32, 8, 8), (2, 2, 32))
            (tokens,) = model.get_intermediate_layers(x, 1)
            assert tokens.shape == (2, 20, 32)
            merging.set(trace=True)
            model(x)
            index = merging.sources[-1][:, 2:] - 2
            want = tokens.gather(1, index[..., None].expand(-1, -1, 32))
            assert torch.equal(maps[1].flatten(2).transpose(1, 2), want)
            assert [m.shape for m in again] == [m.shape for m in plain]
        back = model.forward_intermediates(x, [0, 3], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(back, plain, strict=True))


def test_copies_and_pickles_keep_their_own_merging(vit: Any) -> None:
    model, x = tiny(vit), images()
    with torch.no_grad():
        plain = model(x)
        merging = apply_token_merging(model, 0.3, trace=True)
        want = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), want)
            apply_token_merging(other, 0.6)
            assert not torch.equal(other(x), want)
            assert torch.equal(model(x), want)
            apply_token_merging(other, 1.0).remove()
            assert torch.equal(other(x), plain)
        assert merging.trace.sizes[-1].shape[1] == 21


@pytest.mark.parametrize("size_bias", ["off", "keys"])
def test_gradients_flow_and_recomputing_gives_the_same(vit: Any, size_bias: str) -> None:
    model, x = tiny(vit, drop_path_rate=0.0).train(), images()
    merging = apply_token_merging(model, r=[20, 0, 15, 0], size_bias=size_bias)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        # Two passes before one backward: what is recomputed must not read the sizes of the later one.
        (model(x).square().sum() + model(x.flip(-1)).sum()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    want = gradients()
    # No activation, and so no graph, is kept beyond the pass.
    kept = [value for value in (*vars(merging.run).values(), merging.run.tap.keys) if isinstance(value, Tensor)]
    assert not any(value.requires_grad for value in kept)
    copy.deepcopy(model)
    assert all(gradient.abs().max() > 0 for name, gradient in want.items() if not name.startswith("fc_norm"))
    merging.activation_checkpointing = True
    got = gradients()
    for name, gradient in want.items():
        assert_close_to_golden(got[name], gradient)
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=r"grad_checkpointing=True on VisionTransformer.*activation_checkpointing"):
        model(x)


@pytest.mark.parametrize("size_bias", ["off", "keys"])
def test_compiles_as_one_graph(vit: Any, size_bias: str) -> None:
    model, x = tiny(vit, depth=2), images()
    merging = apply_token_merging(model, 0.3, size_bias=size_bias, trace=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for ratio in (0.3, 0.6):
            merging.set(ratio)
            assert_close_to_golden(compiled(x), model(x))
            assert merging.trace.sizes[-1].shape[1] == 1 + merging.plan.num_visual_tokens
        merging.remove()
        assert_close_to_golden(compiled(x), model(x))


@pytest.mark.slow
def test_compiles_once_more_for_every_batch_size(vit: Any) -> None:
    model = tiny(vit, depth=2)
    apply_token_merging(model, 0.3, size_bias="keys", trace=True)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for rows in (2, 3, 4, 5):
            x = images(rows)
            assert_close_to_golden(compiled(x), model(x))
    assert counter.frame_count == 2  # the second graph holds the batch variable


@pytest.mark.slow
def test_compiles_with_inductor_over_image_sizes(vit: Any) -> None:
    model = tiny(vit, depth=2, dynamic_img_size=True)
    apply_token_merging(model, 0.3, size_bias="keys")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for height, width in ((32, 32), (24, 40)):
            x = images(2, height, width)
            assert_close_to_golden(compiled(x), model(x), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_fn": "ResPostBlock"}, r"blocks.0: got a block of class ResPostBlock, want one of Block"),
        ({"block_fn": "ParallelScalingBlock"}, "class ParallelScalingBlock"),
        ({"block_fn": "ParallelThingsBlock"}, "class ParallelThingsBlock"),
        ({"attn_layer": "diff"}, "attention of class DiffAttention, want Attention"),
        ({"patch_size": (4, 8)}, r"patch_size=\(4, 8\), want square patches"),
    ],
)
def test_other_blocks_are_refused_by_name(vit: Any, changes: dict[str, Any], message: str) -> None:
    if "block_fn" in changes:
        changes = {"block_fn": getattr(vit, changes["block_fn"])}
    with pytest.raises(ValueError, match=message):
        apply_token_merging(vit.VisionTransformer(**SIZE | changes), 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_kept_ratio": 1.5}, r"token_kept_ratio=1.5: want a number in \(0, 1\]"),
        ({"token_kept_ratio": 0.5, "r": 3}, "token_kept_ratio=0.5 and r=3: want one of them"),
        ({"r": [1, 2]}, "got 2 counts, want 4"),
        ({"r": -1}, "want no negative count"),
        ({"r": 3, "schedule": "exact"}, "r=3: is read with schedule=list only, got exact"),
        ({"schedule": "list"}, "schedule=list: want r"),
        ({"schedule": "cubic"}, "schedule='cubic': want one of constant, exact, linear, list"),
        ({"size_bias": "queries"}, "size_bias='queries': want one of off, keys"),
        ({"feature_layer": 9}, "feature_layer=9: want -5 to 4"),
        ({"token_kept_ratio": 0.01, "schedule": "exact"}, "want a count of at least"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(vit: Any, settings: dict[str, Any], message: str) -> None:
    model, x = tiny(vit), images()
    before = state_of(model).keys()
    with pytest.raises(ValueError, match=message):
        apply_token_merging(model, **settings)
    assert state_of(model).keys() == before
    with apply_token_merging(model, 0.3) as merging, torch.no_grad():
        want = model(x)
        if "feature_layer" not in settings:
            with pytest.raises(ValueError, match=message):
                merging.set(**settings)
        assert torch.equal(model(x), want)


def test_misuse_is_refused(vit: Any) -> None:
    with pytest.raises(ValueError, match="got a module of class Linear, want a vision tower or one of: open_clip CLIP"):
        apply_token_merging(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"got a compiled module, want it before torch.compile"):
        apply_token_merging(torch.compile(tiny(vit)), 0.5)
    model, x = tiny(vit), images()
    model.blocks[2].forward = lambda x: x
    with pytest.raises(ValueError, match="block 2: its forward is overridden"):
        apply_token_merging(model, 0.5)
    assert "forward" not in vars(model.blocks[0])
    del model.blocks[2].forward
    merging = apply_token_merging(model, 0.5)
    with pytest.raises(ValueError, match="trace: nothing recorded; want trace=True"):
        _ = merging.trace
    with pytest.raises(ValueError, match="the first block got 9 tokens, want"):
        model.blocks(torch.randn(2, 9, 32))
    with pytest.raises(ValueError, match="got an attention mask or causal attention"):
        model(x, is_causal=True)
    with pytest.raises(ValueError, match=r"placeholders: got a VisionTransformer, want merging .* whole LLaVA"):
        merging.num_placeholders()
    dropping = tiny(vit, patch_drop_rate=0.5).train()
    apply_token_merging(dropping, 0.5)
    with pytest.raises(ValueError, match=r"got 33 tokens, want 65 of an image of 8x8 patches.*without patch dropout"):
        dropping(x)
    noisy = tiny(vit, attn_drop_rate=0.5).train()
    apply_token_merging(noisy, 0.5)
    noisy(x)
    apply_token_merging(noisy, 0.5, size_bias="keys")
    with pytest.raises(ValueError, match=r"attn_drop=0.5: want 0"):
        noisy(x)


def test_set_keeps_what_is_not_given(vit: Any) -> None:
    merging: TokenMerging = apply_token_merging(tiny(vit), 0.4, schedule="linear", size_bias="keys")
    merging.set(0.3)
    config = merging.config
    assert (config.token_kept_ratio, config.schedule, config.size_bias) == (0.3, Schedule.linear, SizeBias.keys)
    merging.set(r=5)
    assert merging.config.r == [5] * 4
    merging.set(size_bias="off")
    assert (merging.config.r, merging.config.schedule) == ([5] * 4, Schedule.list)
    merging.set(0.5)
    assert (merging.config.token_kept_ratio, merging.config.schedule) == (0.5, Schedule.constant)
    assert repr(merging) == "TokenMerging(VisionTransformer, 64 -> 32 tokens)"
