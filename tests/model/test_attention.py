"""Attention backends: the same numbers, a choice that is made once and reported, and a bias that is never rounded."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aurora.kernels.cases import ATTENTION_CASES, AttentionCase, attention_inputs
from aurora.kernels.common import HAS_TRITON, INTERPRETED
from aurora.model import attention as attention_module
from aurora.model import attention_backends
from aurora.model.attention import (
    BACKENDS,
    attention,
    attention_report,
    augment_bias,
    causal_mask,
    check_backend,
    resolve_backend,
)
from aurora.model.attention_backends import BiasForm, bias_form
from tests.golden import assert_close_to_golden

CPU = torch.device("cpu")
ON_CPU = [
    "eager",
    "sdpa",
    "sdpa_flash",
    "auto",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton interprets nothing here")),
]


@pytest.fixture
def no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_choices", {})


def by_formula(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Any, key_bias: Any) -> Tensor:
    """Attention in float64, written down once more."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    if key_bias is not None:
        scores = scores + key_bias[:, None, None]
    if causal:
        scores = scores.masked_fill(~causal_mask(*scores.shape[2:], device=q.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
def test_every_backend_computes_the_formula(case: AttentionCase, backend: str) -> None:
    inputs = attention_inputs(case, torch.float32)
    options = {"causal": case.causal, "mask": inputs["mask"], "key_bias": inputs["key_bias"]}
    tensors = [inputs[name] for name in "qkv"]
    assert_close_to_golden(attention(*tensors, **options, backend=backend), by_formula(*tensors, **options))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sdpa_flash", "auto"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
def test_every_backend_has_the_gradient_of_the_formula(case: AttentionCase, backend: str) -> None:
    inputs = attention_inputs(case, torch.float32)
    options = {"causal": case.causal, "mask": inputs["mask"], "key_bias": inputs["key_bias"]}
    results = []
    for op, more in ((attention, {"backend": backend}), (by_formula, {})):
        q, k, v = (inputs[name].detach().requires_grad_() for name in "qkv")
        out = op(q, k, v, **options, **more)
        results.append(torch.autograd.grad(out, (q, k, v), inputs["dout"].to(out.dtype)))
    for ours, want in zip(*results, strict=True):
        assert (ours - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "auto"])
@pytest.mark.parametrize("name", ["prime", "causal_bias_gqa", "continued", "decode_gqa", "padded"])
def test_half_precision_is_as_exact_as_eager(name: str, backend: str, dtype: torch.dtype) -> None:
    case = next(case for case in ATTENTION_CASES if case.name == name)
    inputs = attention_inputs(case, dtype)
    options = {"causal": case.causal, "mask": inputs["mask"], "key_bias": inputs["key_bias"]}
    tensors = [inputs[n] for n in "qkv"]
    want = by_formula(*tensors, **options)
    ours, theirs = (
        (attention(*tensors, **options, backend=b).double() - want).abs().max().item() for b in (backend, "eager")
    )
    assert ours <= max(2 * theirs, 2 * torch.finfo(dtype).eps * want.abs().max().item())


@pytest.mark.parametrize(("largest", "bound"), [(5, 1e-3), (300, 4e-3)])
def test_a_bias_in_the_keys_is_as_exact_as_a_float32_bias(largest: int, bound: float) -> None:
    """KERNELS 2b: two parts are as good as a float32 bias; one part, or a bfloat16 mask, is several times worse.

    bfloat16 inputs, float32 accumulation, weights rounded to bfloat16 before the values: as on a GPU.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 460, 4, 80).bfloat16() for _ in range(3))
    bias = torch.randint(1, largest + 1, (1, 460)).float().log()
    exact = by_formula(q, k, v, causal=False, mask=None, key_bias=bias)

    def error(q: Tensor, k: Tensor, added: Tensor | None) -> float:
        scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * 80**-0.5
        scores = scores if added is None else scores + added[:, None, None]
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out = torch.einsum("bhts,bshd->bthd", weights.bfloat16().float(), v.float())
        out = out / weights.sum(-1).transpose(1, 2)[..., None]
        return (out.double() - exact).abs().max().item()

    augmented_q, augmented_k, same_v = augment_bias(q, k, v, bias, widen_values=False)
    assert augmented_q.shape == augmented_k.shape == (1, 460, 4, 88)
    assert augmented_q.dtype == augmented_k.dtype == torch.bfloat16
    assert same_v is v
    one_part = augmented_k.clone()
    one_part[..., 81] = 0
    in_two_parts = error(augmented_q, augmented_k, None)
    assert in_two_parts <= min(bound, 1.05 * error(q, k, bias))
    assert error(q, k, bias.bfloat16().float()) > 1.5 * in_two_parts
    if largest == 300:
        assert error(augmented_q, one_part, None) > 3 * in_two_parts


@pytest.mark.parametrize("largest", [5, 300])
def test_flash_with_a_bias_in_the_keys_is_exact(largest: int) -> None:
    """KERNELS 2b, PyTorch's own flash kernel at 172 tokens: output to 8.6e-7 and gradients to 1.5e-6 in float32."""
    torch.manual_seed(0)
    bias = torch.randint(1, largest + 1, (2, 172)).float().log()
    tensors, dout = [torch.randn(2, 172, 4, 80) for _ in range(3)], torch.randn(2, 172, 4, 80)
    options = {"causal": False, "mask": None, "key_bias": bias}
    results = []
    for op, dtype in ((attention, torch.float32), (by_formula, torch.float64)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
        out = op(*inputs, **options, **({"backend": "sdpa_flash"} if op is attention else {}))
        results.append((out, *torch.autograd.grad(out, inputs, dout.to(dtype))))
    for ours, want, bound in zip(*results, (1e-6, 2e-6, 2e-6, 2e-6), strict=True):
        assert (ours - want).abs().max() <= bound
    low = attention(*(x.bfloat16() for x in tensors), **options, backend="sdpa_flash").double()
    exact = by_formula(*(x.bfloat16() for x in tensors), **options)
    rounded = F.scaled_dot_product_attention(
        *(x.bfloat16().transpose(1, 2) for x in tensors), attn_mask=bias[:, None, None].bfloat16()
    ).transpose(1, 2)
    error = (low - exact).abs().max()
    assert error <= 4e-3
    assert (rounded.double() - exact).abs().max() > error  # what a bfloat16 mask does


def test_augmenting_keeps_values_exactly_and_widens_to_multiples_of_eight() -> None:
    q, k, v = torch.randn(3, 1, 4, 2, 64).unbind()
    q, k, v = augment_bias(q, k, v, torch.zeros(1, 4), widen_values=True)
    assert q.shape == k.shape == v.shape == (1, 4, 2, 72)
    assert (v[..., 64:] == 0).all()
    assert torch.equal(q[0, 0, 0, 64:], torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]))
    for head_dim, width in ((5, 8), (6, 8), (7, 16), (80, 88), (128, 136)):
        assert attention_backends.augmented_width(head_dim) == width


