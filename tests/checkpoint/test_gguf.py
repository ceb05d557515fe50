"""GGUF: block formats, metadata, refusals that name file and field, and Llama models loaded to the same logits."""

import importlib.util
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from aurora.checkpoint.convert import convert
from aurora.checkpoint.gguf import LLAMA_GGUF, GGUFFile, load_llama, read_llama_config, restore_rotary_order
from aurora.checkpoint.gguf_blocks import FORMATS
from aurora.checkpoint.pretrained import load_language_model
from aurora.checkpoint.store import CheckpointError
from aurora.model.cache import KVCache
from aurora.model.llama import Llama, LlamaConfig, RopeScaling, rotary_frequencies
from aurora.processing.gguf_tokenizer import load_gguf_tokenizer
from aurora.processing.text import Tokenizer
from aurora.runtime import define_missing_torchvision_ops
from tests.checkpoint import gguf_files as files
from tests.smollm2 import needs_smollm2, smollm2_file

NUMBER_OF = {form.name: number for number, form in FORMATS.items()}
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)} | {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
}


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def logits(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(model.embed(ids), position_ids=torch.arange(ids.shape[1])[None].expand_as(ids))


@pytest.mark.parametrize(
    ("name", "block", "want"),
    [
        ("Q4_0", half(0.5) + bytes([0x1F] * 16), [(15 - 8) * 0.5] * 16 + [(1 - 8) * 0.5] * 16),
        ("Q4_1", half(0.5) + half(-1) + bytes([0x2C] * 16), [12 * 0.5 - 1] * 16 + [2 * 0.5 - 1] * 16),
        ("Q5_0", half(2) + struct.pack("<I", 1 << 31) + bytes(16), [-32.0] * 31 + [0.0]),
        ("Q5_1", half(2) + half(1) + struct.pack("<I", 1 << 16) + bytes(16), [1.0] * 16 + [33.0] + [1.0] * 15),
        ("Q8_0", half(0.25) + bytes([0x80] * 32), [-32.0] * 32),
    ],
)
def test_blocks_by_hand(name: str, block: bytes, want: list[float]) -> None:
    decoded = FORMATS[NUMBER_OF[name]].decode(np.frombuffer(block, np.uint8)[None])
    assert decoded.dtype == np.float32
    assert decoded.tolist() == [want]


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
@pytest.mark.parametrize("name", [form.name for form in FORMATS.values() if form.name not in ("F32", "F16")])
def test_blocks_as_the_reference_package_decodes_them(name: str) -> None:
    from gguf import GGMLQuantizationType, quants

    form = FORMATS[NUMBER_OF[name]]
    blocks = files.random_blocks(300, form.num_bytes, HALVES.get(name, (0,)), seed=1)
    want = quants.dequantize(blocks, GGMLQuantizationType[name]).reshape(300, form.num_weights)
    assert np.isfinite(want).all()
    np.testing.assert_array_equal(form.decode(blocks), want)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_with_the_same_weights_and_logits(tmp_path: Path, tied: bool) -> None:
    model = files.tiny_llama(tie_word_embeddings=tied)
    loaded = load_llama(files.write_gguf(tmp_path / "m.gguf", model))
    assert loaded.config.tie_word_embeddings == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    assert not loaded.training


def test_rows_in_llama_cpps_order_are_not_ours(tmp_path: Path) -> None:
    weight = torch.arange(64.0).view(16, 4)
    stored = files.interleave(weight, 8)
    assert not torch.equal(stored, weight)
    assert torch.equal(restore_rotary_order(stored, 8), weight)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_weights_load_in_every_dtype(tmp_path: Path, name: str) -> None:
    tensors = files.llama_tensors(files.tiny_llama())
    form = FORMATS[NUMBER_OF[name]]
    key = "blk.1.ffn_up.weight"  # (64, 32)
    blocks = files.random_blocks(64 * 32 // form.num_weights, form.num_bytes, HALVES.get(name, (0,)), seed=3)
    tensors[key] = (NUMBER_OF[name], (64, 32), blocks.tobytes())
    path = tmp_path / "m.gguf"
    path.write_bytes(files.gguf_bytes(files.llama_metadata(), tensors))
    want = torch.from_numpy(form.decode(blocks)).view(64, 32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = load_llama(path, dtype=dtype)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
        assert torch.equal(model.layers[1].mlp.up_proj.weight, want.to(dtype))
    assert load_llama(path, dtype="auto").norm.weight.dtype == torch.float16


def test_changing_a_loaded_weight_leaves_the_file_alone(tmp_path: Path) -> None:
    path = files.write_gguf(tmp_path / "m.gguf", files.tiny_llama())
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in load_llama(path).parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_config_fields(tmp_path: Path) -> None:
    model = files.tiny_llama(rope_theta=500000.0, norm_eps=1e-6)
    with GGUFFile(files.write_gguf(tmp_path / "m.gguf", model)) as file:
        config = read_llama_config(file)
    assert config.norm_eps == pytest.approx(1e-6)
    config.norm_eps = model.config.norm_eps
    assert config == model.config


def test_linear_rope_scaling(tmp_path: Path) -> None:
    extra = {
        "llama.rope.scaling.type": (files.STRING, "linear"),
        "llama.rope.scaling.factor": (files.F32, 4.0),
    }
    config = load_llama(files.write_gguf(tmp_path / "m.gguf", files.tiny_llama(), extra)).config
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=4.0)
    assert config.max_seq_len == 4 * files.TINY.max_seq_len
    more = extra | {"llama.rope.scaling.original_context_length": (files.U32, 16)}
    config = load_llama(files.write_gguf(tmp_path / "m.gguf", files.tiny_llama(), more)).config
    assert config.max_seq_len == files.TINY.max_seq_len


def test_llama3_rope_scaling_is_read_from_its_table(tmp_path: Path) -> None:
    scaling = RopeScaling(rope_type="llama3", factor=32.0)
    model = files.tiny_llama(rope_theta=500000.0, hidden_size=256, rope_scaling=scaling)
    plain = LlamaConfig(hidden_size=256, num_heads=4, num_kv_heads=2, rope_theta=500000.0)
    device = torch.device("cpu")
    table = rotary_frequencies(plain, device) / rotary_frequencies(model.config, device)
    assert 1.0 < float(table[table > 1].min()) < 32.0  # some frequencies lie in between
    tensors = files.llama_tensors(model)
    tensors["rope_freqs.weight"] = (0, (32,), table.numpy().tobytes())
    path = tmp_path / "m.gguf"
    path.write_bytes(files.gguf_bytes(files.llama_metadata(model.config), tensors))
    assert load_llama(path).config.rope_scaling == scaling
    tensors["rope_freqs.weight"] = (0, (32,), (table * 1.1).numpy().tobytes())
    path.write_bytes(files.gguf_bytes(files.llama_metadata(model.config), tensors))
    with pytest.raises(CheckpointError, match=r"m\.gguf: rope_freqs\.weight: not the table"):
        load_llama(path)


def test_conversion_takes_the_tokenizer_along(tmp_path: Path) -> None:
    model = files.tiny_llama()
    tokens = ["<s>", "</s>", "<p>", *files.byte_alphabet()[97:123], *(chr(65 + i) for i in range(17)), "ab", "abc"]
    extra: dict[str, files.Value] = {
        "tokenizer.ggml.model": (files.STRING, "gpt2"),
        "tokenizer.ggml.tokens": (files.ARRAY, files.STRING, tokens),
        "tokenizer.ggml.token_type": (files.ARRAY, 5, [3, 3, 3, *[1] * 45]),
        "tokenizer.ggml.merges": (files.ARRAY, files.STRING, ["a b", "ab c"]),
        "tokenizer.ggml.bos_token_id": (files.U32, 0),
        "tokenizer.ggml.eos_token_id": (files.U32, 1),
        "tokenizer.ggml.padding_token_id": (files.U32, 2),
    }
    path = files.write_gguf(tmp_path / "m.gguf", model, extra)
    convert(path, tmp_path / "out", layout="llama")
    again = load_language_model(tmp_path / "out", dtype=torch.float16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.half()), name
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("abcab<p>") == load_gguf_tokenizer(path).encode("abcab<p>") == [47, 46, 2]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 1, 2]


def test_key_map_is_the_same_both_ways() -> None:
    with torch.device("meta"):
        keys = list(Llama(LlamaConfig(num_layers=12)).state_dict())
    for key in keys:
        foreign = LLAMA_GGUF.to_foreign(key)
        assert foreign == files.gguf_name(key)
        assert LLAMA_GGUF.to_ours(foreign) == key


def test_metadata_values(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(
        files.gguf_bytes(
            {
                "u8": (0, 255),
                "i64": (11, -5),
                "f64": (12, 0.1),
                "yes": (files.BOOL, True),
                "words": (files.ARRAY, files.STRING, ["a", "日本", ""]),
                "numbers": (files.ARRAY, 5, [1, -2]),
                "flags": (files.ARRAY, files.BOOL, [True, False]),
            },
            {},
        )
    )
    with GGUFFile(path) as file:
        found = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in file.metadata.items()}
    assert found == {
        "u8": 255,
        "i64": -5,
        "f64": 0.1,
        "yes": True,
        "words": ["a", "日本", ""],
        "numbers": [1, -2],
        "flags": [True, False],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": (files.STRING, "qwen2")}, "general.architecture='qwen2': want llama"),
        ({"llama.block_count": (files.U32, 2**31 - 1)}, "llama.block_count=2147483647: want 2"),
        ({"llama.embedding_length": (files.U32, 64)}, "llama.embedding_length=64: want 32"),
        ({"llama.feed_forward_length": (files.STRING, "x")}, "llama.feed_forward_length='x': want an integer"),
        ({"llama.attention.head_count": (files.U32, 0)}, "llama.attention.head_count=0: want"),
        ({"llama.attention.head_count": (files.U32, 5)}, "llama.rope.dimension_count=8: want 6"),
        ({"llama.attention.head_count_kv": (files.U32, 3)}, "text.num_kv_heads=3: want a divisor"),
        ({"llama.attention.head_count_kv": (files.U32, 4)}, "blk.0.attn_k.weight  got (16, 32), want (32, 32)"),
        ({"llama.expert_count": (files.U32, 8)}, "llama.expert_count=8: want 0"),
        ({"llama.rope.freq_base": (files.F32, float("nan"))}, "llama.rope.freq_base=nan: want a number above 0"),
        ({"llama.rope.scaling.type": (files.STRING, "yarn")}, "llama.rope.scaling.type='yarn': want none or linear"),
        ({"general.alignment": (files.U32, 24)}, "general.alignment=24: want a power of two"),
    ],
)
def test_unusable_metadata_is_named(tmp_path: Path, change: dict[str, files.Value], message: str) -> None:
    path = files.write_gguf(tmp_path / "m.gguf", files.tiny_llama(), change)
    with pytest.raises(CheckpointError) as error:
        load_llama(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    tensors = files.llama_tensors(files.tiny_llama())
    del tensors["blk.1.attn_norm.weight"]
    tensors["blk.0.attn_q.bias"] = (0, (32,), bytes(128))
    tensors["output_norm.weight"] = (0, (16,), bytes(64))
    path = tmp_path / "m.gguf"
    path.write_bytes(files.gguf_bytes(files.llama_metadata(), tensors))
    with pytest.raises(CheckpointError) as error:
        load_llama(path)
    assert str(error.value).splitlines() == [
        f"{path}: 3 tensors do not fit the metadata:",
        "  unexpected  blk.0.attn_q.bias  got (32,)",
        "  missing  blk.1.attn_norm.weight  want (32,)",
        "  misshapen  output_norm.weight  got (16,), want (32,)",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GGU", "magic: want 4 bytes at position 0, the file has 3"),
        (b"PK\x03\x04" + bytes(64), "magic=b'PK"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version=1: want 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version=50331648: want 2 or 3, little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "metadata key 0: want 8 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "name of tensor 0: want 8 bytes"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "metadata key 0: want 9223372036854775808 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<I", 77), "k: got value type 77"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IIQ", 9, 0, 2**50),
            "k: got 1125899906842624 values, want at most",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IIQ", 9, 9, 1),
            "k: got an array of value type 9",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe",
            "k: not UTF-8 at byte 0",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (files.text("k") + struct.pack("<II", 4, 1)) * 2, "k: stands twice"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        GGUFFile(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"t": (99, (4,), bytes(16))}, "t: got tensor type 99, want one of F32"),
        ({"t": (0, (0, 4), b"")}, "t: got shape (0, 4)"),
        ({"t": (8, (2, 40), bytes(85))}, "t: got shape (2, 40), want rows of whole blocks of 32"),
        ({"t": (0, (2**40, 2**40), bytes(16))}, "t: want 4835703278458516698824704 bytes"),
        ({"t": (0, (8,), bytes(16))}, "t: want 32 bytes"),
        ({"t": (0, (16,), bytes(4)), "u": (0, (1,), bytes(64))}, "u: got offset 32, want a free multiple of 32"),
        ({"t": (0, (1, 1, 1, 1, 1), bytes(4))}, "t: got 5 dimensions, want 1 to 4"),
    ],
)
def test_impossible_tensors_are_refused(
    tmp_path: Path, tensors: dict[str, tuple[int, tuple[int, ...], bytes]], message: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(files.gguf_bytes({}, tensors))
    with pytest.raises(CheckpointError) as error:
        GGUFFile(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_other_dtypes_and_backends_are_refused(tmp_path: Path) -> None:
    path = files.write_gguf(tmp_path / "m.gguf", files.tiny_llama())
    with pytest.raises(ValueError, match=r"torch_dtype=torch\.int8: want auto or one of"):
        load_llama(path, dtype=torch.int8)
    with pytest.raises(ValueError, match="attn_implementation='magic': want one of auto"):
        load_llama(path, attn_implementation="magic")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_a_file_of_the_reference_writer_is_read(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    model = files.tiny_llama()
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b"])
    for key, (_, shape, content) in files.llama_tensors(model).items():
        writer.add_tensor(key, np.frombuffer(content, np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_llama(tmp_path / "m.gguf")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nDescribe a cat in two sentences.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Q: What is 12 + 30?\nA:",
)
TEXT = """\
The harbour lay still before sunrise, and only the gulls were awake. A narrow boat with a blue hull rocked against the
stone quay, its ropes creaking each time a small wave passed below. On the deck sat an old man in a thick wool coat. He
had a mug of tea between his hands and watched the horizon, where a thin band of orange light was beginning to grow.

When the light reached the lighthouse, a girl came running down the steps with a basket on her arm. She had brought
bread, two apples, and a jar of honey that her grandmother kept for special days. "You said we would leave at six," she
called, out of breath. The old man laughed. He told her that the tide did not own a watch, and that it would wait for
nobody, but that it was in no hurry either.

They pushed off together. The engine coughed twice and then settled into a steady hum, and the houses behind them became
small squares of white and yellow. Past the breakwater the sea was darker, and long slow swells lifted the boat and set
it down again as gently as a hand. The girl leaned over the side to look for fish. She counted jellyfish instead: first
five, then a dozen, then so many that she gave up and simply looked.

By nine o'clock the wind had turned to the west. Clouds gathered over the hills and the water changed from blue to grey.
The old man studied the sky for a while, then turned the boat around without a word. There would be other mornings, he
thought, and the sea would still be here. On the way home the girl fell asleep on a pile of nets, and the basket, empty
now except for the apple cores, slid back and forth across the deck with every wave.

In the evening it rained, as he had known it would. The girl drew a picture of the jellyfish at the kitchen table, with
a great many of them and no boat at all. Her grandmother hung it next to the stove. Under it, in careful letters, the
girl had written the date, the number of apples they had eaten, and the words: we came back because of the wind.
"""


@torch.inference_mode()
def greedy(model: Llama, ids: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """New ids of left-padded prompts, (B, num_tokens)."""
    rows, length = ids.shape
    cache = KVCache(
        model.config,
        batch_size=rows,
        max_length=length + num_tokens,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    mask = torch.cat([mask, mask.new_ones(rows, num_tokens)], dim=1).bool()
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    while ids.shape[1] < length + num_tokens:
        new = slice(cache.length, ids.shape[1])
        out = model(
            model.embed(ids[:, new]),
            position_ids=positions[:, new],
            attention_mask=mask[:, : ids.shape[1]],
            cache=cache,
            logits_to_keep=1,
        )
        ids = torch.cat([ids, out[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, length:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_smollm2
def test_smollm2_as_transformers_reads_it() -> None:
    """Greedy ids of five prompts, and the perplexity of a text, with each side's own reading of the file."""
    define_missing_torchvision_ops()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID251

    file = smollm2_file()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours, tokenizer = load_llama(file), load_gguf_tokenizer(file)
    assert len(TEXT.encode()) in range(1900, 2200)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert prompts == [words.encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None, "pad_token_id": 0}
    want = theirs.generate(ids, attention_mask=mask, **settings)[:, width:]
    assert want.shape == (5, 64)
    assert greedy(ours, ids, mask, 64).tolist() == want.tolist()
    assert "Paris" in tokenizer.decode(want[0])
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(out[0, :-1], ids[0, 1:]).item()
            for out in (logits(ours, ids), theirs(ids).logits)
        ]
    perplexity, reference = (math.exp(loss) for loss in losses)
    print(f"perplexity {perplexity:.4f}, transformers {reference:.4f}, {ids.shape[1]} tokens")
    assert perplexity == pytest.approx(reference, rel=0.01)
    assert 5 < perplexity < 40  # English, not noise
