"""Quantised models: made while they are read, saved, read again, converted, and refused where they do not fit."""

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora import BitsAndBytesConfig, Int8Config
from aurora.checkpoint import bnb
from aurora.checkpoint.convert import convert
from aurora.checkpoint.pretrained import load_language_model, load_model, load_pretrained, save_model
from aurora.checkpoint.quantization import (
    KINDS,
    agree,
    as_quantization,
    quantization_json,
    stored_quantization,
)
from aurora.checkpoint.quantize import find_quantization, quantize_model, quantized_linears
from aurora.checkpoint.store import CheckpointError
from aurora.cli import run
from aurora.conversion import main
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.int8 import Int8Linear, quantize_rows
from aurora.model.llama import Llama, LlamaConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.runtime import define_missing_torchvision_ops
from tests.checkpoint.tiny_models import CLIP_TOWER

needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes not installed")
ALL = [pytest.param(kind, marks=() if kind == "int8" else needs_bnb) for kind in KINDS]
DOUBLE = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
# Largest relative error of the logits that each kind may have on this random model.
ERRORS = {"int8": 0.03, "int8_bnb": 0.03, "nf4": 0.3, "fp4": 0.45}
TEXT = LlamaConfig(
    vocab_size=80, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64
)
IDS = torch.tensor([[1, 5, 9, 70, 33, 2, 7]])


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def captioner(*, tied: bool = False) -> AuroraModel:
    torch.manual_seed(0)
    text = dataclasses.replace(TEXT, tie_word_embeddings=tied)
    return AuroraModel(AuroraConfig(vision=CLIP_TOWER, text=text)).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "full"
    save_model(captioner(), folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "tied"
    save_model(captioner(tied=True), folder)
    return folder


@torch.inference_mode()
def logits(model: AuroraModel | Llama) -> Tensor:
    llama = model if isinstance(model, Llama) else model.language_model
    return llama(llama.embed(IDS), position_ids=torch.arange(IDS.shape[1])[None])


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("kind", ALL)
def test_quantised_while_read_saved_and_read_again(kind: str, full: Path, tmp_path: Path) -> None:
    loaded = load_pretrained(full, quantization=kind)
    model = loaded.model
    assert model.dtype == torch.bfloat16, "not widened"
    assert model.vision_tower.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    found = find_quantization(model)
    assert found is not None
    assert found.kind == kind
    before = relative(logits(model), logits(load_model(full)))
    assert 1e-3 < before < ERRORS[kind]
    plain = sum(file.stat().st_size for file in full.glob("*.safetensors"))
    for layout in ("aurora", "xtuner"):
        save_model(model, tmp_path / layout, layout)
        size = sum(file.stat().st_size for file in (tmp_path / layout).rglob("*.safetensors"))
        assert size < plain
        section = json.loads((tmp_path / layout / "config.json").read_text())["quantization_config"]
        assert stored_quantization({"quantization_config": section}).kind == kind  # type: ignore[union-attr]
        again = load_model(tmp_path / layout)
        assert torch.equal(logits(again), logits(model))
        assert find_quantization(again) == found
        alone = load_language_model(tmp_path / layout)
        assert torch.equal(logits(alone), logits(model))


@needs_bnb
def test_double_quantisation_and_layers_left_alone(full: Path, tmp_path: Path) -> None:
    wish = dataclasses.replace(DOUBLE, llm_int8_skip_modules=["layers.0", "down_proj"])
    model = load_model(full, quantization=wish)
    kinds = {name: type(module).__name__ for name, module in model.language_model.named_modules()}
    assert kinds["layers.1.mlp.up_proj"] == "Linear4bit"
    assert kinds["layers.0.mlp.up_proj"] == kinds["layers.1.mlp.down_proj"] == kinds["lm_head"] == "Linear"
    save_model(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    assert {name for name in names if name.startswith(key)} == {
        key, f"{key}.absmax", f"{key}.quant_map", f"{key}.nested_absmax", f"{key}.nested_quant_map",
        f"{key}.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_the_stored_form_of_ours(full: Path, tmp_path: Path) -> None:
    save_model(load_model(full, quantization=Int8Config()), tmp_path)
    stored, plain = load_file(tmp_path / "model.safetensors"), load_file(full / "model.safetensors")
    for name in ("language_model.model.layers.1.mlp.up_proj", "language_model.lm_head"):
        rounded, scale = quantize_rows(plain[f"{name}.weight"])
        assert torch.equal(stored[f"{name}.weight"], rounded)
        assert torch.equal(stored[f"{name}.weight_scale"], scale)
    untouched = [name for name in stored if stored[name].dtype != torch.int8 and not name.endswith("_scale")]
    assert "language_model.model.embed_tokens.weight" in untouched
    assert all(torch.equal(stored[name], plain[name]) for name in untouched)


def test_a_model_in_memory_is_quantised_alike(full: Path) -> None:
    model = load_model(full, dtype="auto")
    quantize_model(model, Int8Config())
    assert torch.equal(logits(model), logits(load_model(full, quantization="int8")))
    assert not model.language_model.layers[0].mlp.up_proj.training
    with pytest.raises(ValueError, match="the model is int8 already"):
        quantize_model(model, Int8Config())


def test_a_tied_head_becomes_a_layer_and_the_embeddings_stay(tied: Path, tmp_path: Path) -> None:
    model = load_model(tied, quantization="int8")
    assert isinstance(model.language_model.lm_head, Int8Linear)
    assert model.language_model.embed_tokens.weight.dtype == torch.bfloat16
    assert relative(logits(model), logits(load_model(tied))) < ERRORS["int8"]
    save_model(model, tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert again.config.text.tie_word_embeddings
    assert torch.equal(logits(again), logits(model))
    skipped = load_model(tied, quantization=Int8Config(("lm_head",)))
    assert skipped.language_model.lm_head is None
    save_model(skipped, tmp_path / "skipped")
    assert torch.equal(logits(load_model(tmp_path / "skipped")), logits(skipped))
    if importlib.util.find_spec("bitsandbytes") is not None:
        assert load_model(tied, quantization="nf4").language_model.lm_head is None


@pytest.mark.parametrize("layout", ["aurora", "xtuner", "llama"])
@pytest.mark.parametrize("which", ["full", "tied"])
def test_converting_equals_quantising_while_reading(
    layout: str, which: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    source: Path = request.getfixturevalue(which)
    settings = (f"model_path={source}", f"output={tmp_path / 'out'}", "quantize=int8")
    if layout == "llama":
        with pytest.raises(CheckpointError, match="layout llama: cannot store int8 weights, want aurora or xtuner"):
            convert(source, tmp_path / "out", layout="llama", quantization=Int8Config())
        assert not (tmp_path / "out").exists()
        return
    run(main, [*settings, f"layout={layout}", "dtype=float32"])
    want, got = load_model(source, quantization="int8").state_dict(), load_model(tmp_path / "out").state_dict()
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        is_quantised = tensor.dtype == torch.int8 or name.endswith("weight_scale")
        assert got[name].dtype == (tensor.dtype if is_quantised else torch.float32), name
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name


@pytest.mark.parametrize("kind", ALL)
def test_a_quantised_checkpoint_is_converted_as_it_is(kind: str, full: Path, tmp_path: Path) -> None:
    save_model(load_model(full, quantization=kind), tmp_path / "a", "aurora")
    convert(tmp_path / "a", tmp_path / "b", layout="xtuner", dtype=torch.float16)
    want = load_model(tmp_path / "a", dtype=torch.float16)
    assert torch.equal(logits(load_model(tmp_path / "b", dtype="auto")), logits(want))
    with pytest.raises(CheckpointError, match=f"layout llava_hf: cannot store {kind} weights"):
        convert(tmp_path / "a", tmp_path / "c", layout="llava_hf")
    convert(tmp_path / "a", tmp_path / "tower", layout="clip")
    assert "quantization_config" not in json.loads((tmp_path / "tower/config.json").read_text())
    if kind == "nf4":
        with pytest.raises(ValueError, match="stored as nf4"):
            convert(tmp_path / "a", tmp_path / "d", layout="aurora", quantization=Int8Config())


@pytest.mark.parametrize("kind", ALL)
def test_generation_runs(kind: str, full: Path) -> None:
    model = AuroraForConditionalGeneration.from_pretrained(
        full, torch_dtype=torch.float32, quantization_config=kind, device_map="auto"
    )
    ids = torch.tensor([[1, 5, model.config.image_token_index, 9]], device=model.device)
    pixels = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    out = model.generate(ids, pixels.to(model.device, model.dtype), max_new_tokens=4, eos_token_id=-1)
    assert isinstance(out, Tensor)
    assert out.shape == (1, 4)


@needs_bnb
def test_the_published_snippet(full: Path) -> None:
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float16,
    )
    model = AuroraForConditionalGeneration.from_pretrained(
        str(full), quantization_config=quantization_config, device_map="auto"
    )
    found = find_quantization(model)
    assert isinstance(found, BitsAndBytesConfig)
    assert (found.kind, found.compute_dtype) == ("nf4", torch.float16)


@needs_bnb
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True},
    ],
    ids=["int8", "nf4_double", "fp4"],
)
def test_transformers_reads_and_writes_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    define_missing_torchvision_ops()
    hf = importlib.import_module("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads)).bfloat16().save_pretrained(tmp_path / "full")
    config = hf.BitsAndBytesConfig(**settings)
    theirs = hf.LlamaForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "quantised")
    with torch.inference_mode():
        want = theirs(IDS).logits
    assert relative(logits(load_language_model(tmp_path / "quantised")), want) < 0.02
    assert relative(logits(load_language_model(tmp_path / "full", "bfloat16", quantization=config)), want) < 0.02
    stored = load_file(tmp_path / "quantised/model.safetensors")
    ours = load_language_model(tmp_path / "full", "bfloat16", quantization=config).state_dict()
    for name, tensor in ours.items():
        key = name if name.startswith("lm_head") else f"model.{name}"
        # Their dtype of a product is recorded in the packed text, and in ours it may be another one.
        if "quant_state" not in key:
            assert torch.equal(stored[key].reshape(tensor.shape), tensor), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "want exactly one of them"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "want exactly one of them"),
        ({"load_in_8bit": 1}, "load_in_8bit=1.*want True or False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type='int4': want fp4 or nf4"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype='int8': want one of"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.float16}, "bnb_4bit_quant_storage=.*want uint8"),
        ({"load_in_8bit": True, "llm_int8_threshold": "6"}, "llm_int8_threshold='6': want a number"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True: want False"),
        ({"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}, "cpu_offload=True: want False"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules='lm_head': want a list"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitsAndBytesConfig(**settings)


def test_what_may_be_asked_for() -> None:
    assert as_quantization(None) is None
    assert as_quantization("nf4").kind == "nf4"  # type: ignore[union-attr]
    foreign = SimpleNamespace(load_in_8bit=False, load_in_4bit=True, bnb_4bit_quant_type="nf4", quant_method="any")
    assert as_quantization(foreign) == BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for config in (*KINDS.values(), DOUBLE):
        again = as_quantization(json.loads(json.dumps(quantization_json(config))))
        assert quantization_json(again) == quantization_json(config)  # type: ignore[arg-type]
    for wrong in ("int4", 8, object()):
        with pytest.raises(ValueError, match=r"quantization_config=.*int8_bnb, nf4, fp4"):
            as_quantization(wrong)
    with pytest.raises(ValueError, match="'gptq': want bitsandbytes or aurora_int8"):
        as_quantization({"quant_method": "gptq"})


def test_a_skipped_name_that_fits_nothing_is_refused(full: Path) -> None:
    assert len(quantized_linears(TEXT, Int8Config())) == 2 * 7 + 1
    assert len(quantized_linears(TEXT, Int8Config(("layers.1", "lm_head")))) == 7
    with pytest.raises(ValueError, match="skip_modules: 'lm_haed' fits no layer"):
        load_model(full, quantization=Int8Config(("lm_haed",)))


def test_stored_one_way_and_wanted_another(full: Path, tmp_path: Path) -> None:
    save_model(load_model(full, quantization="int8"), tmp_path)
    assert torch.equal(logits(load_model(tmp_path, quantization="int8")), logits(load_model(tmp_path)))
    with pytest.raises(ValueError, match="quantization_config=nf4: the checkpoint is stored as int8"):
        load_model(tmp_path, quantization="nf4")
    for layout in ("llava_hf", "llava"):
        with pytest.raises(CheckpointError, match=f"layout {layout}: cannot store int8 weights"):
            save_model(load_model(tmp_path), tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float16")
    settled = agree(wanted, stored)
    assert settled == dataclasses.replace(stored, bnb_4bit_compute_dtype=torch.float16)


def test_tensors_that_do_not_fit_what_the_config_says(full: Path, tmp_path: Path) -> None:
    save_model(load_model(full, quantization="int8"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "language_model.model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight_scale"]
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].half()
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert f"{name}.weight_scale  want 96" in str(caught.value)
    assert "language_model.lm_head.weight" in str(caught.value)
    assert "got torch.float16, want torch.int8" in str(caught.value)
    content = json.loads((tmp_path / "config.json").read_text())
    for section, message in (
        ({"quant_method": "awq"}, "config.json: quantization_config: quant_method='awq': want bitsandbytes"),
        ([1], r"quantization_config=\[1\]: want an object"),
        ({"load_in_4bit": "yes"}, "want True or False"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**content, "quantization_config": section}))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
    del content["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"got torch\.int8, want a floating one"):
        load_model(tmp_path)


def test_without_bitsandbytes_the_command_is_named(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name))
    bnb._bitsandbytes.cache_clear()
    try:
        with pytest.raises(ValueError, match="want bitsandbytes: pip install bitsandbytes"):
            load_model(full, quantization="nf4")
        load_model(full, quantization="int8")
    finally:
        bnb._bitsandbytes.cache_clear()


@pytest.fixture
def flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, and a GPU that it could run on."""
    (tmp_path / "flash_attn.py").write_text("def flash_attn_func(*args, **kwargs): raise RuntimeError('a stub')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


FLASH = [{"attn_implementation": "flash_attention_2"}, {"use_flash_attention_2": True}]


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("settings", FLASH)
def test_flash_attention_is_taken_when_it_is_there(settings: dict[str, Any], full: Path) -> None:
    model = AuroraForConditionalGeneration.from_pretrained(full, torch_dtype=torch.float16, **settings)
    assert model.config.attn_implementation == "flash_attention_2"
    assert model.model.language_model.backend == model.model.vision_tower.backend == "flash_attention_2"
    with pytest.raises(ValueError, match="takes float16 and bfloat16, got float32"):
        AuroraForConditionalGeneration.from_pretrained(full, **settings)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
@pytest.mark.parametrize("settings", FLASH)
def test_without_flash_attention_the_command_is_named(settings: dict[str, Any], full: Path) -> None:
    with pytest.raises(ValueError, match="flash-attn is not installed: pip install flash-attn"):
        AuroraForConditionalGeneration.from_pretrained(full, torch_dtype=torch.float16, **settings)