@pytest.mark.usefixtures("no_choices")
def test_a_choice_is_made_once_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 2, 8)
    bias = torch.zeros(1, 3)
    attention(x, x, x)
    attention(x, x, x, causal=True)
    attention(x.bfloat16(), x.bfloat16(), x.bfloat16(), key_bias=bias)
    attention(x, x, x, key_bias=bias, backend="sdpa_flash")
    report = attention_report()
    shown = [(r["asked"], r["dtype"], r["key_bias"], r["backend"]) for r in report]
    assert shown == [
        ("auto", "float32", "none", "sdpa"),
        ("auto", "bfloat16", "mask", "sdpa"),
        ("sdpa_flash", "float32", "augmented", "sdpa_flash"),
    ]
    assert report[0]["device"] == "cpu"
    assert report[0]["head_dim"] == 8
    assert report[-1]["reason"] == "asked for"
    monkeypatch.setattr(attention_backends, "_auto", lambda call: ("eager", "another time"))
    attention(x, x, x)
    assert resolve_backend("auto", device=CPU, dtype=torch.float32, head_dim=8) == "sdpa"
    assert attention_report() == report


@pytest.mark.usefixtures("no_choices")
def test_what_cannot_run_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(name: str, **options: Any) -> None:
        check_backend(name, **({"device": CPU, "dtype": torch.bfloat16, "head_dim": 80} | options))

    for name in ("auto", "eager", "sdpa", "sdpa_flash"):
        check(name, key_bias=True, masked=True)
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attn': want one of auto, eager, .*triton"):
        check("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, "flash_attn")
    with pytest.raises(ValueError, match=r"flash_attention_2: .*pip install flash-attn --no-build-isolation"):
        check("flash_attention_2")
    for name in ("sdpa_cudnn", "sdpa_efficient"):
        with pytest.raises(ValueError, match=f"{name}: needs a CUDA device, the tensors are on cpu"):
            check(name)
    with pytest.raises(ValueError, match=r"triton: .*float64"):
        check("triton", dtype=torch.float64)
    x = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="sdpa_cudnn"):
        attention(x, x, x, backend="sdpa_cudnn")
    assert attention_report() == []


