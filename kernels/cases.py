"""Shapes and values that kernels are tested and measured with; what is easy to get wrong has a case.

Shape letters as in `aurora.kernels.merge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor


class EncoderShape(NamedTuple):
    """Sizes of one layer's merging and attention: C channels in H heads of width D, R merged pairs."""

    B: int
    N: int
    C: int
    H: int
    D: int
    R: int


ENCODER_SHAPES = tuple(
    EncoderShape(B=B, N=N, C=1280, H=16, D=80, R=18) for B, N in ((8, 730), (8, 172), (32, 730), (1, 730))
)
"""ViT-H at 378 px and ratio 0.2: before the first and the last layer, and in a larger and a smaller batch."""


class Values(Enum):
    """What the metric of a case looks like."""

    random = "random"
    """Normal deviates: no ties."""
    smooth = "smooth"
    """Tokens that differ by 20 %, as in a frame: similarities close to 1, which bfloat16 could not tell apart."""
    ties = "ties"
    """+-1 with a norm that is a power of two: exact similarities, and few different ones."""
    zeros = "zeros"
    """Normal deviates, but every third token is zero."""
    equal = "equal"
    """One and the same token everywhere."""


class MergeInputs(NamedTuple):
    """Inputs of matching and merging."""

    metric: Tensor
    """(B, N, D)."""
    x: Tensor
    """(B, N, C)."""
    residual: Tensor
    """(B, N, C)."""
    size: Tensor
    """(B, N, 1) float32."""
    weight: Tensor
    """(C,), of the LayerNorm behind."""
    bias: Tensor
    """(C,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeCase:
    """One call of matching and merging."""

    rows: int
    """B."""
    num_tokens: int
    """N."""
    width: int
    """C of the tokens."""
    metric_width: int
    """D of the metric."""
    r: int
    """Pairs to merge; more than possible is clamped."""
    class_token: bool = True
    """Position 0 is protected."""
    values: Values = Values.random
    """Kind of metric."""
    strided: bool = False
    """Inputs whose last dimension is not dense."""

    @property
    def id(self) -> str:
        """Name in test reports: B2-N33-C40-D8-r5-cls-ties-strided."""
        marks = ["cls" if self.class_token else "nocls"]
        if self.values is not Values.random:
            marks.append(self.values.value)
        if self.strided:
            marks.append("strided")
        sizes = f"B{self.rows}-N{self.num_tokens}-C{self.width}-D{self.metric_width}-r{self.r}"
        return "-".join([sizes, *marks])

    def make(self, dtype: torch.dtype, *, device: torch.device | str = "cpu", seed: int = 0) -> MergeInputs:
        """Draw the inputs on a CPU, so that a device sees the same ones.

        Args:
            dtype: Type of everything but the sizes.
            device: Where they go.
            seed: Another one draws others.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        metric = self._metric(generator)
        x, residual = (normal(self.rows, self.num_tokens, self.width) for _ in range(2))
        size = torch.randint(1, 9, (self.rows, self.num_tokens, 1), generator=generator).float().to(device)
        weight, bias = (normal(self.width).to(device, dtype) for _ in range(2))
        metric, x, residual = (tensor.to(device, dtype) for tensor in (metric, x, residual))
        if self.strided:
            metric, x, residual = (tensor.mT.contiguous().mT for tensor in (metric, x, residual))
        return MergeInputs(metric, x, residual, size, weight, bias)

    def _metric(self, generator: torch.Generator) -> Tensor:
        shape = (self.rows, self.num_tokens, self.metric_width)
        if self.values is Values.ties:
            assert self.metric_width in (4, 16, 64), "norms of +-1 are exact for powers of four"
            return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1
        metric = torch.randn(shape, generator=generator)
        if self.values is Values.equal:
            return torch.ones_like(metric)
        if self.values is Values.smooth:
            return metric[:, :1] + 0.2 * metric
        if self.values is Values.zeros:
            metric[:, ::3] = 0
        return metric


