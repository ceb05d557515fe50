"""The attention kernel, in the interpreter or on a GPU, against its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.kernels.attention import MAX_HEAD_WIDTH, attention, attention_reference
from aurora.kernels.cases import ATTENTION_CASES, ATTENTION_MODEL_CASES, AttentionCase, attention_inputs
from aurora.kernels.common import HAS_TRITON, INTERPRETED
from aurora.kernels.dispatch import KernelUnavailable

DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_kernels = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="Triton neither compiles nor interprets here"
)
# A few ulp of the largest value: sums run in another order, and a gradient of zero is a difference of sums.
FLOOR = {torch.float32: 8 * 2.0**-23, torch.float16: 2 * 2.0**-10, torch.bfloat16: 2 * 2.0**-7}
OUTPUTS = ("out", "dq", "dk", "dv")


def run(op: Callable[..., Tensor], case: AttentionCase, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    """Output and the gradients of q, k and v."""
    q, k, v = (inputs[name].detach().requires_grad_() for name in "qkv")
    out = op(q, k, v, causal=case.causal, mask=inputs["mask"], key_bias=inputs["key_bias"], **options)
    return (out, *torch.autograd.grad(out, (q, k, v), inputs["dout"]))


def eager(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, key_bias: Tensor | None) -> Tensor:
    """Attention as one writes it in PyTorch, in the type of the inputs: what the bound is measured against."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = ((q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5).float()
    if key_bias is not None:
        scores = scores + key_bias[:, None, None]
    num_queries, num_keys = scores.shape[2:]
    if causal:
        mask = torch.ones(num_keys, num_keys, dtype=torch.bool, device=q.device).tril()[None, num_keys - num_queries :]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def in_float32(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.float() if name in ("q", "k", "v", "dout") else x for name, x in inputs.items()}


def assert_as_exact_as_eager(case: AttentionCase, got: tuple[Tensor, ...], inputs: dict[str, Any]) -> None:
    """At most twice the error of eager PyTorch in the same type, or a few ulp of the largest value."""
    wanted = run(attention_reference, case, in_float32(inputs))
    usual = run(eager, case, inputs)
    for name, ours, want, theirs in zip(OUTPUTS, got, wanted, usual, strict=True):
        assert ours.dtype == inputs["q"].dtype
        assert ours.shape == want.shape
        error = (ours.float() - want).abs()
        largest = max(want.abs().max().item(), inputs["dout"].abs().max().item() if name in ("dq", "dk") else 0.0)
        bound = max(2 * (theirs.float() - want).abs().max().item(), FLOOR[ours.dtype] * largest)
        if not error.max().item() <= bound:  # NaN fails too
            worst = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
            raise AssertionError(
                f"{name} worst at {worst}: {ours[worst].item():.6g}, reference {want[worst].item():.6g}, bound"
                f" {bound:.3g}; {(~(error <= bound)).sum().item()} of {error.numel()} beyond it"
            )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
def test_kernel_equals_the_reference(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = attention_inputs(case, dtype, device=DEVICE)
    got = run(attention, case, inputs, backend="triton")
    assert_as_exact_as_eager(case, got, inputs)


@needs_kernels
@pytest.mark.slow
def test_kernel_equals_the_reference_at_the_size_of_a_frame() -> None:
    case = next(case for case in ATTENTION_MODEL_CASES if case.name == "vit_one_frame")
    inputs = attention_inputs(case, torch.float16, device=DEVICE)
    assert_as_exact_as_eager(case, run(attention, case, inputs, backend="triton"), inputs)


@needs_kernels
@pytest.mark.parametrize("name", ["prime", "padded"])
def test_interpreted_bfloat16_is_stored_right(name: str) -> None:
    # Products are in float32 there; a stored bfloat16 is truncated, one ulp more than rounding.
    case = next(case for case in ATTENTION_CASES if case.name == name)
    inputs = attention_inputs(case, torch.bfloat16, device=DEVICE)
    assert_as_exact_as_eager(case, run(attention, case, inputs, backend="triton"), inputs)


@needs_kernels
@pytest.mark.parametrize("name", ["continued", "padded", "decode_gqa", "tiny_head"])
def test_kernels_write_all_of_their_outputs_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from aurora.kernels.attention_bwd_triton import launch_attention_backward
    from aurora.kernels.attention_triton import launch_attention

    case = next(case for case in ATTENTION_CASES if case.name == name)
    inputs = attention_inputs(case, torch.float32, device=DEVICE)
    guards, bodies = [], []

    new_empty = torch.Tensor.new_empty

    def guarded(self: Tensor, shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options:  # the interpreter's own
            return new_empty(self, shape, dtype=dtype, **options)
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 128,), torch.nan, dtype=dtype or self.dtype, device=self.device)
        guards.append((buffer[:64], buffer[-64:]))
        bodies.append(buffer[64:-64])
        return buffer[64:-64].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    q, k, v, mask, bias, dout = (inputs[n] for n in ("q", "k", "v", "mask", "key_bias", "dout"))
    kept = [x.clone() for x in (q, k, v, dout)]
    out, log_sum = launch_attention(q, k, v, mask, bias, causal=case.causal)
    launch_attention_backward(q, k, v, mask, bias, out, log_sum, dout, causal=case.causal)
    assert len(bodies) == 6  # out, log_sum, dq, dk, dv, delta
    assert not any(body.isnan().any() for body in bodies)
    assert all(guard.isnan().all() for pair in guards for guard in pair)
    assert all(torch.equal(before, x) for before, x in zip(kept, (q, k, v, dout), strict=True))