def test_refusals_on_a_gpu_follow_the_kernels_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda name: object())
    cuda = torch.device("cuda")

    def refusal(name: str, dtype: torch.dtype, head_dim: int, **options: bool) -> str | None:
        try:
            check_backend(name, device=cuda, dtype=dtype, head_dim=head_dim, **options)
        except ValueError as error:
            return str(error)
        return None

    half = torch.bfloat16
    for name in ("sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attention_2"):
        assert refusal(name, half, 80, key_bias=True) is None
    assert "no mask" in str(refusal("sdpa_flash", half, 80, masked=True))
    assert refusal("flash_attention_2", half, 128, key_bias=True, masked=True) is None
    assert "136 with the key bias: want a multiple of 8 up to 128" in str(
        refusal("sdpa_cudnn", half, 128, key_bias=True)
    )
    assert refusal("sdpa_cudnn", half, 128) is None
    assert "got float32" in str(refusal("sdpa_flash", torch.float32, 80))
    assert refusal("sdpa_efficient", torch.float32, 84) is None
    assert "multiple of 8" in str(refusal("sdpa_efficient", half, 84))
    assert "at most 256" in str(refusal("sdpa_flash", half, 256, key_bias=True))
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in str(refusal("sdpa_cudnn", half, 80))
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old")
    assert "Old has less" in str(refusal("sdpa_flash", half, 80))


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_cudnn", "sdpa_efficient"])
def test_on_a_gpu_no_half_precision_kernel_gets_a_mask_of_another_type(backend: str) -> None:
    # The memory-efficient kernel refuses a float32 mask there and cuDNN misreads it (pytorch PR 191612).
    cuda = torch.device("cuda")
    assert bias_form(backend, cuda, torch.bfloat16) is BiasForm.augmented
    assert bias_form(backend, cuda, torch.float32) is BiasForm.mask
    assert bias_form(backend, CPU, torch.bfloat16) is BiasForm.mask


def test_one_query_on_a_gpu_goes_to_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    call = attention_backends._Call("auto", torch.device("cuda"), torch.bfloat16, 128, False, False, True)
    assert attention_backends._auto(call)[0] == "sdpa_flash"
    for other in (call._replace(masked=True), call._replace(single_query=False), call._replace(dtype=torch.float32)):
        assert attention_backends._auto(other)[0] == "sdpa"


class CountedOps(TorchDispatchMode):
    """Operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_bias", [False, True])
def test_decoding_runs_few_operations_and_repeats_no_key(with_bias: bool) -> None:
    q, k, v = torch.randn(2, 1, 6, 64), *torch.randn(2, 2, 50, 2, 64)
    bias = torch.zeros(2, 50) if with_bias else None
    with CountedOps() as ops, torch.no_grad():
        attention(q, k, v, causal=True, key_bias=bias)
    computing = {name for name in ops.counts if name not in ("transpose", "view", "_reshape_alias", "slice", "alias")}
    assert computing == {"_scaled_dot_product_flash_attention_for_cpu"} | ({"unsqueeze"} if with_bias else set())
    assert sum(ops.counts.values()) <= 9


def test_broadcast_keys_are_made_dense_for_the_gpu() -> None:
    # 449 keys, 1 mod 32: there PyTorch's memory-efficient kernel reads broadcast keys wrongly (pytorch issue 191937).
    one = torch.randn(1, 449, 1, 80)
    wide = one.expand(2, -1, 4, -1)
    assert attention_module._dense(one) is one
    assert attention_module._dense(wide).is_contiguous()
    padded = torch.randn(2, 449, 4, 96)[..., :80]
    assert attention_module._dense(padded) is padded
    q = torch.randn(2, 449, 4, 80)
    bias = torch.randint(1, 30, (2, 449)).float().log()
    for backend in ("eager", "sdpa", "sdpa_flash"):
        got = attention(q, wide, wide, key_bias=bias, backend=backend)
        assert_close_to_golden(got, by_formula(q, wide, wide, causal=False, mask=None, key_bias=bias))


def test_a_query_that_sees_nothing_is_finite() -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 8).unbind()
    mask = torch.ones(1, 5, 5, dtype=torch.bool)
    mask[0, 2] = False
    for bias in (None, torch.zeros(1, 5)):
        for backend in ("eager", "sdpa"):
            assert attention(q, k, v, mask=mask, key_bias=bias, backend=backend).isfinite().all()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["auto", "sdpa_flash"])
def test_attention_compiles_into_one_graph(backend: str, compiler: str) -> None:
    q, k, v = torch.randn(3, 2, 7, 4, 16).unbind()
    bias = torch.randint(1, 9, (2, 7)).float().log()

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, key_bias=bias, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    assert torch.allclose(compiled(q, k, v, bias), run(q, k, v, bias), atol=1e-6)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the package, with the signatures of its version 2.8; returns the names of the calls."""
    calls = []

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        calls.append("dense")
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert softmax_scale is not None
        mask = causal_mask(q.shape[1], k.shape[1], device=q.device) if causal else None
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        calls.append("ragged")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert int(cu_seqlens_q[-1]) == q.shape[0]
        assert int(cu_seqlens_k[-1]) == k.shape[0] == v.shape[0]
        assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
        assert int(cu_seqlens_k.diff().max()) == max_seqlen_k
        rows = [
            flash_attn_func(a[None], b[None], c[None], softmax_scale=softmax_scale, causal=causal)[0]
            for a, b, c in zip(
                q.tensor_split(cu_seqlens_q[1:-1].long()),
                k.tensor_split(cu_seqlens_k[1:-1].long()),
                v.tensor_split(cu_seqlens_k[1:-1].long()),
                strict=True,
            )
        ]
        return torch.cat(rows)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention_backends, "_choices", {})
    monkeypatch.setattr(attention_backends, "_reason_against", lambda call: None)
    return calls


