"""Broken checkpoint files, made by a seed: whole checkpoints as name -> bytes, and what to change in them."""

import io
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers

from aurora.model.captioner import AuroraConfig
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer
from tests.checkpoint import gguf_files as gguf
from tests.mixed_text import mixed_lines

Files = dict[str, bytes]
WEIGHTS, INDEX, CONFIG, GGUF = "model.safetensors", "model.safetensors.index.json", "config.json", "m.gguf"
TOKENIZER, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
DEEP = b'{"a":' * 100_000
LONG_NUMBER = b'{"hidden_size": 1' + b"0" * 5000 + b"}"


@dataclass(kw_only=True)
class Case:
    """One broken file."""

    name: str
    kind: str
    """What is loaded: model, xtuner, gguf, tokenizer, tokenizer_json or processor."""
    file: str
    content: bytes
    fields: tuple[str, ...] = ()
    """Words of which the message must hold one; empty where the damage has no name."""
    must_fail: bool = True
    """False where chance may have left a sound file."""
    sound: bool = False
    """Not broken at all, to find out a loader that refuses everything."""
    base: Files = field(default_factory=dict, repr=False)


def captioner(vocab_size: int) -> AuroraForConditionalGeneration:
    torch.manual_seed(0)
    vision = VisionConfig(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, patch_size=7, image_size=28)
    text = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2
    )
    return AuroraForConditionalGeneration(AuroraConfig(vision=vision, text=text))


def sentencepiece_model() -> bytes:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(mixed_lines(200, seed=3)),
        model_writer=content,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return content.getvalue()


def bpe_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(mixed_lines(200, seed=3), trainer)
    return tokenizer


