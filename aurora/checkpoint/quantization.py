"""What can be asked for in `quantization_config`, and how config.json records it. Pure; no tensor is touched.

Only linear layers of the language model are quantised. The vision tower and the projector stay as they are: they are
a tenth of the weights, and merging follows the tower's keys. Embeddings stay as well; the output head is quantised by
our int8 and, after Hugging Face's convention, not by bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from aurora.checkpoint.store import CheckpointError, JsonDict

OWN_METHOD = "aurora_int8"
"""`quant_method` in config.json of `Int8Config`."""
BNB_METHOD = "bitsandbytes"
_UNTOUCHED = ("lm_head", "vision_tower", "multi_modal_projector")
_COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Int8Config:
    """Int8 weights with one scale per output row: ours, and the fastest at decoding. Needs no package."""

    skip_modules: tuple[str, ...] = ()
    """Layers to leave alone: names or parts of names between dots, such as lm_head, down_proj, layers.0."""

    @property
    def kind(self) -> str:
        """Its short name."""
        return "int8"

    def skips(self, name: str) -> bool:
        """Whether a layer of the language model is left alone."""
        return _is_named(name, self.skip_modules)


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """Quantisation through the package bitsandbytes, with the arguments of transformers' class of this name."""

    load_in_8bit: bool = False
    """LLM.int8(): int8 weights and activations, columns with outliers in float16."""
    load_in_4bit: bool = False
    """4-bit weights; exactly one of the two."""
    llm_int8_threshold: float = 6.0
    """8 bit: activations beyond this are outliers."""
    llm_int8_skip_modules: tuple[str, ...] | list[str] | None = None
    """Layers of the language model to leave alone, besides lm_head: names or parts of names between dots."""
    llm_int8_enable_fp32_cpu_offload: bool = False
    """Only False: a model is on one device."""
    llm_int8_has_fp16_weight: bool = False
    """Only False: weights are stored quantised."""
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    """4 bit: dtype of the products; None is that of the model."""
    bnb_4bit_quant_type: str = "fp4"
    """4 bit: fp4 or nf4."""
    bnb_4bit_use_double_quant: bool = False
    """4 bit: quantise the scales, too."""
    bnb_4bit_quant_storage: torch.dtype | str | None = None
    """4 bit: only uint8, which None means."""

    def __post_init__(self) -> None:
        """Check every argument; a dtype may be given by name."""
        got = f"load_in_8bit={self.load_in_8bit!r}, load_in_4bit={self.load_in_4bit!r}"
        if not isinstance(self.load_in_8bit, bool) or not isinstance(self.load_in_4bit, bool):
            raise ValueError(f"{got}: want True or False")
        if self.load_in_8bit == self.load_in_4bit:
            raise ValueError(f"{got}: want exactly one of them")
        for key in ("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"):
            if getattr(self, key):
                raise ValueError(f"{key}={getattr(self, key)!r}: want False")
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise ValueError(f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r}: want fp4 or nf4")
        if str(self.bnb_4bit_quant_storage).removeprefix("torch.") not in ("None", "uint8"):
            raise ValueError(f"bnb_4bit_quant_storage={self.bnb_4bit_quant_storage!r}: want uint8")
        if isinstance(self.llm_int8_threshold, bool) or not isinstance(self.llm_int8_threshold, int | float):
            raise ValueError(f"llm_int8_threshold={self.llm_int8_threshold!r}: want a number")
        if self.bnb_4bit_compute_dtype is not None:
            name = str(self.bnb_4bit_compute_dtype).removeprefix("torch.")
            if name not in _COMPUTE_DTYPES:
                raise ValueError(f"bnb_4bit_compute_dtype={name!r}: want one of {', '.join(_COMPUTE_DTYPES)}")
            object.__setattr__(self, "bnb_4bit_compute_dtype", _COMPUTE_DTYPES[name])
        skipped = _names("llm_int8_skip_modules", self.llm_int8_skip_modules)
        object.__setattr__(self, "llm_int8_skip_modules", skipped)

    @property
    def kind(self) -> str:
        """Its short name."""
        return "int8_bnb" if self.load_in_8bit else self.bnb_4bit_quant_type

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """4 bit: dtype of the products; None is that of the model."""
        dtype = self.bnb_4bit_compute_dtype
        assert not isinstance(dtype, str)
        return dtype

    def skips(self, name: str) -> bool:
        """Whether a layer of the language model is left alone."""
        return _is_named(name, ("lm_head", *(self.llm_int8_skip_modules or ())))


