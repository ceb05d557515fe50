"""Golden tensors of the reference code (tests/goldens) and the comparison every golden test uses."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
RTOL = 1e-5
RTOL_LM = 2e-5


@cache
def load_tensors(name: str) -> dict[str, Tensor]:
    """Tensors of `goldens/<name>.safetensors`; shared between tests, so never write into them."""
    return load_file(GOLDENS / f"{name}.safetensors")


@cache
def load_index(name: str) -> Any:
    """Parsed `goldens/<name>.json`."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


def assert_close_to_golden(actual: Tensor, golden: Tensor, rtol: float = RTOL) -> None:
    """Demand `max|a-b| <= rtol * max|b|` over the whole tensor; report the worst element.

    Args:
        actual: What this code computed, any shape.
        golden: What the reference computed, same shape.
        rtol: Share of the largest golden magnitude; 0 asks for equality.
    """
    assert actual.shape == golden.shape, f"shape {tuple(actual.shape)}, golden {tuple(golden.shape)}"
    actual, golden = actual.detach().double().cpu(), golden.double()
    assert torch.isfinite(actual).all(), f"{(~torch.isfinite(actual)).sum().item()} values are not finite"
    if golden.numel() == 0:
        return
    error = (actual - golden).abs()
    bound = rtol * golden.abs().max().item()
    if error.max().item() > bound:
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"worst at {worst}: {actual[worst].item():.8g}, golden {golden[worst].item():.8g},"
            f" error {error[worst].item():.3g}, bound {bound:.3g};"
            f" {(error > bound).sum().item()} of {error.numel()} elements over the bound"
        )


def full_case(case: str) -> dict[str, Tensor]:
    """Inputs of a `full_*` case: input_ids, labels (B, T), attention_mask (B, T) bool, pixel_values (B, F, 3, H, W)."""
    inputs = load_tensors("full_inputs")
    pixels_of = {"img_r0.4": "img_r1.0", "vid4_slowfast_r0.4": "vid4_r0.4"}.get(case, case)
    pixels = inputs[f"{pixels_of}.pixel_values"]
    ids = inputs[f"{case}.input_ids"]
    mask = inputs.get(f"{case}.attention_mask", torch.ones_like(ids))
    return {
        "input_ids": ids,
        "labels": inputs[f"{case}.labels"],
        "attention_mask": mask.bool(),
        "pixel_values": pixels if pixels.dim() == 5 else pixels.unsqueeze(1),  # an image is a clip of one frame
    }
