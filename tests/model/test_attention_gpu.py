"""Attention backends on a GPU: bfloat16, every kernel of PyTorch, repeated bit for bit, compiled into one graph.

`pytest -m gpu` without a GPU runs the small cases on the backends that a CPU has, our kernel in the interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.kernels.cases import ATTENTION_CASES, ATTENTION_MODEL_CASES, AttentionCase, attention_inputs
from aurora.model.attention import BACKENDS, attention, check_backend
from tests.model.test_attention import by_formula
from tests.model.test_attention_goldens import assert_tower_equals_tome

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_device = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
SMALL = [c for c in ATTENTION_CASES if c.shape[5] % 8 == 0 and c.shape[2] > 1]
LARGE = [pytest.param(c, marks=needs_device, id=c.name) for c in ATTENTION_MODEL_CASES if c.shape[1] <= 730]


def arguments(case: AttentionCase, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    inputs = attention_inputs(case, dtype, device=DEVICE)
    options = {"causal": case.causal, "mask": inputs["mask"], "key_bias": inputs["key_bias"]}
    return [inputs[name] for name in "qkv"], options


def refusal(case: AttentionCase, backend: str, dtype: torch.dtype) -> str | None:
    offset = case.causal and 1 < case.shape[1] != case.shape[2]
    try:
        check_backend(
            backend,
            device=torch.device(DEVICE),
            dtype=dtype,
            head_dim=case.shape[5],
            key_bias=case.max_size > 0,
            masked=case.masked or (offset and backend.startswith("sdpa")),
        )
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=lambda c: c.name)
def test_every_backend_that_is_not_refused_is_as_exact_as_eager(
    case: AttentionCase, backend: str, dtype: torch.dtype
) -> None:
    reason = refusal(case, backend, dtype)
    tensors, options = arguments(case, dtype)
    if reason is not None:
        with pytest.raises(ValueError, match="attn_implementation"):
            attention(*tensors, **options, backend=backend)
        return
    if backend == "flash_attention_2" and case.masked:
        pytest.skip("a random mask is not padding")
    want = by_formula(*tensors, **options)
    ours, theirs = (
        (attention(*tensors, **options, backend=b).double() - want).abs().max().item() for b in (backend, "eager")
    )
    assert ours <= max(2 * theirs, 4 * torch.finfo(dtype).eps * want.abs().max().item())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
def test_results_and_gradients_repeat_bit_for_bit(backend: str) -> None:
    # cuDNN and flash say themselves that their backward need not repeat: only ours promises it.
    name = "vit_449_bias" if DEVICE == "cuda" else "causal_bias_gqa"
    case = next(case for case in (*ATTENTION_CASES, *ATTENTION_MODEL_CASES) if case.name == name)
    if refusal(case, backend, torch.bfloat16) is not None:
        pytest.skip("refused here")
    tensors, options = arguments(case, torch.bfloat16)

    def run() -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in tensors]
        out = attention(*inputs, **options, backend=backend)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    first, second = run(), run()
    assert torch.equal(first[0], second[0])
    if backend == "triton":
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_device
@pytest.mark.parametrize("num_keys", [449, 481, 33])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_efficient"])
def test_broadcast_keys_of_one_more_than_32(backend: str, num_keys: int) -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(1, num_keys, 1, 80, device="cuda", dtype=torch.bfloat16).expand(4, -1, 8, -1) for _ in "kv")
    q = torch.randn(4, num_keys, 8, 80, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(4, num_keys, num_keys, device="cuda") < 0.8
    mask |= torch.eye(num_keys, dtype=torch.bool, device="cuda")
    want = by_formula(q, k, v, causal=False, mask=mask, key_bias=None)
    assert (attention(q, k, v, mask=mask, backend=backend).double() - want).abs().max() < 2e-2


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "flash_attention_2"])
def test_every_backend_compiles_into_one_graph(backend: str) -> None:
    name = "vit_172_bias" if DEVICE == "cuda" else "prime"
    case = next(case for case in (*ATTENTION_CASES, *ATTENTION_MODEL_CASES) if case.name == name)
    if refusal(case, backend, torch.bfloat16) is not None:
        pytest.skip("refused here")
    (q, k, v), options = arguments(case, torch.bfloat16)

    def run(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> Tensor:
        return attention(q, k, v, key_bias=key_bias, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    got = compiled(q, k, v, options["key_bias"])
    assert (got.float() - run(q, k, v, options["key_bias"]).float()).abs().max() < 2e-2


@needs_device
@pytest.mark.parametrize("backend", ["eager", "sdpa", "sdpa_efficient", "triton"])
def test_the_tower_in_float32_equals_tome(backend: str) -> None:
    assert_tower_equals_tome("a", "nonsq.r0.20", backend, device="cuda")
