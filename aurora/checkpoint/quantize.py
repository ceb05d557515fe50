"""Replace linear layers of the language model by quantised ones, weight by weight.

Each kind has a stored form: the tensors that stand in a safetensors file below the name of the layer, in place of its
`weight`. Quantising makes them from a weight, building makes a layer from them; so a checkpoint that is stored
quantised and one that is quantised on the way in go through the same door, and one weight at a time is held in full.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aurora.checkpoint.lazy import LazyTensor
from aurora.checkpoint.quantization import BitsAndBytesConfig, Int8Config, QuantizationConfig, computing_in
from aurora.model.captioner import AuroraModel
from aurora.model.int8 import Int8Linear, quantize_rows, row_scales
from aurora.model.linear import is_plain_linear
from aurora.model.llama import Llama, LlamaConfig

PREFIX = "language_model."
_HEAD = PREFIX + "lm_head"
_EMBEDDINGS = PREFIX + "embed_tokens"
# Names that a list of modules to skip may hold although no linear layer of the language model is called so.
_ELSEWHERE = ("lm_head", "vision_tower", "multi_modal_projector", "mm_projector", "projector", "vision_model")


class Stored(NamedTuple):
    """What a file holds."""

    shape: tuple[int, ...]
    """-1 where the length is not known before."""
    dtype: torch.dtype


def quantized_linears(text: LlamaConfig, quantization: QuantizationConfig | None) -> dict[str, tuple[int, int]]:
    """Layers that a kind of quantisation replaces.

    Args:
        text: The language model.
        quantization: The kind; None replaces nothing.

    Returns:
        Name, from `language_model.` on -> (outputs, inputs). A tied output head is among them if it is quantised: it
        becomes a layer of its own, and the embeddings stay.
    """
    if quantization is None:
        return {}
    with torch.device("meta"):
        modules = dict(Llama(text).named_modules(prefix=PREFIX.rstrip(".")))
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
    }
    shapes[_HEAD] = (text.vocab_size, text.hidden_size)
    return {name: shape for name, shape in shapes.items() if not quantization.skips(name)}


def check_skipped(text: LlamaConfig, quantization: QuantizationConfig | None) -> None:
    """Refuse a name to skip that fits no layer.

    Raises:
        ValueError: with the name.
    """
    if isinstance(quantization, BitsAndBytesConfig):
        key, skipped = "llm_int8_skip_modules", tuple(quantization.llm_int8_skip_modules or ())
    else:
        key, skipped = "skip_modules", () if quantization is None else quantization.skip_modules
    everything = quantized_linears(text, Int8Config())
    for name in skipped:
        if name not in _ELSEWHERE and not any(Int8Config((name,)).skips(linear) for linear in everything):
            raise ValueError(f"{key}: {name!r} fits no layer; want names such as lm_head, down_proj, layers.0.mlp")


def source_of(name: str, text: LlamaConfig) -> str:
    """Name of the tensor that a layer is quantised from."""
    return f"{_EMBEDDINGS if name == _HEAD and text.tie_word_embeddings else name}.weight"


def stored_form(quantization: QuantizationConfig, shape: tuple[int, int]) -> dict[str, Stored]:
    """Tensors of one layer in a file: what follows its name -> shape and dtype."""
    if isinstance(quantization, BitsAndBytesConfig):
        from aurora.checkpoint.bnb import stored_sizes

        return {key: Stored(*sizes) for key, sizes in stored_sizes(quantization, shape).items()}
    return {"weight": Stored(shape, torch.int8), "weight_scale": Stored(shape[:1], torch.bfloat16)}


def stored_tensors(text: LlamaConfig, quantization: QuantizationConfig | None) -> dict[str, Stored]:
    """Tensors of all replaced layers in a file, by name from `language_model.` on."""
    return {
        f"{name}.{key}": stored
        for name, shape in quantized_linears(text, quantization).items()
        if quantization is not None
        for key, stored in stored_form(quantization, shape).items()
    }


def quantize_weight(quantization: QuantizationConfig, weight: Tensor) -> dict[str, Tensor]:
    """Quantise the weight of one layer.

    Args:
        quantization: The kind.
        weight: (outputs, inputs), any float dtype, on the device where the layer will be.

    Returns:
        Its stored form.

    Raises:
        ValueError: if a package is missing, or a weight is not finite.
    """
    if isinstance(quantization, BitsAndBytesConfig):
        from aurora.checkpoint.bnb import quantize

        return quantize(quantization, weight)
    rounded, scale = quantize_rows(weight)
    return {"weight": rounded, "weight_scale": scale}


def build_linear(quantization: QuantizationConfig, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> nn.Module:
    """Make a layer from its stored form, without a copy.

    Raises:
        ValueError: if a package is missing.
    """
    if isinstance(quantization, BitsAndBytesConfig):
        from aurora.checkpoint.bnb import build

        return build(quantization, shape, stored)
    return Int8Linear.from_tensors(stored["weight"], stored["weight_scale"])


def replace_linear(llama: Llama, name: str, layer: nn.Module) -> None:
    """Put a layer into a language model; its name counts from `language_model.` on."""
    parent, _, own = name.removeprefix(PREFIX).rpartition(".")
    setattr(llama.get_submodule(parent), own, layer)


def quantize_model(model: AuroraModel | Llama, quantization: QuantizationConfig) -> None:
    """Quantise a model in place; each weight is let go of once it is quantised.

    Args:
        model: A captioner or a language model, not quantised yet.
        quantization: The kind.

    Raises:
        ValueError: if it is quantised already, a name to skip fits no layer, or a package is missing.
    """
    llama = model if isinstance(model, Llama) else model.language_model
    if (kind := find_quantization(llama)) is not None:
        raise ValueError(f"quantization_config={quantization.kind}: the model is {kind.kind} already, want a plain one")
    check_skipped(llama.config, quantization)
    quantization = computing_in(quantization, llama.embed_tokens.weight.dtype)
    for name, shape in quantized_linears(llama.config, quantization).items():
        source = source_of(name, llama.config).removeprefix(PREFIX)
        stored = quantize_weight(quantization, llama.get_parameter(source).detach())
        replace_linear(llama, name, build_linear(quantization, shape, stored).train(llama.training))


def find_quantization(model: nn.Module) -> QuantizationConfig | None:
    """How the layers of a model are quantised, None where they are not; read off the layers themselves."""
    llama = model if isinstance(model, Llama) else next((m for m in model.modules() if isinstance(m, Llama)), None)
    if llama is None:
        return None
    modules = dict(llama.named_modules())
    plain = tuple(name for name, module in modules.items() if is_plain_linear(module) and name != "lm_head")
    if "bitsandbytes" in sys.modules:
        from aurora.checkpoint.bnb import find

        for module in modules.values():
            if (found := find(module, plain)) is not None:
                return found
    if not any(isinstance(module, Int8Linear) for module in modules.values()):
        return None
    head = () if isinstance(modules.get("lm_head"), Int8Linear) else ("lm_head",)
    return Int8Config((*plain, *head))


def storable(name: str) -> bool:
    """Whether a tensor of a model's state belongs in a file; bitsandbytes adds a constant that says nothing."""
    return not name.endswith(".weight_format")


