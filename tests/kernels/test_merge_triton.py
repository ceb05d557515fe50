"""Triton kernels of matching and merging against the PyTorch reference; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from aurora.kernels.cases import MERGE_CASE_FRAME, MERGE_CASES, MERGE_CASES_TILES, MergeCase, Values
from aurora.kernels.dispatch import KernelUnavailable, use
from aurora.kernels.merge import match_tokens, merge_step, merge_tokens, merge_tokens_norm, merged_positions
from tests.golden import assert_close_to_golden, load_index, load_tensors
from tests.kernels.merge_checks import (
    DEVICE,
    assert_same_matching,
    check_step,
    guarded_allocations,
    needs_triton,
    poisoned,
    run_step,
)

pytestmark = needs_triton

DTYPES = [torch.float32, torch.float16]
SMALL = MergeCase(rows=2, num_tokens=13, width=12, metric_width=8, r=5)


def case_id(value: object) -> str:
    return value.id if isinstance(value, MergeCase) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", MERGE_CASES + MERGE_CASES_TILES, ids=case_id)
def test_the_same_pairs_in_the_same_order(case: MergeCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = poisoned(case.make(dtype, device=DEVICE).metric)
    with guarded_allocations(monkeypatch):
        assert_same_matching(case, metric)


@pytest.mark.parametrize(
    ("case", "dtype"),
    # In float16 the interpreter takes as long again; every third case holds each kind of input.
    [
        pytest.param(case, dtype, marks=[pytest.mark.slow] if dtype == torch.float16 and number % 3 else [])
        for number, case in enumerate(MERGE_CASES)
        for dtype in DTYPES
    ],
    ids=case_id,
)
def test_forward_and_gradients(case: MergeCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_step(case, dtype, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MERGE_CASES_TILES, MERGE_CASE_FRAME], ids=case_id)
def test_forward_and_gradients_of_large_cases(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    check_step(case, torch.float32, monkeypatch)


@pytest.mark.slow
def test_the_same_pairs_in_a_whole_frame() -> None:
    assert_same_matching(MERGE_CASE_FRAME, MERGE_CASE_FRAME.make(torch.float32, device=DEVICE).metric)


@pytest.mark.parametrize("parts", [{"norm": False}, {"residual": False}, {"bias": False}], ids=str)
def test_parts_can_be_left_out(parts: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    check_step(SMALL, torch.float32, monkeypatch, **parts)


def test_bfloat16_is_stored_and_read() -> None:
    # The interpreter truncates where a device rounds, so the bound is two ulp; the arithmetic is float32 anyway.
    inputs = SMALL.make(torch.bfloat16, device=DEVICE)
    assert_same_matching(SMALL, inputs.metric)
    got, want = (run_step(SMALL, inputs, backend) for backend in ("triton", "torch"))
    for name in ("merged", "normed", "dx"):
        assert got[name].dtype == torch.bfloat16
        error = (got[name].float() - want[name].float()).abs().max()
        assert error <= 2 * 2**-7 * want[name].float().abs().max()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=case_id)
def test_a_residual_of_another_type_is_added_in_the_wider_one(x_dtype: torch.dtype) -> None:
    # Autocast: the stream is float32 and what attention adds to it is not.
    inputs = SMALL.make(torch.float32, device=DEVICE)
    other = torch.float16 if x_dtype == torch.float32 else torch.float32
    inputs = inputs._replace(x=inputs.x.to(x_dtype), residual=inputs.residual.to(other))
    got, want = (run_step(SMALL, inputs, backend) for backend in ("triton", "torch"))
    assert got["merged"].dtype == want["merged"].dtype == torch.float32
    for name in want:
        assert got[name].dtype == want[name].dtype
        torch.testing.assert_close(got[name], want[name], rtol=2e-3, atol=2e-3 if "d" in name[:1] else 1e-5)


@pytest.mark.parametrize("class_token", [True, False])
def test_nan_in_the_metric_leaves_valid_indices(class_token: bool) -> None:
    # An index out of range would let the merge read and write anywhere.
    metric = SMALL.make(torch.float32, device=DEVICE).metric
    metric[0, 3], metric[0, 8], metric[1] = torch.nan, torch.nan, torch.nan
    for r in (0, 4, 6):
        match = match_tokens(metric, r, class_token=class_token, backend="triton")
        order = torch.cat([match.src_idx, match.unmerged_idx], dim=1)
        assert torch.equal(order.sort(dim=1).values, torch.arange(7, device=DEVICE).expand(2, -1))
        assert ((match.dst_idx >= 0) & (match.dst_idx < 6)).all()
        assert not (class_token and (match.src_idx == 0).any())


@pytest.mark.parametrize("name", [name for name in sorted(load_index("merge_index")) if name not in "cdhno"])
def test_goldens(name: str) -> None:
    index, golden = load_index("merge_index")[name], load_tensors(f"merge_{name}")
    golden = {key: tensor.to(DEVICE) for key, tensor in golden.items()}
    size = golden.get("size_in", torch.ones(*golden["metric"].shape[:2], 1, device=DEVICE))
    with use("triton"):
        x = golden["x"]
        for suffix in ("", "2"):
            match = match_tokens(golden[f"metric{suffix}"], index["r"], class_token=index["class_token"])
            x, size = merge_tokens(x, size, match)
            assert_close_to_golden(x, golden[f"x_out{suffix}"].cpu())
            assert torch.equal(size, golden[f"size_out{suffix}"])


def test_the_kernel_reports_where_tokens_went() -> None:
    inputs = SMALL.make(torch.float32, device=DEVICE)
    match = match_tokens(inputs.metric, 5, class_token=True, backend="triton")
    *_, positions = torch.ops.aurora.merge_tokens(inputs.x, None, inputs.size, *match[:3], None, None, 0.0)
    assert torch.equal(positions.long(), merged_positions(match))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_the_fused_op_equals_its_parts(dtype: torch.dtype) -> None:
    inputs = SMALL.make(dtype, device=DEVICE)
    with use("triton"):
        match = match_tokens(inputs.metric, SMALL.r, class_token=True)
        merged, size = merge_tokens(inputs.x + inputs.residual, inputs.size, match)
        x, normed, fused_size = merge_tokens_norm(
            inputs.x, inputs.residual, inputs.size, match, inputs.weight, inputs.bias, 1e-5
        )
    assert torch.equal(x, merged)  # the sum is rounded before it is merged, as if it had been stored
    assert torch.equal(fused_size, size)
    want = torch.nn.functional.layer_norm(merged, (SMALL.width,), inputs.weight, inputs.bias, 1e-5)
    torch.testing.assert_close(normed, want)


@pytest.mark.slow
def test_operators_keep_their_promises_to_torch() -> None:
    inputs = SMALL.make(torch.float32, device=DEVICE)
    ops = torch.ops.aurora
    torch.library.opcheck(ops.match_tokens.default, (inputs.metric, 5, True))
    match = match_tokens(inputs.metric, 5, class_token=True, backend="torch")
    args = (inputs.x.requires_grad_(), inputs.residual, inputs.size, *match[:3], inputs.weight, inputs.bias, 1e-5)
    torch.library.opcheck(ops.merge_tokens.default, args)
    torch.library.opcheck(ops.merge_tokens.default, (inputs.x, None, inputs.size, *match[:3], None, None, 1e-5))


def test_each_public_op_is_one_graph() -> None:
    inputs = SMALL.make(torch.float32, device=DEVICE)

    def step(metric: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        match = match_tokens(metric, 5, class_token=True, backend="triton")
        x, size = merge_tokens(x, inputs.size, match, backend="triton")
        done = merge_step(residual, inputs.size, match, backend="triton")
        merged, normed, _ = merge_tokens_norm(
            residual, residual, inputs.size, match, inputs.weight, inputs.bias, 1e-5, backend="triton"
        )
        return (x + done.x * size + merged * normed).sum() + done.log_size.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (step, compiled):
        x, residual = inputs.x.clone().requires_grad_(), inputs.residual.clone().requires_grad_()
        run(inputs.metric, x, residual).backward()
        grads.append((x.grad, residual.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_what_a_kernel_cannot_serve_is_refused_with_the_reason() -> None:
    inputs = SMALL.make(torch.float32, device=DEVICE)
    match = match_tokens(inputs.metric, 5, class_token=True)
    for call, words in (
        (lambda: match_tokens(inputs.metric.double(), 5, class_token=True), "match_tokens: metric is float64"),
        (lambda: match_tokens(torch.zeros(1, 9, 300, device=DEVICE), 5, class_token=True), "wider than 256"),
        (lambda: match_tokens(torch.zeros(1, 9000, 1, device=DEVICE), 5, class_token=True), "more than 8192 tokens"),
        (lambda: merge_tokens(inputs.x.double(), inputs.size, match), "merge_tokens: x is float64"),
        (lambda: merge_step(inputs.x, inputs.size, match, residual=inputs.x.double()), "residual is float64"),
    ):
        with use("triton"), pytest.raises(KernelUnavailable, match=words):
            call()


@pytest.mark.parametrize("values", [Values.ties, Values.equal, Values.zeros], ids=lambda value: value.value)
def test_two_runs_give_the_same_bits(values: Values) -> None:
    case = MergeCase(rows=1, num_tokens=15, width=12, metric_width=4, r=7, values=values)
    first, second = (run_step(case, case.make(torch.float32, device=DEVICE), "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
