"""The sentencepiece tokenizer of aurora-tiny, trained on TinyWorld's text."""

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from aurora.data.tinyworld.language import text_corpus
from aurora.training.config import TokenizerConfig

_CHAT_LINE = "USER: ASSISTANT: " + " ".join(str(number) for number in range(1, 33))
"""The prompt's own words and the frame numbers; repeated, so that each becomes one piece."""


def train_tokenizer(path: Path, config: TokenizerConfig, *, seed: int) -> None:
    """Train a byte-pair tokenizer with byte fallback and write it to `path`; the same bytes for the same arguments.

    Ids are Llama's: 0 unknown, 1 begin, 2 end. A newline is a piece of its own, and runs of spaces count as one, so
    that the " 2 " between two frames is the single piece of the number.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(config.num_scenes, seed),
        model_writer=model,
        model_type="bpe",
        vocab_size=config.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=True,
        user_defined_symbols=["\n"],
        character_coverage=1.0,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".writing-{path.name}")
    writing.write_bytes(model.getvalue())
    writing.replace(path)


def _lines(num_scenes: int, seed: int) -> Iterator[str]:
    for index, line in enumerate(text_corpus(num_scenes, seed)):
        yield line
        if index % 20 == 0:
            yield _CHAT_LINE
