"""A writer of small GGUF files, the tests' own, so that readers are not checked against themselves."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aurora.model.llama import Llama, LlamaConfig

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

TINY = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64
)
"""Grouped-query attention, head width 8."""

Value = tuple[int, Any] | tuple[int, int, Any]
"""(type, value), or (ARRAY, type of the items, values)."""


def text(value: str) -> bytes:
    """Length and UTF-8."""
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


def value_bytes(value: Value) -> bytes:
    """Type and value."""
    kind, *rest = value
    if kind == ARRAY:
        item, items = rest
        packed = [text(i) if item == STRING else struct.pack("<" + _LETTERS[item], i) for i in items]
        return struct.pack("<IIQ", ARRAY, item, len(items)) + b"".join(packed)
    return struct.pack("<I", kind) + (text(rest[0]) if kind == STRING else struct.pack("<" + _LETTERS[kind], rest[0]))


def gguf_bytes(
    metadata: Mapping[str, Value], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], *, alignment: int = 32
) -> bytes:
    """Content of a file; a tensor is (type, shape with the outermost dimension first, data)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value_bytes(value) for key, value in metadata.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += content
    return head + bytes(-len(head) % alignment) + data


def llama_metadata(config: LlamaConfig = TINY) -> dict[str, Value]:
    """Metadata as llama.cpp's converter writes it."""
    return {
        "general.architecture": (STRING, "llama"),
        "llama.block_count": (U32, config.num_layers),
        "llama.context_length": (U32, config.max_seq_len),
        "llama.embedding_length": (U32, config.hidden_size),
        "llama.feed_forward_length": (U32, config.intermediate_size),
        "llama.attention.head_count": (U32, config.num_heads),
        "llama.attention.head_count_kv": (U32, config.num_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": (F32, config.norm_eps),
        "llama.rope.freq_base": (F32, config.rope_theta),
        "llama.rope.dimension_count": (U32, config.head_dim),
        "llama.vocab_size": (U32, config.vocab_size),
    }


def llama_tensors(model: Llama) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """A model's weights as float32, under llama.cpp's names, query and key rows in llama.cpp's order."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave(tensor, model.config.head_dim)
        tensors[gguf_name(name)] = (0, tuple(tensor.shape), tensor.numpy().astype("<f4").tobytes())
    return tensors


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of our tensors (the tests' own table)."""
    parts = name.split(".")
    if parts[0] != "layers":
        return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[0]] + ".weight"
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    return f"blk.{parts[1]}.{inner[parts[-2]]}.weight"


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Row by row: channel i of the first half of a head goes to row 2 i, of the second half to 2 i + 1."""
    out = torch.empty_like(weight)
    half = head_dim // 2
    for row in range(len(weight)):
        head, channel = divmod(row, head_dim)
        out[head * head_dim + (2 * channel if channel < half else 2 * (channel - half) + 1)] = weight[row]
    return out


def tiny_llama(seed: int = 0, **changes: Any) -> Llama:
    """A small model with random weights, norms included."""
    fields = {name: getattr(TINY, name) for name in TINY.__slots__} | changes
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**fields)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def byte_alphabet() -> list[str]:
    """The 256 characters in which byte-level BPE writes bytes, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_gguf(path: Path, model: Llama, extra: Mapping[str, Value] | None = None) -> Path:
    """Write a model, with more metadata where given."""
    path.write_bytes(gguf_bytes({**llama_metadata(model.config), **(extra or {})}, llama_tensors(model)))
    return path


def random_blocks(num_blocks: int, num_bytes: int, halves: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Random blocks (num_blocks, num_bytes) whose half-precision numbers, at the given byte positions, are finite."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_blocks, num_bytes), dtype=np.uint8)
    for start in halves:
        steps = rng.normal(0, 0.02, (num_blocks, 1)).astype("<f2")
        blocks[:, start : start + 2] = steps.view(np.uint8)
    return blocks
