"""What suite=kernels measures: for each op its inputs, the ways to compute it, and what the least work would be.

Sides named `ToMe` are the paper's formulation (`tome.py`), `torch` our PyTorch path, `triton` our kernels;
`..., compiled` is what torch.compile makes of the same function.

Shape letters: B frames, N tokens, C width, H heads, D head width, R merged pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.benchmark.config import Op
from aurora.benchmark.harness import WrongResultError, expect_close
from aurora.benchmark.tome import TomePairs, tome_attention, tome_match, tome_merge, tome_step
from aurora.kernels.cases import EncoderShape
from aurora.kernels.cross_entropy import linear_cross_entropy
from aurora.kernels.merge import Matching, key_metric, match_tokens, merge_tokens, merge_tokens_norm
from aurora.model.attention import attention

Run = Callable[..., Any]
"""One way to compute an op: takes the case's inputs, returns a tensor or a tuple of tensors."""
Check = Callable[[str, Any, Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one shape and type."""

    op: Op
    label: str
    """Shape, for the table."""
    dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    """What every side is called with."""
    sides: dict[str, Run]
    """The baseline first."""
    check: Check
    compiled: tuple[str, ...] = ()
    """Sides that are measured compiled, too."""
    num_grads: int = 0
    """Leading inputs that get a gradient; 0 where the op has no backward."""
    num_bytes: float = 0.0
    """Least traffic of a forward pass: inputs read and outputs written once; a backward pass moves as much."""
    flops: float = 0.0
    """Operations of the forward pass."""
    backward_flops: float = field(default=0.0)
    """Operations of the backward pass."""


def merge_cases(
    op: Op, shape: EncoderShape, dtype: torch.dtype, device: torch.device, *, with_triton: bool
) -> Iterator[Case]:
    """Build the case of match, merge, merge_step or merge_norm; the arguments name op, sizes, type and place.

    merge_step is one layer's whole merging, from the keys on; merge_norm adds the residual and ends in a LayerNorm.
    """
    B, N, C, H, D, R = shape
    x, residual = torch.randn(2, B, N, C, device=device, dtype=dtype).unbind()
    keys = torch.randn(B, N, H, D, device=device, dtype=dtype)
    size = torch.randint(1, 5, (B, N, 1), device=device).float()
    weight, bias = torch.randn(2, C, device=device, dtype=dtype).unbind()
    metric = key_metric(keys)
    match = match_tokens(metric, R, class_token=True, backend="torch")
    pairs = TomePairs(match.unmerged_idx[..., None], match.src_idx[..., None], match.dst_idx[..., None])
    close = expect_close(atol=_tolerance(dtype))
    moved = float(B * (2 * N - R) * C * x.element_size())
    common: dict[str, Any] = {
        "op": op, "label": f"B={B} N={N} C={C} R={R}", "dtype": dtype, "compiled": ("ToMe", "torch"),
    }  # fmt: skip

    def sides(tome: Run, ours: Run) -> dict[str, Run]:
        return {"ToMe": tome} | _on_each(("torch", "triton") if with_triton else ("torch",), ours)

    if op is Op.match:
        yield Case(
            **common | {"dtype": torch.float32}, inputs=(metric,), check=_check_pairs(metric, R),
            sides=sides(
                lambda metric: tome_match(metric, R, class_token=True),
                lambda metric, backend: match_tokens(metric, R, class_token=True, backend=backend),
            ),
            num_bytes=float(metric.numel() * 4), flops=2.0 * B * (N // 2) * (N - N // 2) * D,
        )  # fmt: skip
    elif op is Op.merge:
        yield Case(
            **common, inputs=(x, size), check=close, num_grads=1, num_bytes=moved,
            sides=sides(
                lambda x, size: tome_merge(x, size, pairs),
                lambda x, size, backend: merge_tokens(x, size, match, backend=backend),
            ),
        )  # fmt: skip
    elif op is Op.merge_step:
        yield Case(
            **common, inputs=(keys, x, size), num_bytes=moved + float(keys.numel() * keys.element_size()),
            # In half precision the paper's formulation scores in that type, and so merges other pairs (KERNELS 0.3).
            check=close if dtype == torch.float32 else _check_sizes(size),
            sides=sides(
                lambda keys, x, size: tome_step(keys, x, size, R, class_token=True),
                lambda keys, x, size, backend: _our_step(keys, x, size, R, backend),
            ),
        )  # fmt: skip
    else:
        yield Case(
            **common, inputs=(x, residual, weight, bias, size), check=close, num_grads=4, num_bytes=2 * moved,
            sides=sides(
                lambda x, residual, weight, bias, size: _tome_norm(x, residual, weight, bias, size, pairs),
                lambda x, residual, weight, bias, size, backend: merge_tokens_norm(
                    x, residual, size, match, weight, bias, 1e-5, backend=backend
                ),
            ),
        )  # fmt: skip


def attention_cases(
    shape: EncoderShape, dtype: torch.dtype, device: torch.device, *, with_triton: bool
) -> Iterator[Case]:
    """Build attention without and with a key bias; the second also shows the first's SDPA, for what a bias costs."""
    B, N, _, H, D, _ = shape
    q, k, v = torch.randn(3, B, N, H, D, device=device, dtype=dtype).unbind()
    size = torch.randint(1, 9, (B, N, 1), device=device).float()
    key_bias = size[..., 0].log()
    mask = key_bias[:, None, None].to(dtype)  # (B, 1, 1, N)
    backends = ["auto", "eager"] + (["triton"] if with_triton else [])
    if device.type == "cuda":
        backends += ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient"]
    close = expect_close(atol=_tolerance(dtype))
    flops = 4.0 * B * H * N * N * D
    common: dict[str, Any] = {
        "op": Op.attention, "dtype": dtype, "inputs": (q, k, v), "num_grads": 3, "flops": flops,
        "backward_flops": 2.5 * flops, "num_bytes": 4.0 * q.numel() * q.element_size(),
    }  # fmt: skip
    label = f"B={B} N={N} H={H} D={D}"
    plain: dict[str, Run] = {"SDPA": _sdpa}
    plain |= {f"ours {name}": _attend(name, None) for name in backends}
    yield Case(**common, label=label, sides=plain, check=close)

    biased: dict[str, Run] = {"SDPA, additive mask": lambda q, k, v: _sdpa(q, k, v, mask), "SDPA, no bias": _sdpa}
    biased["ToMe"] = lambda q, k, v: tome_attention(q, k, v, size)
    biased |= {f"ours {name}": _attend(name, key_bias) for name in backends}
    yield Case(
        **common, label=f"{label} key bias", sides=biased, compiled=("ToMe",),
        check=lambda name, got, want: None if name == "SDPA, no bias" else close(name, got, want),
    )  # fmt: skip


def cross_entropy_cases(
    num_tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Build the loss of a language-model head, with and without a tensor of all logits."""
    hidden = torch.randn(num_tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype) * width**-0.5
    labels = torch.randint(0, vocabulary, (num_tokens,), device=device)
    flops = 2.0 * num_tokens * width * vocabulary
    yield Case(
        op=Op.linear_cross_entropy, label=f"T={num_tokens} C={width} V={vocabulary}", dtype=dtype,
        inputs=(hidden, weight), compiled=("full logits",), check=expect_close(atol=_tolerance(dtype)), num_grads=2,
        sides={
            "full logits": lambda hidden, weight: F.cross_entropy((hidden @ weight.T).float(), labels),
            "chunked": lambda hidden, weight: linear_cross_entropy(hidden, weight, labels),
        },
        num_bytes=float((hidden.numel() + weight.numel()) * hidden.element_size()),
        flops=flops, backward_flops=2 * flops,
    )  # fmt: skip


def _on_each(backends: Sequence[str], run: Run) -> dict[str, Run]:
    """Make a side of each backend, which `run` takes as its last argument."""

    def on(backend: str) -> Run:
        return lambda *inputs: run(*inputs, backend)

    return {backend: on(backend) for backend in backends}


def _our_step(keys: Tensor, x: Tensor, size: Tensor, r: int, backend: str) -> tuple[Tensor, Tensor]:
    match = match_tokens(key_metric(keys), r, class_token=True, backend=backend)
    return merge_tokens(x, size, match, backend=backend)


def _tome_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, size: Tensor, pairs: TomePairs
) -> tuple[Tensor, Tensor, Tensor]:
    merged, size = tome_merge(x + residual, size, pairs)
    return merged, F.layer_norm(merged, merged.shape[-1:], weight, bias, 1e-5), size


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _attend(backend: str, key_bias: Tensor | None) -> Run:
    return lambda q, k, v: attention(q, k, v, key_bias=key_bias, backend=backend)


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-4, torch.float16: 1e-2}.get(dtype, 4e-2)


def _check_pairs(metric: Tensor, r: int) -> Check:
    """Equal up to rounding: in float64 the chosen pairs score what the r best pairs score."""
    unit = F.normalize(metric.double(), dim=-1)
    scores = unit[:, 0::2] @ unit[:, 1::2].mT
    scores[:, 0] = -torch.inf
    best = scores.amax(dim=-1).sort(dim=-1, descending=True).values[:, :r]

    def check(name: str, got: Any, want: Any) -> None:
        source, destination = (
            (got.src_idx, got.dst_idx) if isinstance(got, Matching) else (got.source[..., 0], got.destination[..., 0])
        )
        chosen = scores.gather(1, source[..., None].expand(-1, -1, scores.shape[2])).gather(2, destination[..., None])
        expect_close(atol=1e-5)(name, chosen[..., 0], best)

    return check


def _check_sizes(size: Tensor) -> Check:
    def check(name: str, got: Any, want: Any) -> None:
        features, sizes = got
        if not torch.isfinite(features).all() or not torch.equal(sizes.float().sum(1), size.sum(1)):
            raise WrongResultError(f"{name}: got sizes that sum to {sizes.sum().item()}, want {size.sum().item()}")

    return check
