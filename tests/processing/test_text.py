import json
import random
import re

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, normalizers

from aurora.processing.text import Tokenizer

TEXTS = [
    "A red ball.",
    " ",
    "\n",
    "",
    "  two  spaces ",
    "你好, 世界",
    "a\x00b",
    "🎈é",
    "\nDescribe the video. ASSISTANT:",
    "\ufffd",
]


@pytest.fixture(scope="session")
def json_folder(tmp_path_factory):
    """A Llama-like tokenizer.json: Metaspace BPE with byte fallback."""
    folder = tmp_path_factory.mktemp("json")
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*specials, *(f"<0x{i:02X}>" for i in range(256))])}
    for token in ["▁", *"abcdefghilmnorstuvwA.,:", "▁a", "ed", "▁r", "▁red", "al", "all", "▁b", "▁ball"]:
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("e", "d"), ("▁", "r"), ("▁r", "ed"), ("a", "l"), ("al", "l"), ("▁", "b"), ("▁b", "all")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.fixture(params=["sentencepiece", "json"])
def either(request, tokenizer, json_folder):
    return tokenizer if request.param == "sentencepiece" else Tokenizer.from_pretrained(json_folder)


def test_plain_text_is_what_sentencepiece_says(tokenizer, tokenizer_folder):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer.encode(text) == model.encode(text)
        assert tokenizer.encode(text, add_bos=True) == [1, *model.encode(text)]


def test_a_piece_of_one_space_keeps_both_spaces(tokenizer, tokenizer_folder):
    # Llama's tokenizer puts a space in front of every piece: the " " between two frames is not empty.
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    assert "".join(model.id_to_piece(i) for i in tokenizer.encode(" ")) == "▁▁"


def test_special_ids(either):
    assert (either.bos_id, either.eos_id) == (1, 2)
    assert either.pad_id == (0 if either.unk_id == 0 else 2)
    assert either.special_text(either.eos_id) == "</s>"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(either, text):
    assert either.decode(either.encode(text)) == text
    assert either.decode(torch.tensor(either.encode(text, add_bos=True))) == text


def test_special_tokens_in_text_become_ids(either):
    ids = either.encode("A red ball.</s>\n<s>all")
    assert ids == [*either.encode("A red ball."), 2, *either.encode("\n"), 1, *either.encode("all")]
    assert either.decode(ids, skip_special_tokens=False) == "A red ball.</s>\n<s>all"


def test_placeholders_are_left_out(either):
    assert either.decode([1, -200, *either.encode("a red"), 2, 2]) == "a red"


@pytest.mark.parametrize(("ids", "message"), [([10**6], "id 1000000, want 0 to"), ([-1], "id -1, want 0 to")])
def test_ids_outside_the_vocabulary(either, ids, message):
    with pytest.raises(ValueError, match=message):
        either.decode(ids, skip_special_tokens=False)


def test_half_a_surrogate_pair_is_refused(either):
    with pytest.raises(ValueError, match="character 1 is half a surrogate pair"):
        either.encode("a\ud800")


def stream(tokenizer, ids):
    decoder = tokenizer.stream()
    return [*(decoder.put(i) for i in ids), decoder.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(either, text):
    pieces = stream(either, either.encode(text, add_bos=True))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_stream_gives_whole_characters_as_they_complete(tokenizer):
    ids = tokenizer.encode("你好")
    pieces = stream(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["你", "好"]
    assert pieces[-1] == ""


def test_stream_gives_words_at_once(either):
    ids = either.encode("a red ball")
    decoder = either.stream()
    so_far = ""
    for position, token_id in enumerate(ids):
        so_far += decoder.put(token_id)
        assert so_far == either.decode(ids[: position + 1])


@pytest.mark.parametrize("seed", range(20))
def test_stream_of_arbitrary_ids_equals_decode(either, seed):
    # Arbitrary ids hold broken UTF-8, special tokens and runs of spaces, as an untrained model writes them.
    rng = random.Random(seed)
    spaces = either.encode("  ")
    for _ in range(20):
        ids = [
            rng.choice([rng.randrange(either.vocab_size), rng.randrange(3, 259), rng.choice(spaces), rng.randrange(3)])
            for _ in range(rng.randrange(1, 30))
        ]
        pieces = stream(either, ids)
        assert "".join(pieces) == either.decode(ids)


def test_save_and_load(either, tmp_path):
    either.save_pretrained(tmp_path / "new")
    loaded = Tokenizer.from_pretrained(tmp_path / "new")
    assert loaded.encode("A red ball.</s>", add_bos=True) == either.encode("A red ball.</s>", add_bos=True)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (either.bos_id, either.eos_id, either.pad_id)


def test_sentencepiece_alone_has_its_own_special_tokens(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, 0, 0)


def test_added_tokens(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    size = Tokenizer.from_pretrained(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mark>": size}))
    config = {"pad_token": "<pad>", "added_tokens_decoder": {str(size + 1): {"content": "<pad>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_id == size + 1
    assert tokenizer.vocab_size == size + 2
    ids = tokenizer.encode("a<mark>b")
    assert ids[1:-1] == [size] or size in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<mark>b"


def test_sentencepiece_goes_first(tokenizer_folder, json_folder, tmp_path):
    for folder, name in ((tokenizer_folder, "tokenizer.model"), (json_folder, "tokenizer.json")):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == Tokenizer.from_pretrained(tokenizer_folder).vocab_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"garbage", "not a readable tokenizer"),
        ("tokenizer.model", b"", "not a readable tokenizer (the file is empty)"),
        ("tokenizer.json", b"{}", "not a readable tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not a readable tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "no end-of-sequence token"),
        ("tokenizer_config.json", b"[1]", "want an object"),
        ("tokenizer_config.json", b"{", "not readable as JSON"),
        ("tokenizer_config.json", b'{"eos_token": "<end>"}', "eos_token='<end>': no such token"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "eos_token=7: no such token"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {"content": "<a>"}}}',
            "want an id with its content",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "want an id with its content"),
        ("added_tokens.json", b'{"<a>": "x"}', "want an id"),
    ],
)
def test_hostile_files_are_named(tokenizer_folder, tmp_path, name, content, message):
    if name != "tokenizer.json":
        (tmp_path / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer; want tokenizer.model or tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