def read_folder(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sound_checkpoints(folder: Path) -> dict[str, Files]:
    """One sound checkpoint of each kind; built in `folder`."""
    (folder / "aurora").mkdir(parents=True)
    (folder / "aurora" / TOKENIZER).write_bytes(sentencepiece_model())
    tokenizer = Tokenizer.from_pretrained(folder / "aurora")
    model = captioner(tokenizer.vocab_size)
    for layout in ("aurora", "xtuner"):
        model.save_pretrained(folder / layout, layout=layout)
    AuroraProcessor(AuroraImageProcessor(ImageConfig(image_size=28)), tokenizer).save_pretrained(folder / "aurora")
    aurora = read_folder(folder / "aurora")
    aurora["tokenizer_config.json"] = json.dumps({"eos_token": "</s>", "bos_token": "<s>"}).encode()
    bpe = bpe_tokenizer().to_str().encode()
    return {
        "model": aurora,
        "processor": aurora,
        "tokenizer": {name: aurora[name] for name in (TOKENIZER, "tokenizer_config.json")},
        "tokenizer_json": {TOKENIZER_JSON: bpe, "tokenizer_config.json": b'{"eos_token": "<|end|>"}'},
        "xtuner": read_folder(folder / "xtuner"),
        "gguf": {GGUF: gguf.gguf_bytes(gguf_metadata(), gguf.llama_tensors(gguf.tiny_llama()))},
    }


def gguf_metadata() -> dict[str, gguf.Value]:
    """A model and a byte-level tokenizer of 48 tokens."""
    tokens = ["<end>", *gguf.byte_alphabet()[97:123], *(chr(65 + i) for i in range(19)), "ab", "abc"]
    return {
        **gguf.llama_metadata(),
        "tokenizer.ggml.model": (gguf.STRING, "gpt2"),
        "tokenizer.ggml.pre": (gguf.STRING, "smollm"),
        "tokenizer.ggml.tokens": (gguf.ARRAY, gguf.STRING, tokens),
        "tokenizer.ggml.token_type": (gguf.ARRAY, 5, [3, *[1] * 47]),
        "tokenizer.ggml.merges": (gguf.ARRAY, gguf.STRING, ["a b", "ab c"]),
        "tokenizer.ggml.eos_token_id": (gguf.U32, 0),
    }


def all_cases(sound: dict[str, Files]) -> list[Case]:
    """Every case, the same for the same checkpoints."""
    rng = random.Random(0)
    found = [
        case
        for make in (cut_short, safetensors_headers, model_configs, gguf_values, gguf_tables, tokenizer_files, flipped)
        for case in make(sound, rng)
    ]
    for case in found:
        case.base = sound[case.kind]
    assert len({case.name for case in found}) == len(found)
    return found


def cut_short(sound: dict[str, Files], rng: random.Random) -> Iterator[Case]:
    """Files that end too early, are empty, or are something else."""
    for kind, file, count in (
        ("model", WEIGHTS, 30),
        ("model", CONFIG, 15),
        ("gguf", GGUF, 40),
        ("tokenizer_json", TOKENIZER_JSON, 20),
        ("xtuner", "visual_encoder/model.safetensors", 5),
        ("xtuner", "projector/config.json", 5),
        ("processor", "preprocessor_config.json", 5),
        ("processor", "processor_config.json", 5),
    ):
        content = sound[kind][file].rstrip(b"\n")
        for length in sorted(rng.sample(range(len(content)), count)):
            yield Case(name=f"{kind}: {file} cut to {length}", kind=kind, file=file, content=content[:length])
    other = {
        "empty": b"",
        "text": b"hello\n",
        "null": b"null",
        "list": b"[]",
        "zeros": bytes(4096),
        "zip": b"PK\x03\x04",
    }
    json_only = {"latin-1": b'{"a": "\xe9"}', "deep": DEEP, "long number": LONG_NUMBER}
    for kind, file in (
        ("model", WEIGHTS), ("model", CONFIG), ("gguf", GGUF), ("tokenizer", TOKENIZER),
        ("tokenizer_json", TOKENIZER_JSON), ("processor", "tokenizer_config.json"),
    ):  # fmt: skip
        more = json_only if file.endswith(".json") else {}
        for name, content in {**other, **more}.items():
            yield Case(name=f"{kind}: {file} is {name}", kind=kind, file=file, content=content)


def safetensors_headers(sound: dict[str, Files], rng: random.Random) -> Iterator[Case]:
    """Headers of safetensors files that say something impossible, or something else than the config."""
    content = sound["model"][WEIGHTS]
    size = struct.unpack("<Q", content[:8])[0]
    header: dict[str, Any] = json.loads(content[8 : 8 + size])

    def case(name: str, raw: bytes, *fields: str) -> Case:
        return Case(name=f"safetensors: {name}", kind="model", file=WEIGHTS, content=raw, fields=fields)

    def with_header(changed: Any) -> bytes:
        raw = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(raw)) + raw + content[8 + size :]

    for length in (0, 1, 7, size - 9, size + 1, len(content), 2**31, 2**63, 2**64 - 1):
        yield case(f"header of {length}", struct.pack("<Q", length) + content[8:])
    for name, raw in {"deep": DEEP, "list": b"[]", "number": b"7", "random": rng.randbytes(size)}.items():
        yield case(f"header is {name}", with_header(raw))
    keys = sorted(key for key in header if key != "__metadata__" and len(header[key]["shape"]) == 2)
    for key in rng.sample(keys, 6):
        entry = header[key]
        start, end = entry["data_offsets"]
        rows, columns = entry["shape"]
        yield case(f"{key} renamed", with_header({k.replace(key, "x" + key): v for k, v in header.items()}), key)
        yield case(f"{key} absent", with_header({k: v for k, v in header.items() if k != key}))
        for what, change, named in (
            ("of no dtype", {"dtype": "F33"}, False),
            ("of another width", {"dtype": "F64"}, False),
            ("of integers", {"dtype": "I32"}, True),
            ("flattened", {"shape": [rows * columns]}, True),
            ("of another shape", {"shape": [1, rows * columns]}, True),
            ("huge", {"shape": [2**62, 2**62]}, False),
            ("of a negative shape", {"shape": [-rows, -columns]}, False),
            ("beyond the end", {"data_offsets": [start, 2**60]}, False),
            ("backwards", {"data_offsets": [end, start]}, False),
            ("half a byte on", {"data_offsets": [start + 0.5, end]}, False),
        ):
            yield case(f"{key} {what}", with_header(header | {key: entry | change}), *([key] if named else []))


