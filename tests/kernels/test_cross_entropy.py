"""Chunked cross-entropy of a linear head against the one with all logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aurora.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def draw(num_rows: int, width: int, vocab: int, dtype: torch.dtype, *, labelled: float = 0.6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * width**-0.5 * 3).to(dtype)
    labels = torch.randint(vocab, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) > labelled] = -100
    labels[0] = 0
    return [hidden.requires_grad_(), weight.requires_grad_(), labels]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize(("num_rows", "width", "vocab"), [(1, 3, 2), (67, 24, 101), (130, 16, 1)])
def test_equals_the_full_formulation(num_rows: int, width: int, vocab: int, chunk: int) -> None:
    hidden, weight, labels = draw(num_rows, width, vocab, torch.float32)
    got = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    want = linear_cross_entropy_reference(hidden, weight, labels)
    assert got.dtype == torch.float32
    assert (got - want).abs() <= 1e-6 * max(1.0, want.abs().item())
    upstream = torch.tensor(1.7)
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden, weight), upstream),
        torch.autograd.grad(want, (hidden, weight), upstream),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_half_precision_is_as_exact_as_the_full_formulation(dtype: torch.dtype) -> None:
    hidden, weight, labels = draw(300, 64, 500, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want_loss = linear_cross_entropy_reference(*exact, labels)
    want = (want_loss, *torch.autograd.grad(want_loss, exact))
    errors = []
    for op in (linear_cross_entropy, linear_cross_entropy_reference):
        loss = op(hidden, weight, labels)
        results = (loss, *torch.autograd.grad(loss, (hidden, weight)))
        errors.append([(a.double() - b).abs().max().item() for a, b in zip(results, want, strict=True)])
    ulp = torch.finfo(dtype).eps
    for ours, theirs, exact_value in zip(*errors, want, strict=True):
        assert ours <= max(2 * theirs, 4 * ulp * exact_value.abs().max().item())


def test_gradcheck() -> None:
    hidden, weight, labels = draw(9, 4, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, chunk=4), (hidden, weight))


def test_unlabelled_rows_do_not_count() -> None:
    hidden, weight, labels = draw(40, 8, 11, torch.float32, labelled=0.5)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=8)
    loss.backward()
    assert hidden.grad is not None
    assert (hidden.grad[labels == -100] == 0).all()
    assert (hidden.grad[labels != -100].abs().sum(1) > 0).all()
    kept = labels != -100
    assert torch.allclose(linear_cross_entropy(hidden[kept], weight, labels[kept], chunk=8), loss)
    renamed = linear_cross_entropy(hidden, weight, labels.masked_fill(~kept, 10), ignore_index=10, chunk=8)
    assert renamed == linear_cross_entropy(hidden, weight, labels.masked_fill(labels == 10, -100), chunk=8)


def test_no_label_at_all_is_nan_as_in_pytorch_with_zero_gradients() -> None:
    hidden, weight, labels = draw(5, 8, 11, torch.float32)
    labels[:] = -100
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.isnan()
    assert linear_cross_entropy_reference(hidden, weight, labels).isnan()
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert (dhidden == 0).all()
    assert (dweight == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_gradient(frozen: str) -> None:
    hidden, weight, labels = draw(20, 8, 11, torch.float32)
    inputs = {"hidden": hidden, "weight": weight}
    inputs[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).backward()
    for name, x in inputs.items():
        assert (x.grad is None) == (name == frozen)


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest block that any operation inside `run` asks for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_tensor_is_as_large_as_the_logits_and_none_is_kept() -> None:
    num_rows, width, vocab, chunk = 512, 16, 2000, 32
    hidden, weight, labels = draw(num_rows, width, vocab, torch.float32, labelled=1.0)
    kept: list[int] = []

    def train(op: Callable[..., Tensor], **options: int) -> None:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            loss = op(hidden, weight, labels, **options)
        loss.backward()

    assert largest_allocation(lambda: train(linear_cross_entropy_reference)) == 4 * num_rows * vocab
    assert sum(kept) >= num_rows * vocab
    assert largest_allocation(lambda: train(linear_cross_entropy, chunk=chunk)) == 4 * chunk * vocab
    assert sum(kept) <= hidden.numel() + weight.numel() + 2 * num_rows


def test_autocast_computes_in_half_precision_both_ways() -> None:
    hidden, weight, labels = draw(50, 32, 40, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
        want = linear_cross_entropy_reference(hidden, weight, labels)
    assert torch.allclose(loss, want, atol=1e-3)
    assert loss != linear_cross_entropy(hidden, weight, labels)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    want_hidden, want_weight = torch.autograd.grad(want, (hidden, weight))
    assert dhidden.dtype == dweight.dtype == torch.float32
    assert (dhidden - want_hidden).abs().max() < 0.02 * want_hidden.abs().max()
    assert (dweight - want_weight).abs().max() < 0.02 * want_weight.abs().max()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_it_compiles_into_one_graph(compiler: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, labels = (x.detach().to(device) for x in draw(33, 8, 11, torch.float32))
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=compiler)
    got, want = (op(*inputs, labels, chunk=8) for op in (compiled, linear_cross_entropy))
    assert torch.allclose(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        assert torch.allclose(a, b)


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, labels = draw(4, 3, 5, torch.float32)
    with pytest.raises(ValueError, match=r"hidden \(4, 3\), weight \(5, 2\)"):
        linear_cross_entropy(hidden, weight[:, :2], labels)
    with pytest.raises(ValueError, match="one type"):
        linear_cross_entropy(hidden, weight.half(), labels)
    with pytest.raises(ValueError, match="chunk=0"):
        linear_cross_entropy(hidden, weight, labels, chunk=0)
