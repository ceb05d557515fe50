"""Products of float32 on a CPU: whoever multiplies, the result is that of PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aurora.kernels import linear as module
from aurora.kernels.linear import MIN_PRODUCTS, linear, scores
from aurora.kernels.match import match_reference

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN")


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """As on a processor where oneDNN is faster; the multiplications of each product that it did."""
    counts: list[int] = []
    multiply = module._multiply

    def count(x, weight, bias):
        counts.append(x.numel() * weight.shape[0])
        return multiply(x, weight, bias)

    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "_multiply", count)
    return counts


def agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return bool((got.double() - want).abs().max() <= 2e-6 * want.abs().max())


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 101), (1, 7, 31), (2, 3, 5, 11)])
def test_a_large_product_is_onednns(taken, shape, with_bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 257), torch.randn(1031, 257), torch.randn(1031) if with_bias else None
    with torch.inference_mode():
        got = linear(x, weight, bias)
    assert bool(taken) is (x.numel() * 1031 >= MIN_PRODUCTS)
    double = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert agree(got, double.float())


def test_equal_inputs_give_equal_bits(taken):
    x, weight = torch.randn(640, 128), torch.randn(512, 128)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight), linear(x.clone(), weight.clone()))
    assert len(taken) == 2


@pytest.mark.parametrize("case", ["gradient", "autocast", "bfloat16", "strided", "small", "off", "subclass", "nothing"])
def test_what_stays_pytorchs(taken, case):
    x, weight = torch.randn(640, 128), torch.randn(512, 128)
    if case == "gradient":
        weight.requires_grad_()
        linear(x, weight).sum().backward()
        assert agree(weight.grad, x.sum(0).expand(512, -1))
    elif case == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
    elif case == "bfloat16":
        assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    elif case == "strided":
        strided = torch.randn(128, 640).t()
        assert torch.equal(linear(strided, weight), F.linear(strided, weight))
    elif case == "small":
        linear(x[:8], weight)
    elif case == "off":
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(linear(x, weight), F.linear(x, weight))
    elif case == "subclass":

        class Own(torch.Tensor):
            pass

        assert isinstance(linear(x.as_subclass(Own), weight), Own)
    else:
        assert linear(x[:0], weight).shape == (0, 512)
    assert not taken


def test_parameters_without_gradients_are_taken(taken):
    layer = torch.nn.Linear(128, 512)
    with torch.no_grad():
        got = linear(torch.randn(640, 128), layer.weight, layer.bias)
    assert len(taken) == 1
    assert not got.requires_grad


def test_whoever_counts_operations_finds_them(taken):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        linear(torch.randn(640, 128), torch.randn(512, 128))
    assert counter.get_total_flops() == 2 * 640 * 128 * 512
    assert not taken


def test_it_compiles_without_it(taken):
    compiled = torch.compile(lambda x, weight: linear(x, weight), fullgraph=True, backend="eager")
    compiled(torch.randn(640, 128), torch.randn(512, 128))
    assert not taken


@pytest.mark.parametrize(("num_queries", "num_keys"), [(365, 365), (366, 365), (365, 364), (8, 7), (0, 5), (5, 0)])
def test_scores_are_those_of_a_batched_product(taken, num_queries, num_keys):
    torch.manual_seed(0)
    queries, keys = torch.randn(3, num_queries, 80), torch.randn(3, num_keys, 80)
    got = scores(queries, keys)
    assert len(taken) == (3 if num_queries > 300 else 0)
    assert torch.allclose(got, queries @ keys.transpose(1, 2), rtol=0, atol=1e-4)
    assert scores(queries[:0], keys[:0]).shape == (0, num_queries, num_keys)


def test_equal_tokens_have_equal_scores_wherever_they_stand(taken):
    """Else a tie would not go to the lowest index."""
    torch.manual_seed(0)
    token = torch.randn(2, 1, 80)
    queries = torch.randn(2, 365, 80)
    keys = torch.randn(2, 365, 80)
    same = [0, 1, 15, 16, 47, 200, 351, 352, 363, 364]
    queries[:, same] = token
    keys[:, same] = token
    got = scores(queries, keys)
    assert taken
    for row in got:
        assert len(row[same][:, same].unique()) == 1
        assert all(len(row[other, same].unique()) == 1 for other in range(365))
        assert all(len(row[same, other].unique()) == 1 for other in range(365))


def test_a_matching_at_full_size_is_the_same(taken, monkeypatch):
    torch.manual_seed(0)
    metric = torch.randn(2, 730, 80)
    metric[:, 100:140] = metric[:, 300:340]  # scores of 1, many of them equal
    metric[:, 500] = 0
    got = match_reference(metric, 90, class_token=True)
    assert taken
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    want = match_reference(metric, 90, class_token=True)
    # Pairs whose scores differ by rounding alone may change places.
    assert torch.allclose(got.scores, want.scores, rtol=0, atol=1e-6)
    for row in range(2):
        assert len(set(got.src_idx[row].tolist()) ^ set(want.src_idx[row].tolist())) <= 2


def test_the_processor_decides(monkeypatch, tmp_path):
    decide = module.onednn_is_faster.__wrapped__
    for text, capability, faster in (
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : GenuineIntel", "AVX512", False),
        ("vendor_id : AuthenticAMD", "AVX2", False),
    ):
        file = tmp_path / "cpuinfo"
        file.write_text(text)
        monkeypatch.setattr(module, "Path", lambda name, file=file: file)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert decide() is faster
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / "none")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert decide() is False
