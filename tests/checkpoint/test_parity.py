"""The same numbers as transformers and timm from the same files: towers, language models, LLaVA, pixels, templates.

Both packages are part of the dev extra; each test is skipped only where its package is not installed.
"""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora import AuroraForConditionalGeneration
from aurora.checkpoint.convert import convert
from aurora.checkpoint.pretrained import load_language_model, load_pretrained, load_vision_tower, save_model
from aurora.generation.engine import generate
from aurora.generation.sampling import SamplingConfig
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import Llama, LlamaConfig
from aurora.model.vision import Activation, VisionConfig, VisionTower
from aurora.processing.chat import apply_chat_template
from aurora.processing.image import AspectRatio, AuroraImageProcessor, ImageConfig
from aurora.runtime import define_missing_torchvision_ops
from tests.golden import assert_close_to_golden

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LLAMAS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
}


@pytest.fixture(scope="module")
def hf() -> Any:
    define_missing_torchvision_ops()
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def timm() -> Any:
    define_missing_torchvision_ops()
    return importlib.import_module("timm")


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw every weight, biases and norms too: fresh ones are zeros and ones, which hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + (parameter.ndim == 1) * 0.7)
    return model.eval()


def pixels_of(frames: int = 2, side: int = 28) -> Tensor:
    return torch.randn(frames, 3, side, side, generator=torch.Generator().manual_seed(1))


def assert_tower_equals(tower: VisionTower, hidden_states: tuple[Tensor, ...], pixels: Tensor) -> None:
    """Every hidden state, which Hugging Face counts from the embeddings on."""
    for layer in range(-len(hidden_states), 0):
        with torch.no_grad():
            assert_close_to_golden(tower(pixels, feature_layer=layer).hidden, hidden_states[layer])


@needs_transformers
@pytest.mark.parametrize("whole", [False, True], ids=["vision_model", "pair"])
@pytest.mark.parametrize(("kind", "act"), [("CLIP", "quick_gelu"), ("CLIP", "gelu"), ("Siglip", "gelu_pytorch_tanh")])
def test_vision_towers(hf: Any, tmp_path: Path, kind: str, act: str, whole: bool) -> None:
    vision = getattr(hf, f"{kind}VisionConfig")(**VISION, hidden_act=act)
    if whole:
        words = {
            "vocab_size": 20, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip
        config = getattr(hf, f"{kind}Config")(text_config=words, vision_config=vision.to_dict())
        pair = randomise(getattr(hf, f"{kind}Model")(config))
        pair.save_pretrained(tmp_path / "pair")
        theirs = pair.vision_model
    else:
        theirs = randomise(getattr(hf, f"{kind}VisionModel")(vision))
        theirs.save_pretrained(tmp_path / "pair")
    pixels = pixels_of()
    with torch.no_grad():
        states = theirs(pixels, output_hidden_states=True).hidden_states
    assert_tower_equals(load_vision_tower(tmp_path / "pair"), states, pixels)
    # And what we write of it, they read.
    name = "siglip" if kind == "Siglip" else "clip"
    convert(tmp_path / "pair", tmp_path / "ours", layout=name)
    again, report = getattr(hf, f"{kind}VisionModel").from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels, output_hidden_states=True).hidden_states[-1], states[-1])


def ids_of(rows: int = 2, length: int = 40, vocabulary: int = 96) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))


def llama_logits(model: Llama, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(model.embed(ids), position_ids=positions)


def greedy(model: AuroraModel, ids: Tensor, pixels: Tensor | None, count: int) -> list[int]:
    """Greedy ids of one row, none of which ends it."""
    with torch.no_grad():
        visual = None if pixels is None else model.encode(pixels)
        spliced = model.splice(ids, visual, padding_side="left")
        made = generate(model, spliced, SamplingConfig(max_new_tokens=count, eos_token_id=-1))
    return made.sequences[0].tolist()


def as_captioner(model: Llama) -> AuroraModel:
    """A captioner around a language model, for its generation loop."""
    tower = VisionConfig(hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1, patch_size=4, image_size=8)
    whole = AuroraModel(AuroraConfig(text=model.config, vision=tower))
    whole.language_model = model
    return whole.eval()


@needs_transformers
@pytest.mark.parametrize("name", list(LLAMAS))
def test_language_models(hf: Any, tmp_path: Path, name: str) -> None:
    theirs = randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | LLAMAS[name])))
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_language_model(tmp_path / "hf")
    ids = ids_of()
    with torch.no_grad():
        want = theirs(ids).logits
        made = theirs.generate(ids[:1], max_new_tokens=32, min_new_tokens=32, do_sample=False)
    assert_close_to_golden(llama_logits(ours, ids), want)
    # min_new_tokens forbids the end-of-text token there; here nothing ends a row, so it must not be the likeliest.
    assert greedy(as_captioner(ours), ids[:1], None, 32) == made[0, ids.shape[1] :].tolist()
    convert(tmp_path / "hf", tmp_path / "ours", layout="llama")
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)


