"""Which attention implementation runs: chosen once for each kind of call, recorded, never changed silently.

`auto` is PyTorch's scaled_dot_product_attention (SDPA); on a GPU a single unpadded query goes to its flash kernel, as
cuDNN, first in PyTorch's order on Hopper, plans anew for every number of keys. A backend asked for by name runs, or
the call stops and says why it cannot.

A bias on the keys takes the form that a backend runs best (`BiasForm`). SDPA's float32 mask is right on a CPU and for
float32; on a GPU in half precision PyTorch's memory-efficient kernel refuses it and cuDNN before pytorch PR 191612
reads its bytes as half precision, so every fused half-precision kernel gets the bias inside its keys instead.
"""

from __future__ import annotations

import importlib.util
import logging
from enum import Enum
from typing import Any, NamedTuple

import torch

BACKENDS = (
    "auto",
    "eager",
    "sdpa",
    "sdpa_flash",
    "sdpa_cudnn",
    "sdpa_efficient",
    "flash_attention_2",
    "triton",
)
"""Names that `attn_implementation` takes."""

AUGMENTED_CHANNELS = 8
"""Most channels that carrying a bias inside the keys adds to a head."""

logger = logging.getLogger("aurora.attention")


class BiasForm(Enum):
    """How a bias on the keys reaches the scores."""

    none = "none"
    """There is none."""
    scores = "scores"
    """Added to float32 scores."""
    mask = "mask"
    """A float32 additive mask."""
    augmented = "augmented"
    """Two more channels of each key, met by ones in the query."""


class Choice(NamedTuple):
    """What one kind of call runs."""

    backend: str
    """A concrete one of BACKENDS."""
    bias_form: BiasForm
    reason: str
    """`asked for`, or why auto chose it."""


class _Call(NamedTuple):
    name: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    key_bias: bool
    masked: bool
    single_query: bool


_choices: dict[_Call, Choice] = {}


def check_backend(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    key_bias: bool = False,
    masked: bool = False,
) -> None:
    """Refuse an attention backend that cannot run, before a model is built around it.

    Args:
        name: One of BACKENDS.
        device: Where the model will be.
        dtype: Of its weights.
        head_dim: Width of one head.
        key_bias: Whether log sizes will be added to the keys.
        masked: Whether some queries will not see some keys for another reason than the causal rule.

    Raises:
        ValueError: if the name is unknown or the backend cannot run, with the reason.
    """
    if name not in BACKENDS:
        raise ValueError(f"attn_implementation={name!r}: want one of {', '.join(BACKENDS)}")
    reason = _reason_against(_Call(name, device, dtype, head_dim, key_bias, masked, False))
    if reason is not None:
        raise ValueError(f"attn_implementation={name}: {reason}")


def resolve_backend(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    key_bias: bool = False,
    masked: bool = False,
    single_query: bool = False,
) -> str:
    """Name the backend that a call with these properties runs; the first answer is kept.

    Args:
        name: One of BACKENDS.
        device: Where the tensors are.
        dtype: Of queries, keys and values.
        head_dim: Width of one head.
        key_bias: Whether the keys have a bias.
        masked: Whether there is a mask.
        single_query: Whether there is one query, as in decoding.

    Returns:
        A concrete one of BACKENDS.

    Raises:
        ValueError: if the name is unknown or the backend cannot run, with the reason.
    """
    return _resolve(name, device, dtype, head_dim, key_bias, masked, single_query)


def _resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    key_bias: bool,
    masked: bool,
    single_query: bool,
) -> str:
    call = _Call(name, device, dtype, head_dim, key_bias, masked, single_query)
    found = _choices.get(call)
    if found is not None:
        return found.backend
    check_backend(name, device=device, dtype=dtype, head_dim=head_dim, key_bias=key_bias, masked=masked)
    backend, reason = _auto(call) if name == "auto" else (name, "asked for")
    form = bias_form(backend, device, dtype) if key_bias else BiasForm.none
    _choices[call] = Choice(backend, form, reason)
    logger.info("attention %s on %s, %s, head width %d: %s (%s)", name, device, dtype, head_dim, backend, reason)
    return backend