@needs_kernels
def test_a_query_that_sees_nothing_stays_finite_and_alone() -> None:
    case = next(case for case in ATTENTION_CASES if case.name == "padded")
    inputs = attention_inputs(case, torch.float32, device=DEVICE)
    mask = inputs["mask"]
    assert mask is not None
    blind = torch.zeros(mask.shape[:2], dtype=torch.bool, device=DEVICE)
    blind[0, 3] = blind[1, 32] = True
    mask[blind] = False
    got = run(attention, case, inputs, backend="triton")
    assert all(x.isfinite().all() for x in got)
    assert (got[1][blind] == 0).all()
    dout = inputs["dout"]
    assert dout is not None
    dout[blind] = 0.0  # it gives keys and values no gradient either
    want = run(attention_reference, case, inputs)
    for name, ours, theirs in zip(OUTPUTS, got, want, strict=True):
        ours, theirs = (x[~blind] if name in ("out", "dq") else x for x in (ours, theirs))
        assert (ours - theirs).abs().max() < 1e-5


@needs_kernels
def test_results_repeat_and_rows_are_alone() -> None:
    case = next(case for case in ATTENTION_CASES if case.name == "continued")
    inputs = attention_inputs(case, torch.float16, device=DEVICE)
    first, second = (run(attention, case, inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = run(attention, case, {n: None if x is None else x[1:] for n, x in inputs.items()}, backend="triton")
    assert all(torch.equal(a[1:], b) for a, b in zip(first, alone, strict=True))


@needs_kernels
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_the_op_compiles_into_one_graph(compiler: str) -> None:
    case = next(case for case in ATTENTION_CASES if case.name == "tiny_head")
    inputs = attention_inputs(case, torch.float32, device=DEVICE)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, key_bias=inputs["key_bias"], backend="triton").mul(inputs["dout"]).sum()

    tensors = [inputs[name].detach().requires_grad_() for name in "qkv"]  # type: ignore[union-attr]
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    got = torch.autograd.grad(compiled(*tensors), tensors)
    want = torch.autograd.grad(loss(*tensors), tensors)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@needs_kernels
def test_the_ops_keep_the_contract_of_custom_ops() -> None:
    case = next(case for case in ATTENTION_CASES if case.name == "tiny_head")
    inputs = attention_inputs(case, torch.float32, device=DEVICE)
    q, k, v = (inputs[name].detach().requires_grad_() for name in "qkv")  # type: ignore[union-attr]
    arguments = (q, k, v, None, inputs["key_bias"], False)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.aurora.attention.default, arguments, test_utils=checks)


def test_reference_passes_gradcheck() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 6, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randint(1, 300, (2, 6)).double().log()
    mask = torch.rand(2, 3, 6) < 0.7
    mask[:, :, 0] = True
    for options in ({"causal": True}, {"mask": mask}, {"causal": True, "key_bias": bias}):
        assert torch.autograd.gradcheck(lambda *x, options=options: attention_reference(*x, **options), (q, k, v))


def test_reference_is_softmax_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 16) for _ in range(3))
    bias = torch.randint(1, 300, (2, 7)).float().log()
    got = attention(q, k, v, key_bias=bias, backend="torch").transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias[:, None, None]
    )
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "parts"), [(80, (64, 16)), (64, (64, 0)), (5, (16, 0)), (88, (64, 32)), (100, (64, 64))]
)
def test_heads_split_into_powers_of_two(width: int, parts: tuple[int, int]) -> None:
    triton_file = pytest.importorskip("aurora.kernels.attention_triton") if HAS_TRITON else None
    if triton_file is None:
        pytest.skip("Triton is not installed")
    assert triton_file.split_width(width) == parts


def test_what_cannot_run_is_refused_with_its_reason() -> None:
    x = torch.zeros(1, 3, 2, 8)
    with pytest.raises(KernelUnavailable, match="float64"):
        attention(x.double(), x.double(), x.double(), backend="triton")
    wide = torch.zeros(1, 3, 2, MAX_HEAD_WIDTH + 1)
    with pytest.raises(KernelUnavailable, match="wider than 256"):
        attention(wide, wide, wide, backend="triton")
    attention(wide, wide, wide)  # auto runs the reference
    with pytest.raises(ValueError, match=r"H % K = 0"):
        attention(x, x[:, :, :1].expand(-1, -1, 3, -1), x[:, :, :1].expand(-1, -1, 3, -1))
    with pytest.raises(ValueError, match="3 queries for 2 keys"):
        attention(x, x[:, :2], x[:, :2], causal=True)
    with pytest.raises(ValueError, match="want bool"):
        attention(x, x, x, mask=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match=r"key_bias \(1, 2\)"):
        attention(x, x, x, key_bias=torch.zeros(1, 2))
