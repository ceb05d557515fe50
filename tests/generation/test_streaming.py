"""Text while it is generated: whole characters, stop strings, threads that end."""

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

import aurora
from aurora.generation.sampling import SamplingConfig
from aurora.generation.streaming import (
    GenerationCancelled,
    StopStrings,
    TextCallback,
    TextStream,
    cut_at_stop,
    make_stopper,
)
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from aurora.processing.text import Tokenizer, parse_vocabulary
from tests.golden_models import captioner

BUNDLED = Path(aurora.__file__).parent / "assets" / "aurora-tiny"
LINES = ["the red fox jumps, the dog sleeps.\n\n", "日本語の文、三つ。", "naïve café — ½ 😀😀 end\n"]


def byte_level() -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return made_from(tokenizer)


def byte_fallback() -> Tokenizer:
    """Characters, and `<0xNN>` for what is no character of the vocabulary, as Llama's JSON files have it."""
    texts = ["<pad>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeforhtxjumpsnlg.,"]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    return made_from(tokenizer)


def made_from(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    backend = parse_vocabulary("tokenizer.json", tokenizer.to_str().encode(), source="test")
    return Tokenizer(backend, config={"eos_token": "</s>", "pad_token": "<pad>"})


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": lambda: Tokenizer.from_pretrained(BUNDLED),
    "byte level": byte_level,
    "byte fallback": byte_fallback,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def id_rows(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[list[int]]:
    """Real texts, random ids, and both mixed, with special tokens and broken characters in them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        random = torch.randint(0, tokenizer.vocab_size, (12,), generator=generator).tolist()
        real = tokenizer.encode(LINES[number % 3])
        at = int(torch.randint(0, len(real), (), generator=generator))
        rows.append([real, random, [*real[:at], *random, *real[at:]], [*random[:3], *real * 2]][number % 4])
    return rows


def strings_of(text: str, seed: int) -> list[str]:
    """One or two pieces of a text, of up to six characters, so that something is found."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(1 + seed % 2):
        start = int(torch.randint(0, len(text), (), generator=generator))
        found.append(text[start : start + 1 + int(torch.randint(0, 6, (), generator=generator))])
    return found


def test_a_stop_string_is_found_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    num_found = 0
    for seed, ids in enumerate(id_rows(tokenizer, 120)):
        strings = [text for text in strings_of(tokenizer.decode(ids), seed) if "\ufffd" not in text] or ["x"]
        stopper = StopStrings(tokenizer, strings)
        for length in range(1, len(ids) + 1):
            text = tokenizer.decode(ids[:length])
            want = any(string in text for string in strings)
            assert stopper([ids[:length], []]) == [want, False], (strings, ids[:length])
            if want:
                num_found += 1
                break
    assert num_found > 60


def test_only_the_end_of_a_row_is_decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = tokenizer.decode
    stopper = StopStrings(tokenizer, ["zq", "##"])
    monkeypatch.setattr(tokenizer, "decode", lambda ids: (sizes.append(len(ids)), real(ids))[1])
    ids = tokenizer.encode("the red fox jumps ") * 60
    assert stopper([ids]) == [False]
    assert sizes[0] < 10


def test_text_is_cut_before_the_first_stop_string() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one two", ["x"]) == "one two"
    assert cut_at_stop("one", []) == "one"
    assert cut_at_stop("abcd", ["bc", "abcd"]) == ""


def test_pieces_joined_are_the_text_up_to_the_stop_string(tokenizer: Tokenizer) -> None:
    for seed, ids in enumerate(id_rows(tokenizer, 120, seed=1)):
        for strings in ([], [text for text in strings_of(tokenizer.decode(ids), seed) if "\ufffd" not in text]):
            stopper = StopStrings(tokenizer, strings)
            end = next((n for n in range(1, len(ids)) if stopper([ids[:n]])[0]), len(ids))
            want = cut_at_stop(tokenizer.decode(ids[:end]), strings)
            pieces: list[str] = []
            streamer = TextCallback(tokenizer, lambda row, text, into=pieces: into.append(text), stop=strings)
            for token in [*ids[:end], *[tokenizer.pad_id] * 3]:
                streamer.put(torch.tensor([token]))
                assert want.startswith("".join(pieces))
            streamer.end()
            assert "".join(pieces) == want, (strings, ids)
            assert all(pieces)


def test_blanks_are_kept(tokenizer: Tokenizer) -> None:
    letter = tokenizer.encode("e")
    # In sentencepiece a blank is a token, and a byte is another.
    blanks = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([*letter, token]) == "e "]
    assert blanks
    for blank in blanks:
        ids = [*letter, *[blank] * 9, *letter]
        assert tokenizer.decode(ids).endswith("   e")
        assert StopStrings(tokenizer, ["  e"])([ids]) == [True]
        pieces: list[str] = []
        streamer = TextCallback(tokenizer, lambda row, text, into=pieces: into.append(text))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(pieces) == tokenizer.decode(ids)


def test_special_tokens_within_a_stop_string_do_not_hide_it(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("the fo"), *[tokenizer.pad_id] * 20, *tokenizer.encode("x")]
    stop = tokenizer.decode(ids)[-3:]
    assert "x" in stop
    assert StopStrings(tokenizer, [stop])([ids]) == [True]


def test_what_cannot_begin_a_stop_string_is_not_held_back() -> None:
    tokenizer = byte_level()
    pieces: list[str] = []
    streamer = TextCallback(tokenizer, lambda row, text: pieces.append(text), stop="\n\nX")
    seen = []
    for text in ["a", "\n", "b", "\n", "\n", "\n", "c", "\n", "\n", "X", "d"]:
        streamer.put(torch.tensor(tokenizer.encode(text)))
        seen.append("".join(pieces))
    #       a    \n   b       \n      \n      \n       c            then nothing more: the string is there
    want = ["a", "a", "a\nb", "a\nb", "a\nb", "a\nb\n", "a\nb\n\n\nc"]
    assert seen == want + [want[-1]] * 4
    streamer.end()
    assert "".join(pieces) == want[-1]


def test_rows_stream_apart_and_a_callback_serves_again() -> None:
    tokenizer = byte_level()
    given: list[tuple[int, str]] = []
    streamer = TextCallback(tokenizer, lambda row, text: given.append((row, text)))
    for _ in range(2):
        given.clear()
        first, second = tokenizer.encode("日 one"), tokenizer.encode("two")
        pad = [tokenizer.pad_id] * (len(first) - len(second))
        for column in zip(first, second + pad, strict=True):
            streamer.put(torch.tensor(column))
        streamer.end()
        assert "".join(text for row, text in given if row == 0) == "日 one"
        assert "".join(text for row, text in given if row == 1) == "two"
    streamer.put(torch.tensor([5]))  # one row now
    streamer.end()


class Talker:
    """A `generate` that says one thing for as long as it is let."""

    def __init__(self, tokenizer: Tokenizer, *, rows: int = 1, limit: int = 100_000, error: bool = False) -> None:
        self.ids = torch.tensor(tokenizer.encode("x") * rows)
        self.limit, self.error = limit, error
        self.steps = 0
        self.ended = 0

    def __call__(self, *, streamer: Any, **options: Any) -> dict[str, Any]:
        try:
            for _ in range(self.limit):
                streamer.put(self.ids)
                self.steps += 1
                time.sleep(1e-3)
            if self.error:
                raise ValueError("out of words")
            return options
        finally:
            self.ended += 1
            streamer.end()


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "aurora-generate"]


