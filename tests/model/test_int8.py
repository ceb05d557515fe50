"""Int8 linear layers: the rounding, the product for few rows and many, and what moving a model does to them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora.model import int8
from aurora.model.int8 import PACKED_ROWS, Int8Linear, int8_linear, quantize_rows

ROWS = [1, PACKED_ROWS, PACKED_ROWS + 1, 40]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_weight_is_off_by_at_most_half_a_step(dtype: torch.dtype) -> None:
    weight = (noise(60, 33) * torch.logspace(-6, 1, 60)[:, None]).to(dtype)
    rounded, scale = quantize_rows(weight)
    assert (rounded.dtype, scale.dtype, scale.shape) == (torch.int8, torch.bfloat16, (60,))
    assert int(rounded.abs().max()) == int8.LARGEST
    # The scale is rounded to bfloat16, so the largest weight may be beyond 127 steps by 2**-9 of itself.
    error = (rounded * scale.double()[:, None] - weight.double()).abs()
    assert bool((error <= 0.51 * scale.double()[:, None] + 1e-12).all())


def test_steps_over_a_large_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = noise(50, 8)
    want = quantize_rows(weight)
    monkeypatch.setattr(int8, "_ROWS_PER_STEP", 7)
    assert all(torch.equal(a, b) for a, b in zip(quantize_rows(weight), want, strict=True))


def test_zeros_stay_zeros_and_nan_is_refused() -> None:
    rounded, scale = quantize_rows(torch.zeros(3, 5))
    assert not rounded.any()
    assert bool((scale > 0).all())
    weight = noise(3, 5)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_rows(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_product_is_that_of_the_dequantised_weight(rows: int, dtype: torch.dtype) -> None:
    layer = Int8Linear.from_weight(noise(48, 64))
    x = noise(rows, 64, seed=1).to(dtype)
    out = layer(x)
    assert (out.shape, out.dtype) == ((rows, 48), dtype)
    exact = F.linear(x.double(), layer.dequantized(torch.float64))
    assert relative(out, exact) < 5e-3  # activations and results in bfloat16: 2**-9 each
    in_full = F.linear(x.double(), noise(48, 64).double())
    assert 1e-3 < relative(out, in_full) < 2e-2


@pytest.mark.parametrize("rows", ROWS)
def test_without_the_packed_operator_the_numbers_are_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Int8Linear.from_weight(noise(48, 64))
    x = noise(rows, 64, seed=1)
    want = layer(x)
    monkeypatch.setattr(int8, "_HAS_PACKED", False)
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    assert relative(layer(x), want) < 5e-3


def test_the_packed_operator_is_there() -> None:
    assert int8._HAS_PACKED, "decoding is slow without it: look for its successor"


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    layer = Int8Linear.from_weight(noise(48, 64))
    x = noise(30, 64, seed=1)
    alone = torch.cat([layer(row[None]) for row in x])
    assert relative(layer(x), alone) < 5e-3
    assert relative(layer(x[:5]), alone[:5]) < 1e-6


def test_leading_dimensions_are_kept() -> None:
    layer = Int8Linear.from_weight(noise(48, 64))
    for shape in ((1, 1, 64), (2, 3, 64), (2, 30, 64), (64,), (0, 64)):
        assert layer(noise(*shape)).shape == (*shape[:-1], 48)


def test_casting_a_model_leaves_weight_and_scale() -> None:
    model = nn.ModuleDict({"a": Int8Linear.from_weight(noise(8, 4) * 1e-7), "b": nn.Linear(4, 4)})
    layer = model["a"]
    before = layer.weight_scale.clone()
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        assert model["b"].weight.dtype == dtype
        assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.bfloat16)
        assert torch.equal(layer.weight_scale, before)
    model.to("meta")
    assert layer.weight_scale.device.type == layer.weight.device.type == "meta"


def test_stacked_layers_share_their_memory() -> None:
    layers = [Int8Linear.from_weight(noise(size, 16, seed=size)) for size in (8, 4, 4)]
    x = noise(3, 16)
    want = torch.cat([layer(x) for layer in layers], dim=-1)
    whole = Int8Linear.stacked(layers)
    assert torch.equal(whole(x), want)
    assert torch.equal(torch.cat([layer(x) for layer in layers], dim=-1), want)
    assert layers[1].weight.data_ptr() == whole.weight[8:].data_ptr()
    assert layers[2].weight_scale.data_ptr() == whole.weight_scale[12:].data_ptr()
    assert list(layers[0].state_dict()) == ["weight", "weight_scale"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_on_a_gpu_eager_and_compiled(rows: int, dtype: torch.dtype) -> None:
    layer = Int8Linear.from_weight(noise(512, 256)).cuda()
    x = noise(rows, 256, seed=1).to("cuda", dtype)
    exact = F.linear(x.double(), layer.dequantized(torch.float64))
    assert relative(layer(x), exact) < 5e-3
    compiled = torch.compile(int8_linear, fullgraph=True)
    assert relative(compiled(x, layer.weight, layer.weight_scale), exact) < 5e-3


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 33), (70, 16), (3, 100), (1, 64), (7, 192)])
def test_odd_sizes(outputs: int, inputs: int) -> None:
    layer = Int8Linear.from_weight(noise(outputs, inputs))
    x = noise(2, inputs, seed=1)
    assert relative(layer(x), F.linear(x.double(), layer.dequantized(torch.float64))) < 1e-2


def test_rows_that_are_not_contiguous() -> None:
    layer = Int8Linear.from_weight(noise(48, 64))
    for dtype in (torch.float32, torch.bfloat16):
        x = noise(2, 5, 64, seed=1).to(dtype)
        assert torch.equal(layer(x[:, -1:]), layer(x[:, -1:].contiguous()))


@pytest.mark.parametrize("offset", [8, 16, 40])
def test_memory_that_is_not_aligned(offset: int) -> None:
    """PyTorch's operator faults on it: 4 rows, 2.13."""
    layer = Int8Linear.from_weight(noise(48, 64))
    x = noise(4, 64, seed=1).to(torch.bfloat16)
    want = layer(x)
    raw = torch.zeros(layer.weight.numel() + 128, dtype=torch.int8)
    start = -raw.data_ptr() % 64 + offset
    weight = raw[start : start + layer.weight.numel()].view(48, 64).copy_(layer.weight)
    assert weight.data_ptr() % 64 == offset
    assert torch.equal(Int8Linear.from_tensors(weight, layer.weight_scale)(x), want)
    loaded = Int8Linear(64, 48, device="meta")
    loaded.load_state_dict({"weight": weight, "weight_scale": layer.weight_scale}, assign=True)
    assert torch.equal(loaded(x), want)
    shifted = torch.zeros(4 * 64 + offset, dtype=torch.bfloat16)[offset:].view(4, 64).copy_(x)
    assert torch.equal(layer(shifted), want)
