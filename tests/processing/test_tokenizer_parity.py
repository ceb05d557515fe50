"""Tokenizers against the libraries and files they come from, on 1,000 lines of mixed text."""

import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from aurora.processing.gguf_tokenizer import load_gguf_tokenizer
from aurora.processing.text import Tokenizer
from aurora.runtime import define_missing_torchvision_ops
from tests.checkpoint import gguf_files as files
from tests.mixed_text import mixed_lines
from tests.smollm2 import needs_smollm2, smollm2_file

LINES = mixed_lines(1000, seed=0)
SPECIALS = ["<|end|>", "<|start|>", "<|pad|>"]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(scope="module")
def spm() -> bytes:
    """A byte-pair sentencepiece model with byte fallback, as Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(mixed_lines(400, seed=1)),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<think>"],
        pad_id=3,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that cuts numbers into digits, as SmolLM2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(mixed_lines(400, seed=1), trainer)
    return tokenizer


def spm_metadata(content: bytes, *, prefix: bool = True) -> dict[str, files.Value]:
    model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
    size = range(model.vocab_size())
    types = [
        2
        if model.is_unknown(i)
        else 3
        if model.is_control(i)
        else 6
        if model.is_byte(i)
        else 5
        if model.is_unused(i)
        else 1
        for i in size
    ]
    types[model.piece_to_id("<think>")] = 4
    return {
        "tokenizer.ggml.model": (files.STRING, "llama"),
        "tokenizer.ggml.tokens": (files.ARRAY, files.STRING, [model.id_to_piece(i) for i in size]),
        "tokenizer.ggml.scores": (files.ARRAY, files.F32, [model.get_score(i) for i in size]),
        "tokenizer.ggml.token_type": (files.ARRAY, 5, types),
        "tokenizer.ggml.unknown_token_id": (files.U32, 0),
        "tokenizer.ggml.bos_token_id": (files.U32, 1),
        "tokenizer.ggml.eos_token_id": (files.U32, 2),
        "tokenizer.ggml.padding_token_id": (files.U32, 3),
        "tokenizer.ggml.add_space_prefix": (files.BOOL, prefix),
    }


def bpe_metadata(tokenizer: tokenizers.Tokenizer) -> dict[str, files.Value]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": (files.STRING, "gpt2"),
        "tokenizer.ggml.pre": (files.STRING, "smollm"),
        "tokenizer.ggml.tokens": (files.ARRAY, files.STRING, tokens),
        "tokenizer.ggml.token_type": (files.ARRAY, 5, [3 if token in SPECIALS else 1 for token in tokens]),
        "tokenizer.ggml.merges": (files.ARRAY, files.STRING, [" ".join(pair) for pair in model["merges"]]),
        "tokenizer.ggml.bos_token_id": (files.U32, tokens.index("<|start|>")),
        "tokenizer.ggml.eos_token_id": (files.U32, tokens.index("<|end|>")),
        "tokenizer.ggml.padding_token_id": (files.U32, tokens.index("<|pad|>")),
        "tokenizer.ggml.add_bos_token": (files.BOOL, False),
    }


def write(path: Path, metadata: dict[str, files.Value]) -> Path:
    path.write_bytes(files.gguf_bytes(metadata, {}))
    return path


def test_the_lines_are_mixed() -> None:
    text = "".join(LINES)
    assert len(text) > 50_000
    for pattern in ("[一-鿿]", "🎉", "\t", " {4}", "\n\n", "doesn't", "def f", r"\d{3}", "مرحبا"):
        assert len(re.findall(pattern, text)) > 50, pattern
    assert mixed_lines(5, seed=0) == LINES[:5]
    assert mixed_lines(5, seed=1) != LINES[:5]


def test_a_sentencepiece_vocabulary_comes_back_out_of_gguf(spm: bytes, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.model").write_bytes(spm)
    plain = Tokenizer.from_pretrained(tmp_path / "hf")
    ours = load_gguf_tokenizer(write(tmp_path / "m.gguf", spm_metadata(spm)))
    library: Any = sentencepiece.SentencePieceProcessor(model_proto=spm)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 2, 3, 0)
    assert ours.vocab_size == plain.vocab_size == library.vocab_size()
    for line in LINES:
        ids = ours.encode(line)
        assert ids == library.encode(line) == plain.encode(line), line
        assert ours.decode(ids) == library.decode(ids) == plain.decode(ids)
    assert ours.encode("a <think> b</s>", add_bos=True) == plain.encode("a <think> b</s>", add_bos=True)
    no_prefix = load_gguf_tokenizer(write(tmp_path / "n.gguf", spm_metadata(spm, prefix=False)))
    assert no_prefix.encode(" the") == ours.encode("the")
    assert no_prefix.encode("the") != ours.encode("the")


def test_a_byte_level_vocabulary_comes_back_out_of_gguf(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    ours = load_gguf_tokenizer(write(tmp_path / "m.gguf", bpe_metadata(bpe)))
    for line in LINES:
        ids = bpe.encode(line).ids
        assert ours.encode(line) == ids, line
        assert ours.decode(ids) == line
    assert ours.encode("<|start|>a<|end|>") == bpe.encode("<|start|>a<|end|>").ids
    assert ours.bos_id is None  # the file says that none is put in front
    assert ours.special_text(ours.eos_id) == "<|end|>"
    assert ours.special_text(ours.pad_id) == "<|pad|>"


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_streamed_text_is_the_decoded_text(kind: str, spm: bytes, bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    metadata = spm_metadata(spm) if kind == "spm" else bpe_metadata(bpe)
    ours = Tokenizer.from_pretrained(write(tmp_path / "m.gguf", metadata))
    for line in LINES[:200]:
        ids = ours.encode(line)
        stream = ours.stream()
        pieces = [stream.put(token_id) for token_id in ids]
        assert not any("\ufffd" in piece for piece in pieces), line
        assert "".join([*pieces, stream.end()]) == ours.decode(ids)


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_a_gguf_tokenizer_saves_as_checkpoint_files(
    kind: str, spm: bytes, bpe: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    metadata = spm_metadata(spm) if kind == "spm" else bpe_metadata(bpe)
    ours = load_gguf_tokenizer(write(tmp_path / "m.gguf", metadata))
    ours.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert [again.encode(line) for line in LINES[:100]] == [ours.encode(line) for line in LINES[:100]]
    assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": (files.STRING, "bert")}, "tokenizer.ggml.model='bert': want llama or gpt2"),
        ({"tokenizer.ggml.pre": (files.STRING, "tekken")}, "tokenizer.ggml.pre='tekken': want one of"),
        ({"tokenizer.ggml.tokens": (files.U32, 3)}, "tokenizer.ggml.tokens: got int, want a list of texts"),
        ({"tokenizer.ggml.tokens": (files.ARRAY, files.STRING, ["a", "a"])}, "got 700 values, want 2 numbers"),
        ({"tokenizer.ggml.eos_token_id": (files.U32, 900)}, "tokenizer.ggml.eos_token_id=900: want at most 699"),
        (
            {"tokenizer.ggml.merges": (files.ARRAY, files.STRING, ["t h e"])},
            "tokenizer.ggml.merges[0]='t h e': want two",
        ),
        (
            {"tokenizer.ggml.merges": (files.ARRAY, files.STRING, ["日 本"])},
            "tokenizer.ggml.merges[0]='日 本': want two",
        ),
    ],
)
def test_unusable_gguf_tokenizers_are_refused(
    bpe: tokenizers.Tokenizer, tmp_path: Path, change: dict[str, files.Value], message: str
) -> None:
    path = write(tmp_path / "m.gguf", bpe_metadata(bpe) | change)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_gguf_tokenizer(path)
    assert str(error.value).startswith(str(path))


def test_a_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"m\.gguf: tokenizer\.ggml\.model: not in the metadata"):
        load_gguf_tokenizer(write(tmp_path / "m.gguf", {}))


@needs_transformers
def test_tokenizer_json_agrees_with_transformers(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    define_missing_torchvision_ops()
    from transformers import PreTrainedTokenizerFast  # noqa: TID251

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    theirs.add_tokens(["<obj>"])
    theirs.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    lines = [*LINES, "<|start|>a <obj>b<extra> c<|end|>", "<obj><obj>", " <extra> "]
    for line in lines:
        ids = theirs.encode(line, add_special_tokens=False)
        assert ours.encode(line) == ids, line
        for skip in (True, False):
            want = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == want
    assert ours.vocab_size == len(theirs)


@needs_transformers
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_a_sentencepiece_vocabulary_in_gguf_agrees_with_transformers(spm: bytes, tmp_path: Path) -> None:
    define_missing_torchvision_ops()
    from transformers import AutoTokenizer  # noqa: TID251

    path = write(tmp_path / "m.gguf", files.llama_metadata() | spm_metadata(spm))
    ours = load_gguf_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    # At a leading space sentencepiece, which is ours, adds its own space as well; transformers' Metaspace does not.
    lines = [line for line in LINES if not line.startswith(" ")]
    assert len(lines) > 950
    for line in lines:
        assert ours.encode(line) == theirs.encode(line, add_special_tokens=False), line


@pytest.mark.slow
@needs_smollm2
def test_the_tokenizer_of_smollm2_agrees_with_transformers() -> None:
    define_missing_torchvision_ops()
    from transformers import AutoTokenizer  # noqa: TID251

    file = smollm2_file()
    ours = load_gguf_tokenizer(file)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)

    def ids(line: str) -> list[int]:
        return theirs.encode(line, add_special_tokens=False)

    # transformers' GGUF reader passes over `tokenizer.ggml.pre=smollm`, so it does not cut numbers into digits before
    # words: without numerals both agree as they are, with numerals once its words are cut as the model's were.
    for line in LINES:
        plain = "".join(character for character in line if not character.isnumeric())
        assert ours.encode(plain) == ids(plain), plain
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for line in [*LINES, "<|im_start|>user\nHi 12<|im_end|>\n", "<|endoftext|>"]:
        assert ours.encode(line) == ids(line), line
        assert ours.decode(ids(line), skip_special_tokens=False) == line
    assert ours.vocab_size == len(theirs) == 49152
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 2, 2)
