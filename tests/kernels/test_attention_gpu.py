"""The attention kernel on a GPU: bfloat16, the shapes of the models, the same bits every time, one compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aurora.kernels.attention import attention, attention_reference
from aurora.kernels.cases import ATTENTION_CASES, ATTENTION_MODEL_CASES, AttentionCase, attention_inputs
from tests.kernels.test_attention import assert_as_exact_as_eager, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", [*ATTENTION_CASES, *ATTENTION_MODEL_CASES], ids=lambda c: c.name)
def test_bfloat16_kernel_equals_the_reference(case: AttentionCase) -> None:
    inputs = attention_inputs(case, torch.bfloat16, device="cuda")
    assert_as_exact_as_eager(case, run(attention, case, inputs, backend="triton"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_a_frame_in_the_other_types(dtype: torch.dtype) -> None:
    case = next(case for case in ATTENTION_MODEL_CASES if case.name == "vit_one_frame")
    inputs = attention_inputs(case, dtype, device="cuda")
    assert_as_exact_as_eager(case, run(attention, case, inputs, backend="triton"), inputs)


@pytest.mark.parametrize("case", ATTENTION_MODEL_CASES, ids=lambda c: c.name)
def test_results_repeat_bit_for_bit(case: AttentionCase) -> None:
    inputs = attention_inputs(case, torch.bfloat16, device="cuda")
    first = run(attention, case, inputs, backend="triton")
    for _ in range(5):
        again = run(attention, case, inputs, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_op_runs_inside_a_cuda_graph() -> None:
    case = next(case for case in ATTENTION_MODEL_CASES if case.name == "vit_172_bias")
    inputs = attention_inputs(case, torch.bfloat16, device="cuda")
    q, k, v, bias = (inputs[name] for name in ("q", "k", "v", "key_bias"))
    assert q is not None
    assert k is not None
    assert v is not None
    want = attention(q, k, v, key_bias=bias, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, key_bias=bias, backend="triton")
    graph.replay()
    assert torch.equal(out, want)


def test_the_compiled_op_equals_the_eager_one() -> None:
    case = next(case for case in ATTENTION_MODEL_CASES if case.name == "vit_449_bias")
    inputs = attention_inputs(case, torch.bfloat16, device="cuda")

    def double(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> Tensor:
        return attention(q, k, v, key_bias=key_bias, backend="triton") * 2

    arguments = [inputs[name] for name in ("q", "k", "v", "key_bias")]
    assert torch.equal(torch.compile(double, fullgraph=True)(*arguments), double(*arguments))  # type: ignore[arg-type]


def test_auto_takes_the_kernel_and_agrees_with_pytorch() -> None:
    case = next(case for case in ATTENTION_CASES if case.name == "prime")
    inputs = attention_inputs(case, torch.float16, device="cuda")
    got, want = (run(op, case, inputs)[0] for op in (attention, attention_reference))
    assert (got - want).abs().max() < 5e-3
