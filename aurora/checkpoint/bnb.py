"""Layers of the package bitsandbytes (Dettmers et al., 2022 and 2023): their stored form, and how they are built.

The names in a file are those that transformers writes, so either reads what the other saved.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aurora.checkpoint.quantization import BitsAndBytesConfig

BLOCK_SIZE = 64
"""Weights that share a scale, in 4 bit."""
_NESTED_BLOCK_SIZE = 256
_AT_ONCE = 2**20
"""Weights, a multiple of twice the block."""


class _Once(logging.Filter):
    """Lets each message through once: some say at every product what holds for the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new


@functools.cache
def _bitsandbytes() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantization_config=BitsAndBytesConfig: want bitsandbytes: pip install bitsandbytes")
    import bitsandbytes

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
    return bitsandbytes


def check_installed(quantization: object) -> None:
    """Check that the package is there if it is needed, before anything is read.

    Raises:
        ValueError: with the command that installs it.
    """
    if isinstance(quantization, BitsAndBytesConfig):
        _bitsandbytes()


def stored_sizes(
    quantization: BitsAndBytesConfig, shape: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Tensors of one layer in a file: what follows its name -> shape (-1: not known before) and dtype."""
    if quantization.load_in_8bit:
        return {"weight": (shape, torch.int8), "SCB": (shape[:1], torch.float32)}
    count = math.prod(shape)
    num_blocks = math.ceil(count / BLOCK_SIZE)
    nested = quantization.bnb_4bit_use_double_quant
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((math.ceil(count / 2), 1), torch.uint8),
        "weight.absmax": ((num_blocks,), torch.uint8 if nested else torch.float32),
        "weight.quant_map": ((16,), torch.float32),
        f"weight.quant_state.bitsandbytes__{quantization.bnb_4bit_quant_type}": ((-1,), torch.uint8),
    }
    if nested:
        sizes["weight.nested_absmax"] = ((math.ceil(num_blocks / _NESTED_BLOCK_SIZE),), torch.float32)
        sizes["weight.nested_quant_map"] = ((256,), torch.float32)
    return sizes


def quantize(quantization: BitsAndBytesConfig, weight: Tensor) -> dict[str, Tensor]:
    """Quantise the weight of one layer on its device; returns the stored form.

    Raises:
        ValueError: if the package is missing.
    """
    functional = _bitsandbytes().functional
    if quantization.load_in_8bit:
        rounded, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": rounded, "SCB": scales}
    kind, nested = quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant
    flat = weight.contiguous().view(-1)
    # On a CPU the package holds five times what it rounds, so it gets a few blocks at once, which come out the same. It
    # would also compile, which takes more time and memory than the rounding.
    with torch.compiler.set_stance("force_eager"):
        pieces = flat.split(_AT_ONCE) if flat.device.type == "cpu" else (flat,)
        parts = [functional.quantize_4bit(piece, blocksize=BLOCK_SIZE, quant_type=kind) for piece in pieces]
    packed, scales = (torch.cat(tensors) for tensors in zip(*((part, state.absmax) for part, state in parts)))
    state = parts[0][1]
    state.shape, state.absmax = weight.shape, scales
    if nested:
        state.nested, state.offset = True, scales.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, blocksize=_NESTED_BLOCK_SIZE)
    return {"weight": packed, **{f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}


def build(quantization: BitsAndBytesConfig, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> nn.Module:
    """Make a layer from its stored form, without a copy.

    Args:
        quantization: The kind.
        shape: (outputs, inputs).
        stored: What `stored_sizes` names, on the device where the layer will be.

    Returns:
        A Linear8bitLt or Linear4bit.

    Raises:
        ValueError: if the package is missing.
    """
    modules = _bitsandbytes().nn
    outputs, inputs = shape
    weight = stored["weight"]
    layer: nn.Module
    if quantization.load_in_8bit:
        layer = modules.Linear8bitLt(
            inputs, outputs, bias=False, has_fp16_weights=False, device="meta",
            threshold=quantization.llm_int8_threshold,
        )  # fmt: skip
        layer.weight = modules.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=stored["SCB"]
        )
        return layer
    layer = modules.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=quantization.compute_dtype, device="meta",
        quant_type=quantization.bnb_4bit_quant_type, compress_statistics=quantization.bnb_4bit_use_double_quant,
    )  # fmt: skip
    # The first product would repack the weight for that instruction set, which rounds the scales to bfloat16 for good,
    # gives them another shape in a saved file, and fails where a row is no whole number of blocks (0.50.2).
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    statistics = {key.removeprefix("weight."): tensor for key, tensor in stored.items() if key != "weight"}
    layer.weight = modules.Params4bit.from_prequantized(
        data=weight, quantized_stats=statistics, requires_grad=False, device=weight.device, module=layer
    )
    return layer


def find(module: nn.Module, plain: tuple[str, ...]) -> BitsAndBytesConfig | None:
    """What a layer of the package was built with, None for any other.

    Args:
        module: Any module.
        plain: Linear layers beside it that are not quantised.
    """
    modules = _bitsandbytes().nn
    if isinstance(module, modules.Linear8bitLt):
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=module.state.threshold, llm_int8_skip_modules=plain
        )
    if isinstance(module, modules.Linear4bit):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=plain,
            bnb_4bit_compute_dtype=module.compute_dtype,
            bnb_4bit_quant_type=module.weight.quant_type,
            bnb_4bit_use_double_quant=bool(module.weight.compress_statistics),
        )
    return None