WRONG_FIELDS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("text_config", "max_position_embeddings"), "long"),
    (("text_config", "max_sequence_length"), "long"),
    (("text_config", "max_sequence_length"), -4),
    (("text_config", "hidden_act"), "relu"),
    (("text_config", "attention_bias"), True),
    (("text_config", "head_dim"), 9),
    (("text_config", "rope_scaling"), {"type": "yarn", "factor": 2}),
    (("text_config", "rope_scaling"), {"type": "linear", "factor": -1}),
    (("text_config", "rope_scaling"), {"type": "linear", "factor": "x"}),
    (("text_config", "rope_scaling"), {"type": ["linear"], "factor": 2}),
    (("text_config", "rope_scaling"), ["linear", 2]),
    (("text_config",), 3),
    (("vision_config",), "clip"),
    (("vision_config", "hidden_act"), ["gelu"]),
    (("projector_hidden_act",), "swish"),
    (("vision_feature_layer",), 99),
    (("vision_feature_layer",), "last"),
    (("vision_feature_select_strategy",), "all"),
    (("vision_feature_select_strategy",), 7),
    (("image_token_index",), "image"),
    (("eos_token_id",), "end"),
    (("eos_token_id",), [1, "end"]),
    (("bos_token_id",), {}),
    (("merge",), 5),
    (("merge", "token_kept_ratio"), 2),
    (("merge", "token_kept_ratio"), "half"),
    (("merge", "schedule"), "zigzag"),
    (("merge", "r"), 3),
    (("merge", "visual_token_budget"), "many"),
    (("merge", "unknown"), 1),
    (("architectures",), ["Other"]),
    (("architectures",), 7),
)


def _set(content: bytes, path: tuple[str, ...], value: Any) -> bytes:
    root = json.loads(content)
    inner = root
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = value
    return json.dumps(root).encode()