@needs_transformers
def test_old_spellings_of_rope_scaling_give_the_same_numbers(hf: Any, tmp_path: Path) -> None:
    for number, rope in enumerate(({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0})):
        theirs = randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | LLAMAS["linear"])))
        folder = tmp_path / str(number)
        theirs.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
        with torch.no_grad():
            assert_close_to_golden(llama_logits(load_language_model(folder), ids_of()), theirs(ids_of()).logits)


@pytest.fixture(scope="module")
def llava(hf: Any) -> Any:
    """Random LLaVA whose placeholder, id 95, is a token of the vocabulary."""
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT | LLAMAS["gqa"]),
        vision_config=hf.CLIPVisionConfig(**VISION, hidden_act="quick_gelu"),
        image_token_index=95,
        image_seq_length=16,
    )
    return randomise(hf.LlavaForConditionalGeneration(config))


def llava_inputs() -> tuple[Tensor, Tensor]:
    """Ids with one placeholder (1, 20), and a picture (1, 3, 28, 28)."""
    ids = ids_of(1, 20, 90)
    ids[0, 4] = 95
    return ids, pixels_of(1)


def their_ids(ids: Tensor) -> Tensor:
    """Their placeholders: one for each of the 16 patches."""
    return torch.cat([ids[:, :4], torch.full((1, 16), 95), ids[:, 5:]], dim=1)


def assert_llava_equals(theirs: Any, ours: AuroraModel) -> None:
    ids, picture = llava_inputs()
    inputs = {"input_ids": their_ids(ids), "pixel_values": picture}
    with torch.no_grad():
        want = theirs(**inputs).logits
        made = theirs.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        got = ours(ids, pixel_values=picture[:, None]).logits
    assert_close_to_golden(got, want)
    assert greedy(ours, ids, picture[:, None], 24) == made[0, inputs["input_ids"].shape[1] :].tolist()


LLAVA_STYLES = {
    "v5": (),
    "legacy": (("vision_tower.", "vision_tower.vision_model."),),
    "4.52": (
        ("vision_tower.", "model.vision_tower.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ),
    "memory": (
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ),
}


@needs_transformers
@pytest.mark.parametrize("style", list(LLAVA_STYLES))
def test_llava_of_every_transformers_version(llava: Any, tmp_path: Path, style: str) -> None:
    llava.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    renamed = {}
    for key, tensor in load_file(file).items():
        for old, new in LLAVA_STYLES[style]:
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        renamed[key] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    loaded = load_pretrained(tmp_path / "hf")
    assert loaded.layout == "llava_hf"
    assert_llava_equals(llava, loaded.model)


@needs_transformers
def test_llava_we_write_is_read_by_transformers(hf: Any, llava: Any, tmp_path: Path) -> None:
    llava.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "aurora", layout="aurora")
    model = AuroraForConditionalGeneration.from_pretrained(tmp_path / "aurora").model
    assert_llava_equals(llava, model)
    # With a placeholder outside the vocabulary, as AuroraCap's: rows are added, and change no id.
    model.config.image_token_index, model.config.text.vocab_size = -200, 96
    save_model(model, tmp_path / "ours", "llava_hf")
    theirs, report = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.text_config.vocab_size == 128
    ids, picture = llava_inputs()
    placeholders = their_ids(ids)
    inputs = {"input_ids": placeholders.masked_fill(placeholders == 95, 96), "pixel_values": picture}
    with torch.no_grad():
        want = theirs.eval()(**inputs).logits
        made = theirs.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    ours = ids.masked_fill(ids == 95, -200)
    with torch.no_grad():
        assert_close_to_golden(model(ours, pixel_values=picture[:, None]).logits, want[..., :96])
    assert greedy(model, ours, picture[:, None], 24) == made[0, inputs["input_ids"].shape[1] :].tolist()


@needs_transformers
@pytest.mark.parametrize(("height", "width"), [(70, 70), (48, 64), (333, 500), (500, 331), (29, 31)])
def test_clip_image_processor(hf: Any, tmp_path: Path, height: int, width: int) -> None:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    theirs = hf.CLIPImageProcessorPil(size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70})
    theirs.save_pretrained(tmp_path)
    ours = AuroraImageProcessor.from_pretrained(tmp_path)
    assert ours.config.aspect_ratio is AspectRatio.crop
    assert_close_to_golden(ours(image), theirs(image, return_tensors="pt")["pixel_values"])
    AuroraImageProcessor(ImageConfig(image_size=56)).save_pretrained(tmp_path)
    again = hf.CLIPImageProcessorPil.from_pretrained(tmp_path)
    assert_close_to_golden(
        AuroraImageProcessor(ImageConfig(image_size=56))(image), again(image, return_tensors="pt")["pixel_values"]
    )


