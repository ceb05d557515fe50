"""The attention kernel on a GPU: bfloat16, the shapes of the models, the same bits every time, one compiled graph.

`pytest -m gpu` without a GPU runs what the interpreter can: small shapes, where bfloat16 is multiplied in float32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aurora.kernels.attention import attention, attention_reference
from aurora.kernels.cases import ATTENTION_CASES, ATTENTION_MODEL_CASES, AttentionCase, attention_inputs
from tests.kernels.test_attention import DEVICE, assert_as_exact_as_eager, needs_kernels, run

pytestmark = [pytest.mark.gpu, needs_kernels]
needs_device = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: too large for the interpreter")
SMALL = next(case for case in ATTENTION_CASES if case.name == "causal_bias_gqa")
LARGE = [pytest.param(case, marks=needs_device, id=case.name) for case in ATTENTION_MODEL_CASES]


@pytest.mark.parametrize("case", [*ATTENTION_CASES, *LARGE], ids=lambda c: c.name)
def test_bfloat16_kernel_equals_the_reference(case: AttentionCase) -> None:
    inputs = attention_inputs(case, torch.bfloat16, device=DEVICE)
    assert_as_exact_as_eager(case, run(attention, case, inputs, backend="triton"), inputs)


@needs_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_a_frame_in_the_other_types(dtype: torch.dtype) -> None:
    case = next(case for case in ATTENTION_MODEL_CASES if case.name == "vit_one_frame")
    inputs = attention_inputs(case, dtype, device="cuda")
    assert_as_exact_as_eager(case, run(attention, case, inputs, backend="triton"), inputs)


@pytest.mark.parametrize("case", [SMALL, *LARGE], ids=lambda c: c.name)
def test_results_repeat_bit_for_bit(case: AttentionCase) -> None:
    inputs = attention_inputs(case, torch.bfloat16, device=DEVICE)
    first = run(attention, case, inputs, backend="triton")
    for _ in range(5 if DEVICE == "cuda" else 1):
        again = run(attention, case, inputs, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_device
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


@pytest.mark.parametrize("case", [SMALL, *LARGE], ids=lambda c: c.name)
def test_the_compiled_op_equals_the_eager_one(case: AttentionCase) -> None:
    inputs = attention_inputs(case, torch.bfloat16, device=DEVICE)

    def double(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        return attention(q, k, v, causal=case.causal, key_bias=key_bias, backend="triton") * 2

    arguments = [inputs[name] for name in ("q", "k", "v", "key_bias")]
    torch.compiler.reset()
    compiled = torch.compile(double, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    assert torch.equal(compiled(*arguments), double(*arguments))  # type: ignore[arg-type]


@needs_device
def test_auto_takes_the_kernel_and_agrees_with_pytorch() -> None:
    case = next(case for case in ATTENTION_CASES if case.name == "prime")
    inputs = attention_inputs(case, torch.float16, device="cuda")
    got, want = (run(op, case, inputs)[0] for op in (attention, attention_reference))
    assert (got - want).abs().max() < 5e-3
