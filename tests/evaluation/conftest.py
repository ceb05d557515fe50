"""A checkpoint with random weights: what it says is nonsense, but it says it about real files."""

import io
from pathlib import Path

import pytest
import sentencepiece
import torch

from aurora.data.tinyworld.language import text_corpus
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint for 48 px frames of 6 x 6 patches, five layers of which four run."""
    folder = tmp_path_factory.mktemp("random")
    writer = io.BytesIO()
    lines = [line for part in text_corpus(30, 0) for line in ([part] if isinstance(part, str) else part)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=writer, model_type="bpe", vocab_size=480, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(writer.getvalue())
    tokenizer = Tokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    vision = VisionConfig(hidden_size=32, intermediate_size=64, num_layers=5, num_heads=2, patch_size=8, image_size=48)
    text = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=4,
        num_kv_heads=2, max_seq_len=512,
    )  # fmt: skip
    model = AuroraModel(AuroraConfig(vision=vision, text=text))
    for parameter in model.parameters():  # far enough from zero that clips and questions get different answers
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    AuroraForConditionalGeneration(model).save_pretrained(folder)
    AuroraProcessor(
        AuroraImageProcessor(ImageConfig(image_size=48)), tokenizer, frame_template="{index} <image>"
    ).save_pretrained(folder)
    return folder