@pytest.mark.parametrize("name", ["prime", "prime_no_bias", "causal_bias_gqa", "continued", "decode_gqa"])
def test_flash_attention_2_is_called_as_its_signature_wants(name: str, flash_attn: list[str]) -> None:
    case = next(case for case in ATTENTION_CASES if case.name == name)
    inputs = attention_inputs(case, torch.float32)
    options = {"causal": case.causal, "mask": None, "key_bias": inputs["key_bias"]}
    tensors = [inputs[n] for n in "qkv"]
    got = attention(*tensors, **options, backend="flash_attention_2")
    assert_close_to_golden(got, by_formula(*tensors, **options))
    assert flash_attn == ["dense"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_queries", [7, 3, 1])
def test_flash_attention_2_packs_padded_rows(num_queries: int, side: str, flash_attn: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, num_queries, 4, 16, generator=generator)
    k, v = torch.randn(2, 3, 7, 2, 16, generator=generator)
    bias = torch.randint(1, 300, (3, 7), generator=generator).float().log()
    lengths = torch.tensor([7, 4, 5])
    positions = torch.arange(7)
    exists = positions >= 7 - lengths[:, None] if side == "left" else positions < lengths[:, None]
    if side == "right":
        exists[:, -num_queries:] |= num_queries < 7  # cached keys are padded on the left, new ones follow all of them
    itself = torch.eye(7, dtype=torch.bool)[7 - num_queries :]
    mask = (causal_mask(num_queries, 7, device=CPU) & exists[:, None]) | itself
    got = attention(q, k, v, mask=mask, key_bias=bias, backend="flash_attention_2")
    want = by_formula(q, k, v, causal=False, mask=mask, key_bias=bias)
    real = exists[:, 7 - num_queries :]
    assert (got[real] - want[real]).abs().max() < 1e-5
    assert got.isfinite().all()
    assert "ragged" in flash_attn


def test_flash_attention_2_reads_a_mask_once_until_it_changes(flash_attn: list[str]) -> None:
    x = torch.randn(1, 4, 2, 8)
    mask = causal_mask(4, 4, device=CPU)[None].clone()
    with CountedOps() as ops:
        attention(x, x, x, mask=mask, backend="flash_attention_2")
        attention(x, x, x, mask=mask, backend="flash_attention_2")
    assert ops.counts["nonzero"] == 2  # queries and keys, in the first call
    mask[0, 1:, 0] = False  # the first token became padding
    got = attention(x, x, x, mask=mask, backend="flash_attention_2")
    want = by_formula(x, x, x, causal=False, mask=mask, key_bias=None)
    assert (got - want)[0, 1:].abs().max() < 1e-6
    with pytest.raises(ValueError, match="not the causal rule on padded rows"):
        attention(x, x, x, mask=torch.ones(1, 4, 4, dtype=torch.bool), backend="flash_attention_2")


def test_every_name_is_either_chosen_or_refused() -> None:
    x = torch.zeros(1, 2, 1, 16)
    for name in BACKENDS:
        try:
            assert attention(x, x, x, backend=name).shape == x.shape
        except ValueError as error:
            assert name in str(error) or name == "triton"  # noqa: PT017 - either outcome is right
            assert name in ("sdpa_cudnn", "sdpa_efficient", "flash_attention_2", "triton")
            assert name != "triton" or not (HAS_TRITON and INTERPRETED)
