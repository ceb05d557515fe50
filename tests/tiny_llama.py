"""A tiny random language model and the same in transformers, for comparing how both decode."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.model.captioner import AuroraConfig, AuroraModel, Spliced
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig
from aurora.runtime import define_missing_torchvision_ops

VOCAB = 61
STOPS = [7, 19, 33, 46, 52]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@functools.cache
def model() -> AuroraModel:
    """Two layers with weights so large that choices are distinct and answers end now and then."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=64,
    )
    vision = VisionConfig(hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, image_size=28)
    made = AuroraModel(AuroraConfig(vision=vision, text=text, eos_token_id=-1))
    for weight in made.language_model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.35)
    return made.eval()


@functools.cache
def peer() -> Any:
    """transformers' Llama with the same weights."""
    define_missing_torchvision_ops()
    import transformers  # noqa: TID251

    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=model().config.text.norm_eps,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    made = transformers.LlamaForCausalLM(config)
    ours = model().language_model.state_dict()
    made.load_state_dict({key if "lm_head" in key else f"model.{key}": value for key, value in ours.items()})
    return made.eval()


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 14, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask with padding on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def splice(rows: Sequence[Sequence[int]]) -> Spliced:
    ids, mask = padded(rows)
    with torch.no_grad():
        return model().splice(ids, None, attention_mask=mask, padding_side="left")