def quantize_lazily(
    tensors: Mapping[str, LazyTensor], text: LlamaConfig, quantization: Int8Config
) -> dict[str, LazyTensor]:
    """Describe a model's tensors as they stand in a quantised file; each is quantised when it is read.

    Args:
        tensors: Our name -> tensor, not quantised.
        text: The language model.
        quantization: What to make of it.

    Returns:
        Our name -> tensor; the order stays.
    """
    linears = {f"{name}.weight": name for name in quantized_linears(text, quantization)}
    result: dict[str, LazyTensor] = {}
    for tensor_name, tensor in tensors.items():
        if tensor_name not in linears:
            result[tensor_name] = tensor
        else:
            result |= _quantized(linears[tensor_name], tensor)
    if f"{_HEAD}.weight" in linears and f"{_HEAD}.weight" not in tensors:
        result |= _quantized(_HEAD, tensors[f"{_EMBEDDINGS}.weight"])
    return result


def _quantized(name: str, source: LazyTensor) -> dict[str, LazyTensor]:
    # The file is written by tensor: its scales are found twice, which is cheaper than to hold the weight meanwhile.
    shape, file = source.shape, Path(source.file)
    return {
        f"{name}.weight": LazyTensor(
            shape=shape, dtype=torch.int8, read=lambda: quantize_rows(source.read())[0], file=file, key=source.key
        ),
        f"{name}.weight_scale": LazyTensor(
            shape=shape[:1], dtype=torch.bfloat16, read=lambda: row_scales(source.read()), file=file, key=source.key
        ),
    }
