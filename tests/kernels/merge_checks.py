"""How merge kernels are checked, on a GPU and in the interpreter: inputs in NaN, outputs between guards, bounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.kernels.cases import MergeCase, MergeInputs
from aurora.kernels.common import HAS_TRITON, INTERPRETED
from aurora.kernels.merge import MergedTokens, match_tokens, merge_step

DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="Triton neither compiles nor interprets here"
)
GUARD = 7
"""Elements around everything a kernel touches."""
SENTINEL = 2**30 + 12345
"""What integers are filled with: as an index it crashes, as a result it is noticed."""


def _filler(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else SENTINEL


def poisoned(tensor: Tensor, *, rows: bool = True) -> Tensor:
    """The same values inside a larger buffer of NaN; with `rows` every row has its own guard, and strides are odd."""
    if not rows or tensor.ndim < 3:
        buffer = tensor.new_full((tensor.numel() + 2 * GUARD,), _filler(tensor.dtype))
        inside = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    elif tensor.stride(-1) != 1:  # keep the last dimension strided
        return poisoned(tensor.mT).mT
    else:
        buffer = tensor.new_full((tensor.shape[0], tensor.shape[1] + 2, tensor.shape[2] + GUARD), _filler(tensor.dtype))
        inside = buffer[:, 1:-1, 2 : 2 + tensor.shape[2]]
    return inside.copy_(tensor)


def poison(inputs: MergeInputs) -> MergeInputs:
    return MergeInputs(*(poisoned(tensor) for tensor in inputs))


@contextmanager
def guarded_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every `new_empty` and `empty_like` gives NaN between guard bands, which must be whole at the end."""
    buffers: list[tuple[Tensor, int]] = []

    def new_empty(tensor: Tensor, *shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        count = size.numel()
        dtype = dtype or tensor.dtype
        buffer = torch.full((count + 2 * GUARD,), _filler(dtype), dtype=dtype, device=tensor.device)
        buffers.append((buffer, count))
        return buffer[GUARD : GUARD + count].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty_like", lambda tensor: new_empty(tensor, tensor.shape))
        yield
    assert buffers, "nothing was allocated where the test looks"
    for buffer, count in buffers:
        for band in (buffer[:GUARD], buffer[GUARD + count :]):
            clean = band.isnan() if buffer.dtype.is_floating_point else band == SENTINEL
            assert clean.all(), f"a kernel wrote outside of an output of {count} elements: {band.tolist()}"


def assert_as_good(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the error of eager PyTorch in the same type, or 4 ulp of the largest value."""
    assert got.shape == eager.shape, name
    assert got.dtype == eager.dtype, name
    if got.numel() == 0:
        return
    dtype = got.dtype
    got, eager, exact = got.detach().double(), eager.detach().double(), exact.detach().double()
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum().item()} values are not finite"
    error, allowed = (got - exact).abs(), (eager - exact).abs().max().item()
    floor = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
    bound = 2 * allowed + floor
    if error.max().item() > bound:
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name} at {worst}: {got[worst].item():.8g}, exact {exact[worst].item():.8g}, bound {bound:.3g}; "
            f"{(error > bound).sum().item()} of {error.numel()} over it, RMS ratio "
            f"{(error.pow(2).mean() / exact.pow(2).mean()).sqrt().item():.3g}"
        )


def assert_same_matching(case: MergeCase, metric: Tensor) -> None:
    """Selected sets and their order are equal, not close."""
    got, want = (
        match_tokens(metric, case.r, class_token=case.class_token, backend=backend) for backend in ("triton", "torch")
    )
    assert got.num_tokens == want.num_tokens
    for name in ("src_idx", "dst_idx", "unmerged_idx"):
        one, two = getattr(got, name), getattr(want, name)
        assert one.dtype == torch.int64
        assert torch.equal(one, two), f"{name}: {one.tolist()} but {two.tolist()}"
    torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=1e-6)


def run_step(
    case: MergeCase, inputs: MergeInputs, backend: str, *, residual: bool = True, norm: bool = True, bias: bool = True
) -> dict[str, Tensor]:
    """Outputs and all gradients of one merge, by name; the gradients that come in are drawn from a fixed seed."""
    match = match_tokens(inputs.metric, case.r, class_token=case.class_token, backend="torch")
    leaves = {"x": inputs.x, "residual": inputs.residual, "weight": inputs.weight, "bias": inputs.bias}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    done: MergedTokens = merge_step(
        leaves["x"],
        inputs.size,
        match,
        residual=leaves["residual"] if residual else None,
        weight=leaves["weight"] if norm else None,
        bias=leaves["bias"] if norm and bias else None,
        backend=backend,
    )
    generator = torch.Generator().manual_seed(5)
    outputs = [done.x] if done.normed is None else [done.x, done.normed]
    grads = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
    torch.autograd.backward(outputs, [poisoned(grad) for grad in grads])
    results = {"merged": done.x, "size": done.size, "log_size": done.log_size}
    if done.normed is not None:
        results["normed"] = done.normed
    assert not done.size.requires_grad
    return results | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def check_step(case: MergeCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **parts: bool) -> None:
    """Forward and backward of the kernels against the reference in the same type and in float64."""
    inputs = case.make(dtype, device=DEVICE)
    with guarded_allocations(monkeypatch):
        got = run_step(case, poison(inputs), "triton", **parts)
    eager = run_step(case, inputs, "torch", **parts)
    wide = MergeInputs(inputs.metric, *(tensor.double() for tensor in inputs[1:]))
    exact = run_step(case, wide, "torch", **parts)
    assert got.keys() == eager.keys() == exact.keys()
    assert torch.equal(got["size"], eager["size"])
    for name in got:
        assert_as_good(name, got[name], eager[name], exact[name])