def model_configs(sound: dict[str, Files], rng: random.Random) -> Iterator[Case]:
    """Fields of config.json and of the index that cannot be."""
    sizes: list[tuple[str, ...]] = [
        ("text_config", name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ]
    sizes += [("vision_config", name) for name in ("hidden_size", "num_hidden_layers", "patch_size", "image_size")]
    sizes += [("text_config", "num_key_value_heads"), ("vision_config", "num_channels")]
    wrong: list[tuple[tuple[str, ...], Any]] = []
    for path in sizes:
        # A size that is possible in itself is found out by the tensors, so the message is about those.
        wrong += [(path, value) for value in (*rng.sample([-1, 0, "abc", [], {}, True, 0.5], 4), 2**40, 10**9)]
    for path in (("text_config", "rms_norm_eps"), ("vision_config", "layer_norm_eps"), ("text_config", "rope_theta")):
        wrong += [(path, value) for value in (-1, "abc", [1], True)]
    wrong += WRONG_FIELDS
    content = sound["model"][CONFIG]
    for path, value in wrong:
        big = isinstance(value, int) and not isinstance(value, bool) and value >= 10**9
        fields = () if big else (path[-1], path[-1].removeprefix("vision_").removesuffix("_config"))
        name = f"{'.'.join(path)}={json.dumps(value)}"
        yield Case(name=name, kind="model", file=CONFIG, content=_set(content, path, value), fields=fields)
    weights = json.loads(sound["model"][WEIGHTS][8:].partition(b"}}")[0] + b"}}")
    key = next(name for name in weights if name != "__metadata__")
    for name, value in {
        "absent": None, "text": "x", "empty": {}, "outside": {key: "../x.safetensors"},
        "missing": {key: "y.safetensors"},
        "pickle": {key: "pytorch_model.bin"}, "number": {key: 7}, "unknown key": {"nothing": WEIGHTS},
    }.items():  # fmt: skip
        raw = json.dumps({} if value is None else {"weight_map": value}).encode()
        yield Case(name=f"index: {name}", kind="model", file=INDEX, content=raw)


def gguf_values(sound: dict[str, Files], rng: random.Random) -> Iterator[Case]:
    """Metadata of GGUF files that cannot be."""
    metadata, tensors = gguf_metadata(), gguf.llama_tensors(gguf.tiny_llama())

    def case(key: str, what: str, changed: dict[str, gguf.Value], *more: str) -> Case:
        content = gguf.gguf_bytes(changed, tensors)
        return Case(name=f"gguf: {key} {what}", kind="gguf", file=GGUF, content=content, fields=(key, *more))

    optional = ("llama.vocab_size", "llama.rope.dimension_count", "llama.rope.freq_base", "tokenizer.ggml.pre")
    for key in metadata:
        value = metadata[key]
        if key not in (*optional, "tokenizer.ggml.token_type"):
            yield case(key, "absent", {k: v for k, v in metadata.items() if k != key}, "attn_k", "eos_token")
        yield case(key, "of another type", metadata | {key: (gguf.ARRAY, gguf.U32, [1, 2])}, "tokenizer.ggml")
        if value[0] == gguf.U32:
            for wrong in (2**32 - 1, 10**6):
                if key not in ("llama.context_length",):
                    yield case(key, f"is {wrong}", metadata | {key: (gguf.U32, wrong)}, "text.num_kv_heads", "head")
        if value[0] == gguf.F32:
            for number in (float("nan"), float("inf"), -1.0, 0.0):
                yield case(key, f"is {number}", metadata | {key: (gguf.F32, number)})
        if value[0] == gguf.STRING:
            yield case(key, "is unknown", metadata | {key: (gguf.STRING, "nothing")})
    content = sound["gguf"][GGUF]
    for place, name in ((8, "tensors"), (16, "values")):
        count = struct.unpack_from("<Q", content, place)[0]
        for wrong in (0, count - 1, count + 1, 2**20, 2**63, 2**64 - 1):
            raw = content[:place] + struct.pack("<Q", wrong) + content[place + 8 :]
            yield Case(name=f"gguf: {wrong} {name}", kind="gguf", file=GGUF, content=raw)


def gguf_tables(sound: dict[str, Files], rng: random.Random) -> Iterator[Case]:
    """Entries of the table of tensors that cannot be."""
    content = sound["gguf"][GGUF]
    names = [name for name, (_, shape, _) in gguf.llama_tensors(gguf.tiny_llama()).items() if len(shape) == 2]
    for name in (
        gguf.gguf_name(key) if "." in key and key in ("norm.weight",) else key for key in rng.sample(names, 5)
    ):
        place = content.index(gguf.text(name)) + 8 + len(name)
        for what, offset, form, values in (
            ("dimensions", 0, "<I", (0, 5, 2**32 - 1)),
            ("inner size", 4, "<Q", (0, 1, 2**63)),
            ("outer size", 12, "<Q", (0, 1, 2**63)),
            ("type", 20, "<I", (4, 15, 14, 2**31)),
            ("offset", 24, "<Q", (1, 2**63, 2**64 - 32)),
        ):
            for value in values:
                at = place + offset
                raw = content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]
                yield Case(name=f"gguf: {name} {what}={value}", kind="gguf", file=GGUF, content=raw)