# What torch.compiler.assume_constant_result sets, without importing the compiler: a choice is made while tracing.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attention_report() -> list[dict[str, Any]]:
    """List the choices made so far, in order of first use, for logs, checkpoints and benchmark files."""
    return [
        {
            "asked": call.name,
            "device": str(call.device),
            "dtype": str(call.dtype).removeprefix("torch."),
            "head_dim": call.head_dim,
            "key_bias": choice.bias_form.value,
            "masked": call.masked,
            "single_query": call.single_query,
            "backend": choice.backend,
            "reason": choice.reason,
        }
        for call, choice in _choices.items()
    ]


def bias_form(backend: str, device: torch.device, dtype: torch.dtype) -> BiasForm:
    """Say how a bias on the keys reaches the scores of a concrete backend."""
    if backend in ("eager", "triton"):
        return BiasForm.scores
    if backend in ("sdpa_flash", "flash_attention_2"):
        return BiasForm.augmented
    full_precision = dtype in (torch.float32, torch.float64)
    return BiasForm.mask if full_precision or device.type == "cpu" else BiasForm.augmented


def augmented_width(head_dim: int) -> int:
    """Head width once two slots for the bias are added: the next multiple of eight, which every kernel loads well."""
    return (head_dim + 2 + AUGMENTED_CHANNELS - 1) // AUGMENTED_CHANNELS * AUGMENTED_CHANNELS


def _auto(call: _Call) -> tuple[str, str]:
    if call.device.type == "cuda" and call.single_query and not call.masked:
        reason = _reason_against(call._replace(name="sdpa_flash"))
        if reason is None:
            return "sdpa_flash", "one query on a GPU: flash needs no plan for each number of keys"
    return "sdpa", "PyTorch's own order of kernels"


def _reason_against(call: _Call) -> str | None:
    """Say why a backend cannot serve a call, or None."""
    if call.name in ("auto", "eager", "sdpa"):
        return None
    if call.name == "triton":
        return _reason_against_triton(call)
    if call.name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install flash-attn --no-build-isolation"
    on_cuda = call.device.type == "cuda"
    if call.name == "sdpa_flash" and call.device.type == "cpu":
        return None
    if not on_cuda:
        return f"needs a CUDA device, the tensors are on {call.device.type}; want sdpa or eager there"
    return _reason_against_on_cuda(call)


def _reason_against_on_cuda(call: _Call) -> str | None:
    is_half = call.dtype in (torch.float16, torch.bfloat16)
    augmented = call.key_bias and bias_form(call.name, call.device, call.dtype) is BiasForm.augmented
    width = augmented_width(call.head_dim) if augmented else call.head_dim
    shown = f"head width {call.head_dim}" + (f", {width} with the key bias" if width != call.head_dim else "")
    if call.name == "sdpa_efficient":
        multiple = 8 if is_half else 4
        return None if width % multiple == 0 else f"{shown}: want a multiple of {multiple}"
    if not is_half:
        return f"takes float16 and bfloat16, got {str(call.dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(call.device) < (8, 0):
        return f"needs compute capability 8.0, {torch.cuda.get_device_name(call.device)} has less"
    if call.name == "sdpa_cudnn":
        if not torch.backends.cudnn.is_available():
            return "PyTorch was built without cuDNN"
        if torch.are_deterministic_algorithms_enabled():
            return "cuDNN attention is not deterministic, and torch.use_deterministic_algorithms is on"
        return None if width % 8 == 0 and width <= 128 else f"{shown}: want a multiple of 8 up to 128"
    if call.name == "sdpa_flash" and call.masked:
        return "PyTorch's flash kernel takes no mask (padded rows, or new tokens behind cached ones)"
    return None if width <= 256 else f"{shown}: want at most 256"


def _reason_against_triton(call: _Call) -> str | None:
    from aurora.kernels.attention import reason_against
    from aurora.kernels.dispatch import KernelUnavailable, choose

    against = reason_against(call.dtype, call.head_dim)
    try:
        choose("attention", device=call.device, reason_against=against, backend="triton")
    except KernelUnavailable as error:
        return error.reason
    return None
