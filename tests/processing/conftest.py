import io
import json

import pytest
import sentencepiece

from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer

SENTENCES = [
    "USER: Describe the video in detail. ASSISTANT: A red ball moves left over grass at night.",
    "The camera pans right, slowly; a small blue cube stays still.",
    "What is the colour of the large cone? It is green.",
]


def train_sentencepiece() -> bytes:
    """A Llama-like vocabulary: BPE with byte fallback, <unk> 0, <s> 1, </s> 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<unk>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def processor(tokenizer):
    return AuroraProcessor(AuroraImageProcessor(ImageConfig(image_size=28)), tokenizer)