MERGE_CASES = [
    MergeCase(rows=1, num_tokens=1, width=5, metric_width=3, r=0),
    MergeCase(rows=1, num_tokens=1, width=5, metric_width=3, r=1, class_token=False),
    MergeCase(rows=2, num_tokens=2, width=8, metric_width=4, r=1),  # nothing but the class token could merge
    MergeCase(rows=2, num_tokens=2, width=1, metric_width=4, r=1, class_token=False),
    MergeCase(rows=1, num_tokens=3, width=17, metric_width=1, r=1),
    MergeCase(rows=3, num_tokens=7, width=16, metric_width=5, r=2, class_token=False),
    MergeCase(rows=1, num_tokens=16, width=24, metric_width=16, r=0),
    MergeCase(rows=1, num_tokens=16, width=24, metric_width=16, r=0, class_token=False),
    MergeCase(rows=2, num_tokens=17, width=31, metric_width=10, r=3, strided=True),
    MergeCase(rows=1, num_tokens=31, width=33, metric_width=80, r=99),
    MergeCase(rows=1, num_tokens=32, width=33, metric_width=80, r=99, class_token=False, strided=True),
    MergeCase(rows=1, num_tokens=37, width=12, metric_width=16, r=9, values=Values.ties),
    MergeCase(rows=1, num_tokens=36, width=12, metric_width=4, r=11, values=Values.ties, class_token=False),
    MergeCase(rows=1, num_tokens=41, width=12, metric_width=4, r=15, values=Values.equal),
    MergeCase(rows=1, num_tokens=29, width=12, metric_width=8, r=14, values=Values.zeros),
    MergeCase(rows=1, num_tokens=28, width=12, metric_width=8, r=14, values=Values.zeros, class_token=False),
    MergeCase(rows=1, num_tokens=43, width=20, metric_width=24, r=10, values=Values.smooth),
]
"""Quick ones, each for a reason: 1, odd, prime, r of 0 and at the cap, ties, zero vectors, strides."""

MERGE_CASES_TILES = [
    MergeCase(rows=1, num_tokens=149, width=72, metric_width=80, r=18),
    MergeCase(rows=1, num_tokens=150, width=72, metric_width=16, r=70, values=Values.ties, class_token=False),
    MergeCase(rows=2, num_tokens=257, width=20, metric_width=16, r=128, values=Values.ties),
    MergeCase(rows=2, num_tokens=101, width=160, metric_width=80, r=20, values=Values.smooth),
]
"""Several tiles of tokens, ties across tiles, and more sources than one vector of 64."""

MERGE_CASES_7B = [
    *(MergeCase(rows=s.B, num_tokens=s.N, width=s.C, metric_width=s.D, r=s.R) for s in ENCODER_SHAPES[:2]),
    MergeCase(rows=1, num_tokens=449, width=1280, metric_width=80, r=39),
    MergeCase(rows=4, num_tokens=729, width=1152, metric_width=64, r=22, class_token=False, values=Values.ties),
    MergeCase(rows=2, num_tokens=730, width=1280, metric_width=64, r=18, values=Values.ties),
]
"""AuroraCap's encoder: the first and the last layer at ratio 0.2, a decreasing schedule's largest r, SigLIP, and ties.

The order of all unmerged tokens is compared without a class token, so that case has exact scores."""