WRONG_TOKENIZERS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("model",), None),
    (("model", "type"), "Nothing"),
    (("model", "vocab"), {"a": "b"}),
    (("model", "vocab"), 7),
    (("model", "merges"), [["zq", "qz"]]),
    (("model", "merges"), "ab"),
    (("added_tokens",), [{"id": "x"}]),
    (("added_tokens",), 3),
    (("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    (("pre_tokenizer",), {"type": "Nothing"}),
    (("decoder",), {"type": "Nothing"}),
    (("normalizer",), {"type": "Replace", "pattern": {"Regex": "["}, "content": ""}),
    (("version",), "9.9"),
)
WRONG_SPECIALS: tuple[tuple[str, Any], ...] = (
    ("eos_token", "<nothing>"),
    ("bos_token", 5),
    ("pad_token", {"text": "<s>", "content": "<nothing>"}),
    ("added_tokens_decoder", {"x": {"content": "<a>"}}),
    ("added_tokens_decoder", {"5000000000": {"content": "<a>"}}),
    ("added_tokens_decoder", {"900": 7}),
    ("added_tokens_decoder", [1]),
)
WRONG_PROCESSORS: tuple[tuple[str, str, Any], ...] = (
    ("preprocessor_config.json", "size", -1),
    ("preprocessor_config.json", "size", "large"),
    ("preprocessor_config.json", "size", {"shortest_edge": 1, "height": 2}),
    ("preprocessor_config.json", "size", {"shortest_edge": [1]}),
    ("preprocessor_config.json", "size", 10**9),
    ("preprocessor_config.json", "resample", 9),
    ("preprocessor_config.json", "do_resize", False),
    ("preprocessor_config.json", "rescale_factor", 2),
    ("preprocessor_config.json", "image_mean", [1]),
    ("preprocessor_config.json", "image_mean", "grey"),
    ("preprocessor_config.json", "image_std", [0, 0, 0]),
    ("preprocessor_config.json", "image_std", [1, 1, None]),
    ("preprocessor_config.json", "image_aspect_ratio", "stretch"),
    ("processor_config.json", "num_frames", "all"),
    ("processor_config.json", "num_frames", -1),
    ("processor_config.json", "num_frames", 0),
    ("processor_config.json", "frame_template", "nothing"),
    ("processor_config.json", "frame_template", 3),
    ("processor_config.json", "image_token_index", "x"),
)


def tokenizer_files(sound: dict[str, Files], rng: random.Random) -> Iterator[Case]:
    """Tokenizers and processors with fields that cannot be."""
    content = sound["tokenizer_json"][TOKENIZER_JSON]
    for path, value in WRONG_TOKENIZERS:
        raw = _set(content, path, value)
        name = f"tokenizer.json: {'.'.join(path)}={json.dumps(value)}"
        yield Case(name=name, kind="tokenizer_json", file=TOKENIZER_JSON, content=raw)
    for kind in ("tokenizer", "tokenizer_json"):
        for key, value in WRONG_SPECIALS:
            file = "tokenizer_config.json"
            raw = _set(sound[kind][file], (key,), value)
            name = f"{kind}: {key}={json.dumps(value)}"
            yield Case(name=name, kind=kind, file=file, content=raw, fields=(key,))
    for file, key, value in WRONG_PROCESSORS:
        raw = _set(sound["processor"][file], (key,), value)
        name = f"{file}: {key}={json.dumps(value)}"
        yield Case(name=name, kind="processor", file=file, content=raw, fields=(key, key.removeprefix("image_")))


def flipped(sound: dict[str, Files], rng: random.Random) -> Iterator[Case]:
    """Random bytes changed, or a tokenizer cut; some of these are sound by chance."""
    for kind, file, count, within in (
        ("gguf", GGUF, 60, 1400),
        ("model", WEIGHTS, 30, 3000),
        ("tokenizer", TOKENIZER, 60, 12000),
        ("tokenizer_json", TOKENIZER_JSON, 30, 8000),
    ):
        content = sound[kind][file]
        for number in range(count):
            raw = bytearray(content)
            for _ in range(rng.choice([1, 1, 4, 40])):
                raw[rng.randrange(min(len(raw), within))] = rng.randrange(256)
            name = f"{kind}: {file} flipped {number}"
            yield Case(name=name, kind=kind, file=file, content=bytes(raw), must_fail=False)
    content = sound["tokenizer"][TOKENIZER]
    for length in rng.sample(range(len(content)), 40):
        name = f"tokenizer: {TOKENIZER} cut to {length}"
        yield Case(name=name, kind="tokenizer", file=TOKENIZER, content=content[:length], must_fail=False)