@pytest.fixture
def words() -> Tokenizer:
    return byte_level()


def test_a_stream_gives_the_text_and_the_result(words: Tokenizer) -> None:
    talker = Talker(words, limit=5)
    stream = TextStream(words).start(talker, max_new_tokens=7)
    assert list(stream) == ["x"] * 5
    assert stream.result == {"max_new_tokens": 7}
    assert not running()
    with pytest.raises(ValueError, match="was started before"):
        stream.start(talker)
    silent = TextStream(words, stop=["x"]).start(Talker(words, limit=3))
    assert list(silent) == []
    assert silent.result == {"stop": ["x"], "tokenizer": words}
    with pytest.raises(ValueError, match=r"want stop strings in TextStream\(\.\.\., stop=\)"):
        TextStream(words).start(talker, stop=["x"])
    with pytest.raises(ValueError, match="nothing was started"):
        _ = TextStream(words).result


def test_leaving_the_loop_ends_the_generation(words: Tokenizer) -> None:
    talker = Talker(words)
    stream = TextStream(words).start(talker)
    for number, _ in enumerate(stream):
        if number == 2:
            break
    gc.collect()
    assert not running()
    assert talker.steps < 1000
    assert talker.ended == 1
    assert stream.result is None


def test_leaving_the_block_ends_the_generation_also_before_any_text_was_read(words: Tokenizer) -> None:
    talker = Talker(words)
    with TextStream(words).start(talker):
        assert running()
    assert not running()
    assert talker.ended == 1


def test_an_interrupt_where_text_is_read_ends_the_generation(words: Tokenizer) -> None:
    talker = Talker(words)
    with pytest.raises(KeyboardInterrupt), TextStream(words).start(talker) as stream:  # noqa: PT012
        for _ in stream:
            raise KeyboardInterrupt
    assert not running()
    assert talker.steps < 1000