TEMPLATES = {
    "vicuna": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "chatml": "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' }}\n    {{- m.content | trim + "
    "'<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n",
    "loop": "{% for m in messages %}{% if loop.first %}{{ m | tojson }}{% continue %}{% endif %}\n"
    "  {{ loop.index0 }}={{ m.content | upper }}\n{% endfor %}",
}
CONVERSATIONS = [
    [{"role": "user", "content": "What is <b>this</b>? "}],
    [
        {"role": "user", "content": "Was ist das, \u00e4h?\nZeile 2"},
        {"role": "assistant", "content": "A \U0001f98a & friends"},
        {"role": "user", "content": "'quoted' {{ braces }}"},
    ],
]


@needs_transformers
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_chat_templates(hf: Any, name: str, prompt: bool) -> None:
    tokenizers = importlib.import_module("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    theirs = hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    # Content as a list of parts is ours to normalise; theirs sees the text alone.
    template = TEMPLATES[name]
    ours = template.replace("m['content']", "m.content[0].text").replace("m.content |", "m.content[0].text |")
    for conversation in CONVERSATIONS:
        if name == "loop" and len(conversation) == 1:
            continue
        want = theirs.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        got = apply_chat_template(
            conversation,
            ours.replace("{{ m | tojson }}", "{{ {'role': m.role, 'content': m.content[0].text} | tojson }}"),
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
        assert got == want


def timm_hidden(model: Any, pixels: Tensor) -> tuple[Tensor, ...]:
    """Embeddings and the output of every block, class token first if there is one."""
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
        states = [x]
        for block in model.blocks:
            states.append(block(states[-1]))
    return tuple(states)


TIMM_TOWERS = {
    "clip": ("vit_base_patch16_clip_224", {"act_layer": "quick_gelu"}),
    "clip_gelu": ("vit_base_patch16_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh"}),
    "plain": ("vit_tiny_patch16_224", {"num_classes": 7}),
}


@needs_timm
@pytest.mark.parametrize("name", list(TIMM_TOWERS))
def test_timm_towers(timm: Any, tmp_path: Path, name: str) -> None:
    architecture, extra = TIMM_TOWERS[name]
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5, **extra}
    theirs = randomise(timm.create_model(architecture, **sizes))
    timm.models.save_for_hf(theirs, tmp_path / "timm", model_args=sizes, safe_serialization=True)
    tower = load_vision_tower(tmp_path / "timm")
    assert tower.config.hidden_act is {
        "clip": Activation.quick_gelu, "siglip": Activation.gelu_tanh,
    }.get(name, Activation.gelu)  # fmt: skip
    pixels = pixels_of()
    states = timm_hidden(theirs, pixels)
    assert_tower_equals(tower, states, pixels)
    # And what we write of it, timm reads.
    convert(tmp_path / "timm", tmp_path / "ours", layout="timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert_close_to_golden(timm_hidden(again, pixels)[-1], states[-1], rtol=0)


@needs_timm
def test_sizes_of_timms_architectures(timm: Any) -> None:
    """The table of plain ViTs against timm itself."""
    from aurora.checkpoint.timm import vision_from_timm

    for name in (
        "vit_tiny_patch16_224", "vit_base_patch32_224", "vit_large_patch14_clip_336", "vit_huge_patch14_clip_378",
        "vit_giant_patch14_clip_224", "vit_so400m_patch14_siglip_378", "vit_giantopt_patch16_siglip_384",
    ):  # fmt: skip
        with torch.device("meta"):
            theirs = timm.create_model(name)
        config = vision_from_timm({"architecture": name})
        block = theirs.blocks[0]
        assert config.hidden_size == theirs.embed_dim, name
        assert (config.num_layers, config.num_heads) == (len(theirs.blocks), block.attn.num_heads), name
        assert config.intermediate_size == block.mlp.fc1.out_features, name
        assert config.norm_eps == block.norm1.eps, name
        assert config.grid_size**2 + config.num_prefix_tokens == theirs.pos_embed.shape[1], name
        assert config.patch_bias == (theirs.patch_embed.proj.bias is not None), name
        assert config.pre_norm == isinstance(theirs.norm_pre, torch.nn.LayerNorm), name


def test_llama_config_is_what_the_tests_think() -> None:
    """The tiny sizes reach the blend of llama3's scaling: some frequencies are kept, some divided, some between."""
    config = LlamaConfig(hidden_size=32, num_heads=4, num_kv_heads=2, rope_theta=500000.0)
    turns = 32 * (1.0 / config.rope_theta ** (torch.arange(0, 8, 2) / 8)) / (2 * torch.pi)
    assert bool((turns > 4).any())
    assert bool((turns < 1).any())
