"""The PyTorch path of matching and merging: its gradient, its graphs, its independence of autocast and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from aurora.kernels.cases import MERGE_CASES, MergeCase, Values
from aurora.kernels.merge import (
    Matching,
    _sum_groups,
    key_metric,
    match_tokens,
    merge_step,
    merge_tokens,
    merge_tokens_norm,
    merged_positions,
)

pytestmark = pytest.mark.usefixtures("torch_kernels")


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_KERNELS", "torch")


def plain_merge(x: Tensor, size: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
    """The merge as one matrix product: slow, and too simple to be wrong."""
    member = torch.nn.functional.one_hot(merged_positions(match), x.shape[1] - match.src_idx.shape[1]).to(x.dtype)
    weight = (member * size.to(x.dtype)).mT  # (B, N - R, N)
    return weight @ x / weight.sum(-1, keepdim=True), weight.sum(-1, keepdim=True).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", MERGE_CASES, ids=lambda case: case.id)
def test_forward_and_gradient_equal_a_matrix_product(case: MergeCase, dtype: torch.dtype) -> None:
    inputs = case.make(dtype)
    match = match_tokens(inputs.metric, case.r, class_token=case.class_token)
    if match.src_idx.shape[1] == 0:
        assert merge_tokens(inputs.x, inputs.size, match)[0] is inputs.x
        return
    results = []
    grad = torch.linspace(-1, 1, inputs.x.numel(), dtype=dtype).view_as(inputs.x)[:, match.src_idx.shape[1] :]
    for merge, kind in ((merge_tokens, dtype), (plain_merge, torch.float64)):
        x = inputs.x.detach().to(kind, copy=True).requires_grad_()
        merged, size = merge(x, inputs.size, match)
        assert merged.dtype == kind
        merged.backward(grad.to(kind))
        results.append((merged.double(), size, x.grad.double()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3 if dtype == torch.float16 else 5e-6)


@pytest.mark.parametrize("class_token", [True, False])
def test_gradcheck_in_float64(class_token: bool) -> None:
    case = MergeCase(rows=2, num_tokens=11, width=3, metric_width=4, r=4, class_token=class_token, values=Values.ties)
    inputs = case.make(torch.float64)
    match = match_tokens(inputs.metric, case.r, class_token=class_token)
    assert match.dst_idx[0].unique().numel() < 4, "several sources in one token"
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.residual, inputs.weight, inputs.bias)]

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return merge_tokens_norm(x, residual, inputs.size, match, weight, bias, 1e-5)[:2]

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(lambda x: merge_tokens(x, inputs.size, match)[0], [inputs.x])


def test_only_merged_tokens_are_touched() -> None:
    inputs = MERGE_CASES[8].make(torch.float16)
    match = match_tokens(inputs.metric, 3, class_token=True)
    size = inputs.size * 3  # x * 3 / 3 would round
    merged, _ = merge_tokens(inputs.x, size, match)
    source = merged_positions(match)
    alone = torch.nn.functional.one_hot(source).sum(1) == 1
    kept = alone.gather(1, source)
    assert kept.sum() > 10
    assert torch.equal(merged.gather(1, source[..., None].expand_as(inputs.x))[kept], inputs.x[kept])


def test_sizes_carry_no_gradient() -> None:
    inputs = MERGE_CASES[8].make(torch.float32)
    match = match_tokens(inputs.metric, 3, class_token=True)
    done = merge_step(inputs.x.requires_grad_(), inputs.size, match, weight=inputs.weight)
    assert done.x.requires_grad
    assert done.normed is not None
    assert done.normed.requires_grad
    assert not done.size.requires_grad
    assert not done.log_size.requires_grad
    assert torch.equal(done.log_size, done.size[..., 0].log())


def test_autocast_changes_neither_pairs_nor_types() -> None:
    case = MergeCase(rows=2, num_tokens=101, width=16, metric_width=80, r=20, values=Values.smooth)
    inputs = case.make(torch.float32)
    plain = match_tokens(inputs.metric, 20, class_token=True)
    want = merge_tokens_norm(inputs.x, None, inputs.size, plain, inputs.weight, inputs.bias, 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = match_tokens(inputs.metric, 20, class_token=True)
        got = merge_tokens_norm(inputs.x, None, inputs.size, cast, inputs.weight, inputs.bias, 1e-5)
        half = merge_tokens_norm(inputs.x.half(), None, inputs.size, cast, inputs.weight, inputs.bias, 1e-5)
    for one, two in zip((*plain[:4], *want), (*cast[:4], *got), strict=True):
        assert torch.equal(one, two)
    assert half[0].dtype == half[1].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_key_metric_is_the_float32_mean_over_heads(dtype: torch.dtype) -> None:
    keys = torch.randn(3, 17, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    metric = key_metric(keys.requires_grad_())
    assert metric.dtype == torch.float32
    assert not metric.requires_grad
    torch.testing.assert_close(metric, keys.detach().float().mean(2), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"keys: got shape \(3, 17, 4\)"):
        key_metric(keys[..., 0])
    strided = keys.detach().transpose(0, 1)  # as a slice of fused projections is
    torch.testing.assert_close(key_metric(strided), metric.transpose(0, 1), rtol=0, atol=1e-7)
    assert key_metric(keys[:0]).shape == (0, 17, 8)


def test_the_same_bits_again_and_with_two_threads() -> None:
    case = MergeCase(rows=3, num_tokens=201, width=48, metric_width=16, r=90, values=Values.ties)
    inputs = case.make(torch.float32)
    match = match_tokens(inputs.metric, case.r, class_token=True)
    first, _ = merge_tokens(inputs.x, inputs.size, match)
    torch.set_num_threads(2)
    try:
        again = [merge_tokens(inputs.x, inputs.size, match)[0] for _ in range(3)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first, one) for one in again)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    x, size = torch.randn(2, 9, 4), torch.ones(2, 9, 1)
    match = match_tokens(x, 3, class_token=True)
    for args, words in (
        ((x, size[:1], match), r"size: got shape \(1, 9, 1\), want \(2, 9, 1\)"),
        ((x, size[..., 0], match), r"size: got shape \(2, 9\)"),
        ((x[:1], size[:1], match), "match: got 2 rows, want the 1 of x"),
        ((x[:, :8], size[:, :8], match), "got 8 tokens, want the 9"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_tokens(*args)
    with pytest.raises(ValueError, match=r"residual: got shape \(2, 9, 3\)"):
        merge_step(x, size, match, residual=x[..., :3])


def test_thirty_one_token_counts_need_few_graphs() -> None:
    # One layer after the other has another N; a graph for each would pass torch's limit and stay eager.
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def layer(keys: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        match = match_tokens(key_metric(keys), 2, class_token=True)
        merged, normed, size = merge_tokens_norm(x, x, size, match, torch.ones(4), None, 1e-5)
        return merged + normed, size

    x, size = torch.randn(2, 73, 4), torch.ones(2, 73, 1)
    for number in range(31):
        keys = torch.randn(2, x.shape[1], 2, 4, generator=torch.Generator().manual_seed(number))
        x, size = layer(keys, x, size)
    assert x.shape[1] == 73 - 62
    assert counter.frame_count <= 3, f"{counter.frame_count} graphs"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    # On a CPU float32 merges in bags, other types by gather, and a compiler sums the groups in its own way.
    inputs = MergeCase(rows=2, num_tokens=37, width=12, metric_width=16, r=15, values=Values.ties).make(dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        match = match_tokens(inputs.metric, 15, class_token=True)
        return merge_tokens_norm(x, inputs.residual, inputs.size, match, inputs.weight, inputs.bias, 1e-5)[:2]

    torch.compiler.reset()
    grads = []
    for side in (run, torch.compile(run, fullgraph=True)):
        x = inputs.x.clone().requires_grad_()
        outputs = side(x)
        sum((out.float() * out).sum() for out in outputs).backward()
        grads.append((*outputs, x.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=4 * tolerance)


def test_groups_are_summed_alike_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    dst = torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(0))
    same = dst[:, :, None] == dst[:, None, :]
    weighted = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(1))
    on_cpu = _sum_groups(same, weighted)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: torch.device("cuda")))
    on_cuda = _sum_groups(same, weighted)
    monkeypatch.undo()
    want = torch.stack([torch.stack([w[d == one].sum(0) for one in d]) for d, w in zip(dst, weighted, strict=True)])
    for got in (on_cpu, on_cuda):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_bad_token_spoils_no_other(dtype: torch.dtype) -> None:
    inputs = MERGE_CASES[8].make(dtype)
    match = match_tokens(inputs.metric, 3, class_token=True)
    went = merged_positions(match)
    want, _ = merge_tokens(inputs.x, inputs.size, match)
    for bad in (torch.nan, torch.inf):
        x = inputs.x.clone()
        x[:, 4] = bad
        got, _ = merge_tokens(x, inputs.size, match)
        spoilt = torch.zeros(got.shape[:2], dtype=torch.bool).scatter_(1, went[:, 4:5], True)
        assert torch.equal(got.isfinite().all(-1), ~spoilt)
        assert torch.equal(got[~spoilt], want[~spoilt])