MERGE_CASE_FRAME = MergeCase(rows=1, num_tokens=730, width=1280, metric_width=80, r=18)
"""One whole frame of AuroraCap's encoder: what the interpreter can bear once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCase:
    """One call of attention: T queries of H heads over S keys of K heads, head width D."""

    name: str
    """Readable id."""
    shape: tuple[int, int, int, int, int, int]
    """B, T, S, H, K, D."""
    causal: bool = False
    """Queries are the last of the keys and see none after themselves."""
    max_size: int = 0
    """Largest token size behind the bias, log of 1 to this; 0: no bias."""
    masked: bool = False
    """A random mask that leaves each query some keys."""
    contiguous: bool = True
    """Else heads lie outside of tokens in memory, and rows are padded."""


ATTENTION_CASES = (
    AttentionCase(name="one_token", shape=(1, 1, 1, 1, 1, 8), max_size=5),
    AttentionCase(name="tiny_head", shape=(2, 5, 5, 2, 2, 5), max_size=5),
    AttentionCase(name="prime", shape=(2, 67, 67, 1, 1, 80), max_size=300),
    AttentionCase(name="prime_no_bias", shape=(1, 37, 37, 2, 2, 80)),
    AttentionCase(name="strided", shape=(1, 65, 65, 2, 2, 80), max_size=300, contiguous=False),
    AttentionCase(name="one_more_than_tiles", shape=(1, 129, 65, 1, 1, 64), max_size=9),
    AttentionCase(name="causal", shape=(1, 97, 97, 1, 1, 64), causal=True),
    AttentionCase(name="causal_bias_gqa", shape=(1, 70, 70, 4, 2, 48), causal=True, max_size=30),
    AttentionCase(name="continued", shape=(2, 19, 83, 2, 1, 24), causal=True, max_size=30, contiguous=False),
    AttentionCase(name="decode_gqa", shape=(1, 1, 99, 4, 2, 64), causal=True, max_size=300),
    AttentionCase(name="padded", shape=(2, 33, 49, 2, 1, 32), max_size=30, masked=True),
    AttentionCase(name="wide_head", shape=(1, 17, 34, 1, 1, 160), max_size=9),
)
"""Small enough for the interpreter."""

ATTENTION_MODEL_CASES = (
    AttentionCase(name="vit_one_frame", shape=(1, 730, 730, 2, 2, 80), max_size=300),
    AttentionCase(name="vit_730", shape=(8, 730, 730, 16, 16, 80)),
    AttentionCase(name="vit_730_bias", shape=(8, 730, 730, 16, 16, 80), max_size=2),
    AttentionCase(name="vit_449_bias", shape=(8, 449, 449, 16, 16, 80), max_size=30),
    AttentionCase(name="vit_172_bias", shape=(8, 172, 172, 16, 16, 80), max_size=300),
    AttentionCase(name="llama_prefill", shape=(1, 1432, 1432, 32, 32, 128), causal=True),
    AttentionCase(name="llama_prefill_bias", shape=(1, 1432, 1432, 32, 32, 128), causal=True, max_size=30),
)
"""Of ViT-H and Llama-7B, for a GPU."""


def attention_inputs(
    case: AttentionCase, dtype: torch.dtype, *, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Tensor | None]:
    """Draw the tensors of a case.

    Args:
        case: Which.
        dtype: Of queries, keys, values and the gradient of the output.
        device: Where they go; the numbers are drawn on the CPU, so they are the same everywhere.
        seed: Of the numbers.

    Returns:
        q, k, v, dout (B, T or S, heads, D), key_bias (B, S) float32 or None, mask (B, T, S) bool or None.
    """
    rows, num_queries, num_keys, num_heads, num_kv_heads, head_dim = case.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(num_tokens: int, heads: int) -> Tensor:
        x = torch.randn(rows, num_tokens, heads, head_dim, generator=generator).to(device, dtype)
        if case.contiguous:
            return x
        padded = x.new_full((rows, heads, num_tokens + 3, head_dim + 7), torch.nan)
        view = padded[:, :, 1 : num_tokens + 1, 4 : head_dim + 4].transpose(1, 2)
        view.copy_(x)
        return view

    inputs: dict[str, Tensor | None] = {
        "q": draw(num_queries, num_heads),
        "k": draw(num_keys, num_kv_heads),
        "v": draw(num_keys, num_kv_heads),
        "dout": draw(num_queries, num_heads),
        "key_bias": None,
        "mask": None,
    }
    if case.max_size:
        sizes = torch.randint(1, case.max_size + 1, (rows, num_keys), generator=generator)
        inputs["key_bias"] = sizes.float().log().to(device)
    if case.masked:
        seen = torch.rand(rows, num_queries, num_keys, generator=generator) < 0.6
        inputs["mask"] = (seen | torch.eye(num_queries, num_keys, dtype=torch.bool)).to(device)
    return inputs
