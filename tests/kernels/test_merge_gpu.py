"""Merge kernels on a GPU: bfloat16, AuroraCap's shapes, the same bits each run, graphs.

`pytest -m gpu` without a GPU runs what the interpreter can: small shapes, and bfloat16 within its truncating store.
"""

from __future__ import annotations

import pytest
import torch

from aurora.kernels.cases import MERGE_CASES, MERGE_CASES_7B, MERGE_CASES_TILES, MergeCase, Values
from aurora.kernels.dispatch import use
from aurora.kernels.merge import key_metric, match_tokens, merge_step, merge_tokens, merge_tokens_norm
from tests.kernels.merge_checks import DEVICE, assert_same_matching, check_step, needs_triton, run_step

pytestmark = [pytest.mark.gpu, needs_triton]
needs_device = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: too large for the interpreter")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = MergeCase(rows=2, num_tokens=29, width=24, metric_width=16, r=9, values=Values.ties)
LARGE = [pytest.param(case, marks=needs_device) for case in MERGE_CASES_TILES + MERGE_CASES_7B]


def case_id(value: object) -> str:
    return value.id if isinstance(value, MergeCase) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", [*MERGE_CASES, *LARGE], ids=case_id)
def test_the_same_pairs_in_the_same_order(case: MergeCase, dtype: torch.dtype) -> None:
    assert_same_matching(case, case.make(dtype, device=DEVICE).metric)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", [*MERGE_CASES, *LARGE], ids=case_id)
def test_forward_and_gradients(case: MergeCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_step(case, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", [SMALL, *LARGE], ids=case_id)
def test_the_same_bits_each_run(case: MergeCase, dtype: torch.dtype) -> None:
    inputs = case.make(dtype, device=DEVICE)
    first, *others = (run_step(case, inputs, "triton") for _ in range(3 if DEVICE == "cpu" else 10))
    for other in others:
        for name in first:
            assert torch.equal(first[name], other[name]), name
    matches = [
        match_tokens(inputs.metric, case.r, class_token=case.class_token, backend="triton") for _ in range(len(others))
    ]
    for match in matches[1:]:
        for one, two in zip(matches[0][:4], match[:4], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", ["match", "merge", "norm", "step"])
def test_each_public_op_compiles_to_one_graph(op: str, backend: str) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    inputs = SMALL.make(dtype, device=DEVICE)
    match = match_tokens(inputs.metric, SMALL.r, class_token=True, backend="torch")

    def run(metric: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        if op == "match":
            return list(match_tokens(metric, SMALL.r, class_token=True, backend=backend)[:4])
        if op == "merge":
            return list(merge_tokens(x, inputs.size, match, backend=backend))
        if op == "norm":
            norm = (inputs.weight, inputs.bias, 1e-5)
            return list(merge_tokens_norm(x, inputs.residual, inputs.size, match, *norm, backend=backend))
        done = merge_step(x, inputs.size, match, residual=inputs.residual, backend=backend)
        return [done.x, done.size, done.log_size]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    results = []
    for side in (run, compiled):
        x = inputs.x.clone().requires_grad_()
        outputs = side(inputs.metric, x)
        if op != "match":
            outputs[0].float().square().sum().backward()
            outputs.append(x.grad)
        results.append(outputs)
    for got, want in zip(*results, strict=True):
        tolerance = 0.0 if not got.is_floating_point() else 4 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=8 * tolerance)


@needs_device
def test_auto_takes_the_kernels_on_a_gpu() -> None:
    from aurora.kernels import report, reset_report

    reset_report()
    inputs = SMALL.make(torch.bfloat16, device=DEVICE)
    match = match_tokens(inputs.metric, SMALL.r, class_token=True)
    merge_tokens(inputs.x, inputs.size, match)
    assert [(row["op"], row["backend"]) for row in report()] == [("match_tokens", "triton"), ("merge_tokens", "triton")]


@needs_device
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_cuda_graph_holds_a_whole_layer(backend: str) -> None:
    case = MERGE_CASES_7B[0]
    inputs = case.make(torch.bfloat16, device=DEVICE)
    keys = torch.randn(8, 730, 16, 80, device=DEVICE, dtype=torch.bfloat16)

    def layer() -> tuple[torch.Tensor, ...]:
        match = match_tokens(key_metric(keys), case.r, class_token=True)
        norm = (inputs.weight, inputs.bias, 1e-5)
        return merge_tokens_norm(inputs.x, inputs.residual, inputs.size, match, *norm)

    with use(backend), torch.no_grad():
        want = layer()  # compiles and tunes
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for got, one in zip(captured, want, strict=True):
        assert torch.equal(got, one)


@needs_device
def test_tensors_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = SMALL.make(torch.bfloat16, device="cuda:1")
    match = match_tokens(inputs.metric, SMALL.r, class_token=True, backend="triton")
    merged, _ = merge_tokens(inputs.x, inputs.size, match, backend="triton")
    want, _ = merge_tokens(inputs.x, inputs.size, match, backend="torch")
    torch.testing.assert_close(merged, want)
