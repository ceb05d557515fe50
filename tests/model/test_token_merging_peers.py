"""Token merging in transformers' and open_clip's towers: the numbers of our own model with the same weights."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aurora import apply_token_merging
from aurora.checkpoint.pretrained import load_pretrained, load_vision_tower
from aurora.model.merge import MergeConfig, Schedule, SizeBias, plan_merge
from aurora.model.vision import VisionOutput, VisionTower, num_active_layers
from aurora.runtime import define_missing_torchvision_ops
from tests.golden import RTOL_LM, assert_close_to_golden

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_open_clip = pytest.mark.skipif(find_spec("open_clip") is None, reason="open_clip is not installed")
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 7,
}  # fmt: skip
TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
IMAGE = 95
WISHES = {
    "constant": MergeConfig(token_kept_ratio=0.3),
    "proportional": MergeConfig(token_kept_ratio=0.2, size_bias=SizeBias.keys),
    "linear": MergeConfig(token_kept_ratio=0.3, schedule=Schedule.linear),
}


@pytest.fixture(scope="module")
def hf() -> Any:
    define_missing_torchvision_ops()
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw every weight, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + (parameter.ndim == 1) * 0.7)
    return model.eval()


def pixels_of(rows: int = 2, height: int = 56, width: int = 56) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


def clip(hf: Any, kind: str = "CLIP", attention: str = "sdpa") -> Any:
    act = "quick_gelu" if kind == "CLIP" else "gelu_pytorch_tanh"
    config = getattr(hf, f"{kind}VisionConfig")(**VISION, hidden_act=act, attn_implementation=attention)
    return randomise(getattr(hf, f"{kind}VisionModel")(config))


def settings_of(wish: MergeConfig) -> dict[str, Any]:
    return {"token_kept_ratio": wish.token_kept_ratio, "schedule": wish.schedule, "size_bias": wish.size_bias}


def run_ours(tower: VisionTower, pixels: Tensor, wish: MergeConfig, feature_layer: int) -> VisionOutput:
    plan = plan_merge(
        wish, height_px=pixels.shape[2], width_px=pixels.shape[3], vision=tower.config,
        num_active_layers=num_active_layers(tower.config, feature_layer),
    )  # fmt: skip
    return tower(pixels, plan=plan, feature_layer=feature_layer, size_bias=wish.size_bias, trace=True)


@needs_transformers
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("wish", list(WISHES))
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_hf_towers_equal_ours(hf: Any, tmp_path: Path, kind: str, wish: str, attention: str) -> None:
    theirs, pixels = clip(hf, kind, attention), pixels_of()
    theirs.save_pretrained(tmp_path)
    ours = load_vision_tower(tmp_path)
    merging = apply_token_merging(theirs, **settings_of(WISHES[wish]), feature_layer=-2, trace=True)
    with torch.no_grad():
        out = theirs(pixels, output_hidden_states=True)
        want = run_ours(ours, pixels, WISHES[wish], -2)
    assert_close_to_golden(out.hidden_states[-2], want.hidden)
    prefix = int(kind == "CLIP")
    assert [state.shape[1] - prefix for state in out.hidden_states[:-1]] == list(merging.plan.tokens)
    assert out.hidden_states[-1].shape == out.hidden_states[-2].shape  # the last layer merges nothing
    for kinds in ("sizes", "sources", "similarities"):
        for got, mine in zip(getattr(merging.trace, kinds), getattr(want.trace, kinds), strict=True):
            assert_close_to_golden(got, mine)
    merging.remove()
    with torch.no_grad():
        assert_close_to_golden(
            theirs(pixels, output_hidden_states=True).hidden_states[-2], ours(pixels, feature_layer=-2).hidden
        )


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size_bias", ["off", "keys"])
def test_half_precision_keeps_sizes_exact(hf: Any, dtype: torch.dtype, size_bias: str) -> None:
    theirs, pixels = clip(hf).to(dtype), pixels_of()
    with torch.no_grad(), apply_token_merging(theirs, 0.3, size_bias=size_bias, trace=True) as merging:
        hidden = theirs(pixels).last_hidden_state
        assert hidden.dtype == dtype
        assert torch.isfinite(hidden).all()
        assert merging.trace.sizes[-1].dtype == torch.float32
        assert (merging.trace.sizes[-1].sum(1) == 65).all()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = theirs.float()
        with apply_token_merging(theirs, 0.3, size_bias=size_bias) as merging:
            assert theirs(pixels).last_hidden_state.shape[1] == 1 + merging.plan.num_visual_tokens


@needs_transformers
def test_attention_weights_are_those_of_merged_tokens(hf: Any) -> None:
    theirs, pixels = clip(hf, attention="eager"), pixels_of()
    plan = apply_token_merging(theirs, 0.3).plan
    with torch.no_grad():
        weights = theirs(pixels, output_attentions=True).attentions
    assert [w.shape[-1] for w in weights] == [1 + count for count in plan.tokens[:-1]]


@needs_transformers
@pytest.mark.parametrize("name", ["CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel"])
def test_towers_are_found_inside_pairs(hf: Any, name: str) -> None:
    words = {
        "vocab_size": 20, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if name == "CLIPVisionModelWithProjection":
        pair = getattr(hf, name)(hf.CLIPVisionConfig(**VISION))
    else:
        pair = getattr(hf, name)(getattr(hf, name[:-5] + "Config")(text_config=words, vision_config=VISION))
    pair, pixels = pair.eval(), pixels_of()
    run = pair if name == "CLIPVisionModelWithProjection" else pair.get_image_features
    with torch.no_grad():
        want = run(pixels)
        with apply_token_merging(pair, 0.3, trace=True) as merging:
            run(pixels)
            assert merging.sources[-1].max() + 1 == merging.plan.num_visual_tokens + (name != "SiglipModel")
        again = run(pixels)
    assert all(torch.equal(again[key], value) for key, value in want.items() if isinstance(value, Tensor))


@pytest.fixture(scope="module")
def llava(hf: Any) -> Any:
    """Random LLaVA whose placeholder, id 95, is a token of the vocabulary."""
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**VISION, hidden_act="quick_gelu"),
        image_token_index=IMAGE,
        image_seq_length=64,
    )
    return randomise(hf.LlavaForConditionalGeneration(config))


def prompt(count: int) -> Tensor:
    """Twelve words with `count` placeholders among them, (1, 12 + count)."""
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(2))
    return torch.cat([ids[:, :4], torch.full((1, count), IMAGE), ids[:, 4:]], dim=1)


@needs_transformers
@pytest.mark.parametrize("wish", list(WISHES))
def test_llava_equals_our_model(llava: Any, tmp_path: Path, wish: str) -> None:
    llava.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).model
    merge, pixels = WISHES[wish], pixels_of(1)
    with torch.no_grad(), apply_token_merging(llava, **settings_of(merge)) as merging:
        plan = ours.plan(1, 56, 56, merge)[0]
        assert merging.plan == plan
        assert merging.num_placeholders() == plan.num_visual_tokens < 64
        features = llava.get_image_features(pixels).pooler_output[0]
        assert_close_to_golden(features, ours.encode(pixels[:, None], merge=merge).frames[0][0], rtol=RTOL_LM)
        ids = prompt(merging.num_placeholders())
        want = ours(prompt(1), pixel_values=pixels[:, None], merge=merge).logits
        assert_close_to_golden(llava(input_ids=ids, pixel_values=pixels).logits, want, rtol=RTOL_LM)
        # What a processor writes, which knows of no merging, is made to fit.
        fitted, mask = merging.fit_prompt(prompt(64))
        assert torch.equal(fitted, ids)
        made = llava.generate(input_ids=fitted, attention_mask=mask, pixel_values=pixels, max_new_tokens=4)
        assert made.shape == (1, ids.shape[1] + 4)
        with pytest.raises(ValueError, match="do not match"):
            llava(input_ids=prompt(64), pixel_values=pixels)
    with torch.no_grad():
        assert llava(input_ids=prompt(64), pixel_values=pixels).logits.shape == (1, 76, 96)


@needs_transformers
def test_prompts_of_several_images_are_shortened(llava: Any) -> None:
    with apply_token_merging(llava, 0.3) as merging:
        kept = merging.num_placeholders()
        two = torch.cat([prompt(64), prompt(64)], dim=1)  # (1, 152)
        one = torch.cat([torch.zeros(1, 76, dtype=torch.int64), prompt(64)], dim=1)
        mask = torch.ones(2, 152, dtype=torch.int64)
        mask[1, :76] = 0
        ids, new_mask = merging.fit_prompt(torch.cat([two, one]), mask)
        assert ids.shape == (2, max(24 + 2 * kept, 76 + 12 + kept))
        assert new_mask.sum(1).tolist() == [24 + 2 * kept, 12 + kept]
        assert torch.equal(ids[0][new_mask[0].bool()], torch.cat([prompt(kept), prompt(kept)], dim=1)[0])
        assert torch.equal(ids[1][new_mask[1].bool()], prompt(kept)[0])
        with torch.no_grad():
            logits = llava(input_ids=ids, attention_mask=new_mask, pixel_values=pixels_of(3)).logits
        assert torch.isfinite(logits[new_mask.bool()]).all()
        with pytest.raises(ValueError, match="row 0: 63 image tokens, want 64 for each image before merging"):
            merging.fit_prompt(prompt(63))


@needs_transformers
@pytest.mark.parametrize(
    ("kind", "strategy", "extra"), [("CLIP", "full", 1), ("CLIP", "default", 0), ("Siglip", "default", -1)]
)
def test_placeholders_follow_the_select_strategy(hf: Any, kind: str, strategy: str, extra: int) -> None:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=getattr(hf, f"{kind}VisionConfig")(**VISION),
        image_token_index=IMAGE, vision_feature_select_strategy=strategy, vision_feature_layer=3,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad(), apply_token_merging(model, 0.3) as merging:
        assert merging.num_active_layers == 3
        assert merging.num_placeholders() == merging.plan.num_visual_tokens + extra
        ids = prompt(merging.num_placeholders())
        assert model(input_ids=ids, pixel_values=pixels_of(1)).logits.shape == (1, ids.shape[1], 96)


@needs_transformers
def test_several_feature_layers_are_refused(hf: Any) -> None:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION), vision_feature_layer=[-1, -2]
    )
    with pytest.raises(ValueError, match=r"vision_feature_layer=\[-1, -2\]: want one layer"):
        apply_token_merging(hf.LlavaForConditionalGeneration(config), 0.3)


@needs_transformers
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers_gives_the_same_gradients(hf: Any, reentrant: bool) -> None:
    theirs, pixels = clip(hf).train(), pixels_of().requires_grad_()
    apply_token_merging(theirs, 0.3, size_bias="keys")

    def gradients() -> list[Tensor]:
        theirs.zero_grad()
        out = theirs(pixels).last_hidden_state.square().sum() + theirs(pixels.flip(-1)).last_hidden_state.sum()
        out.backward()
        return [p.grad.clone() for p in theirs.encoder.parameters() if p.grad is not None]

    want, calls = gradients(), []
    theirs.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for layer in theirs.encoder.layers:
        layer.layer_norm2.register_forward_hook(lambda *_: calls.append(1))
    for got, gradient in zip(gradients(), want, strict=True):
        assert_close_to_golden(got, gradient)
    assert len(calls) == 2 * 2 * 4  # each layer ran twice, in each of two passes


@needs_transformers
def test_hf_tower_compiles_as_one_graph(hf: Any) -> None:
    theirs, pixels = clip(hf), pixels_of()
    merging = apply_token_merging(theirs, 0.3, size_bias="keys")
    torch.compiler.reset()
    compiled = torch.compile(theirs, fullgraph=True, backend="eager")
    with torch.no_grad():
        want = theirs(pixels).last_hidden_state
        assert want.shape[1] == 1 + merging.plan.num_visual_tokens
        assert_close_to_golden(compiled(pixels).last_hidden_state, want)


@needs_transformers
@needs_accelerate
def test_hooks_of_accelerate_stay_in_place(hf: Any) -> None:
    accelerate = importlib.import_module("accelerate.hooks")
    theirs, pixels, seen = clip(hf), pixels_of(), []

    class Watch(accelerate.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    with torch.no_grad():
        plain = theirs(pixels).last_hidden_state
        with apply_token_merging(theirs, 0.3):
            want = theirs(pixels).last_hidden_state
        for layer in theirs.encoder.layers:
            accelerate.add_hook_to_module(layer, Watch())
        with apply_token_merging(theirs, 0.3):
            assert torch.equal(theirs(pixels).last_hidden_state, want)
        assert seen == list(theirs.encoder.layers)
        assert torch.equal(theirs(pixels).last_hidden_state, plain)
        assert len(seen) == 8


@needs_transformers
def test_an_unknown_model_is_refused_by_name(hf: Any) -> None:
    model = hf.ViTModel(hf.ViTConfig(**VISION))
    with pytest.raises(ValueError, match="got a module of class ViTModel, want a vision tower or one of: "):
        apply_token_merging(model, 0.5)


@pytest.fixture(scope="module")
def open_clip() -> Any:
    define_missing_torchvision_ops()
    return importlib.import_module("open_clip")


def open_clip_tower(open_clip: Any, **changes: Any) -> Any:
    sizes = {
        "image_size": 56,
        "patch_size": 7,
        "width": 32,
        "layers": 4,
        "heads": 4,
        "mlp_ratio": 1.5,
        "output_dim": 16,
    }
    return randomise(open_clip.transformer.VisionTransformer(**sizes | changes))


@needs_open_clip
@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("wish", list(WISHES))
def test_open_clip_equals_ours(open_clip: Any, tmp_path: Path, wish: str, quick: bool) -> None:
    act = open_clip.transformer.QuickGELU if quick else nn.GELU
    theirs, pixels = open_clip_tower(open_clip, act_layer=act, output_tokens=True), pixels_of()
    vision = {"image_size": 56, "patch_size": 7, "width": 32, "layers": 4, "head_width": 8, "mlp_ratio": 1.5}
    config = {"model_cfg": {"quick_gelu": quick, "vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    state = {f"visual.{key}": value.contiguous() for key, value in theirs.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    ours = load_vision_tower(tmp_path)
    with torch.no_grad():
        plain = theirs(pixels)
        with apply_token_merging(theirs, **settings_of(WISHES[wish]), trace=True) as merging:
            want = run_ours(ours, pixels, WISHES[wish], -1)
            normed = ours.norm_post(want.hidden)
            pooled, tokens = theirs(pixels)
            assert_close_to_golden(tokens, normed[:, 1:])
            assert_close_to_golden(pooled, normed[:, 0] @ theirs.proj)
            for got, mine in zip(merging.sources, want.trace.sources, strict=True):
                assert torch.equal(got, mine)
            maps = theirs.forward_intermediates(pixels, indices=[3], intermediates_only=True)["image_intermediates"]
            index = want.trace.sources[-1][:, 1:, None].expand(-1, -1, 32)
            assert_close_to_golden(maps[0].flatten(2).transpose(1, 2), want.hidden.gather(1, index))
        assert all(torch.equal(a, b) for a, b in zip(theirs(pixels), plain, strict=True))


@needs_open_clip
def test_open_clip_models_and_refusals(open_clip: Any) -> None:
    vision = {"image_size": 56, "patch_size": 7, "width": 32, "layers": 2, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 4, "layers": 1}
    model = open_clip.model.CLIP(16, vision, text).eval()
    with torch.no_grad():
        want = model.encode_image(pixels_of())
        with apply_token_merging(model, 0.2, size_bias="keys"):
            assert not torch.allclose(model.encode_image(pixels_of()), want)
        assert torch.equal(model.encode_image(pixels_of()), want)
    with pytest.raises(
        ValueError, match=r"resblocks.0: got a block of class CustomResidualAttentionBlock, want one of"
    ):
        apply_token_merging(open_clip_tower(open_clip, qk_norm=True), 0.5)
    tower = open_clip_tower(open_clip).train()
    apply_token_merging(tower, 0.5)
    tower(pixels_of()).sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    tower.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="grad_checkpointing=True on VisionTransformer"):
        tower(pixels_of())


@needs_open_clip
def test_open_clip_compiles_as_one_graph(open_clip: Any) -> None:
    tower, pixels = open_clip_tower(open_clip, layers=2), pixels_of()
    apply_token_merging(tower, 0.3)
    torch.compiler.reset()
    with torch.no_grad():
        assert_close_to_golden(torch.compile(tower, fullgraph=True, backend="eager")(pixels), tower(pixels))