def test_an_error_of_the_generation_reaches_the_reader_behind_the_text(words: Tokenizer) -> None:
    stream = TextStream(words).start(Talker(words, limit=3, error=True))
    heard: list[str] = []
    with pytest.raises(ValueError, match="out of words"):
        heard.extend(stream)
    assert heard == ["x"] * 3
    with pytest.raises(ValueError, match="out of words"):
        _ = stream.result
    assert not running()


def test_several_rows_come_with_their_numbers(words: Tokenizer) -> None:
    rows = list(TextStream(words).start(Talker(words, rows=2, limit=3)).by_row())
    assert rows == [(0, "x"), (1, "x")] * 3
    with pytest.raises(ValueError, match=r"several rows, want `for row, text in stream\.by_row\(\)`"):
        list(TextStream(words).start(Talker(words, rows=2)))
    gc.collect()
    assert not running()


def test_a_stream_serves_a_generation_in_a_thread_of_the_callers(words: Tokenizer) -> None:
    stream = TextStream(words)
    thread = threading.Thread(target=lambda: Talker(words, limit=4)(streamer=stream))
    thread.start()
    assert "".join(stream) == "xxxx"
    thread.join()
    with pytest.raises(GenerationCancelled):
        stream.put(torch.tensor([5]))


@pytest.fixture(scope="module")
def model() -> AuroraForConditionalGeneration:
    """Random weights over the 256 byte tokens of the bundled tokenizer, and text in consequence."""
    made = AuroraForConditionalGeneration(captioner("kv2"))
    made.config.eos_token_id = -1
    return made


def prompt(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 256, (rows, 6), generator=torch.Generator().manual_seed(8))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_row_ends_with_the_token_that_completes_a_stop_string(
    model: AuroraForConditionalGeneration, num_beams: int
) -> None:
    tokenizer = Tokenizer.from_pretrained(BUNDLED)
    settings: dict[str, Any] = {"max_new_tokens": 40, "num_beams": num_beams, "return_dict": True}
    if num_beams > 1:
        settings["length_penalty"] = -5.0  # what ends early wins
    free = model.generate(**prompt(), **settings)
    assert isinstance(free, GenerateOutput)
    texts = [tokenizer.decode(row) for row in free.sequences]
    single = next(text for text in texts[0][3:] if text != "\ufffd" and text not in texts[1])
    made = model.generate(**prompt(), **settings, stop=[single, "no such text"], tokenizer=tokenizer)
    assert isinstance(made, GenerateOutput)
    assert made.stopped_by[0] == "stop"
    kept = made.sequences[0, : made.num_generated[0]].tolist()
    assert single in tokenizer.decode(kept)
    assert single not in tokenizer.decode(kept[:-1])
    assert not made.sequences[0, len(kept) :].any()
    if num_beams == 1:
        assert kept == free.sequences[0, : len(kept)].tolist()
        assert cut_at_stop(tokenizer.decode(kept), [single]) == cut_at_stop(texts[0], [single])
        assert made.stopped_by[1] == "length"
        assert made.sequences[1].tolist() == free.sequences[1].tolist()


def test_a_real_generation_streams_its_text(model: AuroraForConditionalGeneration) -> None:
    tokenizer = Tokenizer.from_pretrained(BUNDLED)
    ids = model.generate(**prompt(), max_new_tokens=30)
    assert isinstance(ids, Tensor)
    texts = [tokenizer.decode(row) for row in ids]
    stream = TextStream(tokenizer).start(model.generate, **prompt(), max_new_tokens=30)
    rows = ["", ""]
    for row, text in stream.by_row():
        rows[row] += text
    assert rows == texts
    assert torch.equal(stream.result, ids)
    stop = next(text for text in texts[0][5:] if text != "\ufffd")
    one = {key: value[:1] for key, value in prompt().items()}
    cut = TextStream(tokenizer, stop=stop).start(model.generate, **one, max_new_tokens=30)
    assert "".join(cut) == cut_at_stop(texts[0], [stop])
    assert cut.result.shape[1] < 30


def test_stop_strings_need_a_tokenizer(model: AuroraForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match=r"stop=\['a'\]: want tokenizer= as well, the processor or its tokenizer"):
        model.generate(**prompt(), stop=["a"])
    assert make_stopper(SamplingConfig(), None) is None
    found = make_stopper(SamplingConfig(stop="a"), Tokenizer.from_pretrained(BUNDLED))
    assert found is not None
    assert found.strings == ("a",)
    with pytest.raises(ValueError, match=r"stop=\['a', ''\]: want texts that are not empty"):
        StopStrings(Tokenizer.from_pretrained(BUNDLED), ["a", ""])