QuantizationConfig = Int8Config | BitsAndBytesConfig


def as_quantization(value: object | None) -> QuantizationConfig | None:
    """Understand what a caller gives as `quantization_config`.

    Args:
        value: One of ours, a short name (int8, int8_bnb, nf4, fp4), a mapping as in config.json, any object with the
            attributes of `BitsAndBytesConfig` (such as transformers' own), or None.

    Returns:
        Ours, or None for no quantisation.

    Raises:
        ValueError: for anything else.
    """
    if value is None or isinstance(value, Int8Config | BitsAndBytesConfig):
        return value
    if isinstance(value, str):
        if value not in KINDS:
            raise ValueError(f"quantization_config={value!r}: want one of {', '.join(KINDS)}")
        return KINDS[value]
    if isinstance(value, Mapping):
        return _from_json(value, "quantization_config")
    if hasattr(value, "load_in_8bit") and hasattr(value, "load_in_4bit"):
        names = [field.name for field in fields(BitsAndBytesConfig)]
        return BitsAndBytesConfig(**{name: getattr(value, name) for name in names if hasattr(value, name)})
    got = type(value).__name__
    raise ValueError(f"quantization_config={got}: want a BitsAndBytesConfig, an Int8Config, or {', '.join(KINDS)}")


def stored_quantization(config: JsonDict) -> QuantizationConfig | None:
    """Read what a checkpoint's root config.json says about its weights.

    Args:
        config: Parsed config.json.

    Returns:
        How the weights are stored, None where they are not quantised.

    Raises:
        CheckpointError: for a method this version does not read.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, dict):
        raise CheckpointError(f"config.json: quantization_config={section!r}: want an object")
    try:
        return _from_json(section, "config.json: quantization_config")
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def quantization_json(config: QuantizationConfig) -> JsonDict:
    """Write the `quantization_config` of config.json; that of bitsandbytes has transformers' fields."""
    if isinstance(config, Int8Config):
        return {"quant_method": OWN_METHOD, "skip_modules": list(config.skip_modules)}
    content: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)}
    compute = None if config.compute_dtype is None else str(config.compute_dtype).removeprefix("torch.")
    skipped = dict.fromkeys([*_UNTOUCHED, *(config.llm_int8_skip_modules or ())])
    return {
        "quant_method": BNB_METHOD,
        **content,
        "llm_int8_skip_modules": list(skipped),
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
    }


def agree(wanted: QuantizationConfig | None, stored: QuantizationConfig | None) -> QuantizationConfig | None:
    """Settle what a caller wants with what the files hold; how to compute is the caller's, what is stored is not.

    Raises:
        ValueError: if the weights are stored quantised in another way than is wanted.
    """
    if wanted is None or stored is None:
        return wanted or stored
    if wanted.kind != stored.kind:
        raise ValueError(
            f"quantization_config={wanted.kind}: the checkpoint is stored as {stored.kind}, want that or None"
        )
    if isinstance(wanted, BitsAndBytesConfig) and isinstance(stored, BitsAndBytesConfig):
        return replace(
            wanted,
            llm_int8_skip_modules=stored.llm_int8_skip_modules,
            bnb_4bit_use_double_quant=stored.bnb_4bit_use_double_quant,
        )
    return stored


def computing_in(config: QuantizationConfig, dtype: torch.dtype) -> QuantizationConfig:
    """The same with the dtype of the products settled, where it is not yet: bitsandbytes would warn at every layer."""
    if isinstance(config, BitsAndBytesConfig) and config.load_in_4bit and config.compute_dtype is None:
        return replace(config, bnb_4bit_compute_dtype=dtype)
    return config


def _from_json(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    method = section.get("quant_method", BNB_METHOD)
    if method == OWN_METHOD:
        return Int8Config(_names(f"{where}: skip_modules", section.get("skip_modules")) or ())
    if method != BNB_METHOD:
        raise ValueError(f"{where}: quant_method={method!r}: want {BNB_METHOD} or {OWN_METHOD}")
    names = [field.name for field in fields(BitsAndBytesConfig)]
    return BitsAndBytesConfig(**{name: section[name] for name in names if name in section})


def _names(key: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{key}={value!r}: want a list of names")
    names = tuple(value)
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{key}={value!r}: want a list of names")
    return names


def _is_named(name: str, parts: Iterable[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


KINDS: dict[str, QuantizationConfig] = {
    "int8": Int8Config(),
    "int8_bnb": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": BitsAndBytesConfig(load_in_4bit=True),
}
"""Short names, as scripts take them."""
