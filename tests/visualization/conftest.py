"""A checkpoint with random weights: small, complete, and of no use but for testing."""

import io
from pathlib import Path

import pytest
import sentencepiece
import torch

from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint with 64 px frames of 8 x 8 patches, five layers of which four run."""
    folder = tmp_path_factory.mktemp("tiny")
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: 1 2 3 4 5 6 7 8 describe the video in detail. ASSISTANT:"] * 20),
        model_writer=writer,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(writer.getvalue())
    torch.manual_seed(0)
    vision = VisionConfig(hidden_size=32, intermediate_size=64, num_layers=5, num_heads=2, patch_size=8, image_size=64)
    text = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        max_seq_len=2048,
    )
    model = AuroraModel(AuroraConfig(vision=vision, text=text))
    torch.nn.init.normal_(model.vision_tower.pos_embed, std=0.1)
    AuroraForConditionalGeneration(model).save_pretrained(folder)
    processor = AuroraProcessor(
        AuroraImageProcessor(ImageConfig(image_size=64)),
        Tokenizer.from_pretrained(folder),
        frame_template="{index} <image>",
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_model() -> AuroraModel:
    """Random weights, 64 px frames of 8 x 8 patches, five layers of which four run."""
    torch.manual_seed(0)
    vision = VisionConfig(hidden_size=32, intermediate_size=64, num_layers=5, num_heads=2, patch_size=8, image_size=64)
    text = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2)
    model = AuroraModel(AuroraConfig(vision=vision, text=text)).eval()
    torch.nn.init.normal_(model.vision_tower.pos_embed, std=0.1)
    return model
