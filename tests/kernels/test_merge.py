"""Matching and weighted merge: goldens of the reference, exact ties, clamping, zero tokens."""

import pytest
import torch
from torch import Tensor

from aurora.kernels.merge import Matching, match_tokens, merge_tokens
from aurora.model.merge import merge_source, unmerge_tokens
from tests.golden import assert_close_to_golden, load_index, load_tensors
from tests.kernels.merge_checks import DEVICE, needs_triton

CASES = sorted(load_index("merge_index"))


def _start(metric: Tensor) -> Tensor:
    return torch.arange(metric.shape[1]).expand(metric.shape[0], -1)


def _ones(metric: Tensor) -> Tensor:
    return torch.ones(*metric.shape[:2], 1)


@pytest.mark.parametrize("round_", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_merge_equals_the_reference(name: str, round_: int) -> None:
    index, golden = load_index("merge_index")[name], load_tensors(f"merge_{name}")
    first = match_tokens(golden["metric"], index["r"], class_token=index["class_token"])
    x, size = merge_tokens(golden["x"], golden.get("size_in", _ones(golden["metric"])), first)
    source = merge_source(_start(golden["metric"]), first)
    suffix = ""
    if round_ == 2:
        second = match_tokens(golden["metric2"], index["r"], class_token=index["class_token"])
        x, size = merge_tokens(x, size, second)
        source, suffix = merge_source(source, second), "2"

    assert_close_to_golden(x, golden[f"x_out{suffix}"])
    assert size.dtype == torch.float32
    assert torch.equal(size, golden[f"size_out{suffix}"])
    if f"source_id{suffix}" in golden:
        assert torch.equal(source, golden[f"source_id{suffix}"].long())
    else:
        member = golden[f"source_out{suffix}"].bool()
        assert (member.sum(1) == 1).all()
        assert torch.equal(source, member.int().argmax(1))


@pytest.mark.parametrize("name", CASES)
def test_the_metric_merged_by_its_own_matching_is_the_golden_metric(name: str) -> None:
    index, golden = load_index("merge_index")[name], load_tensors(f"merge_{name}")
    match = match_tokens(golden["metric"], index["r"], class_token=index["class_token"])
    merged, _ = merge_tokens(golden["metric"], golden.get("size_in", _ones(golden["metric"])), match)
    assert_close_to_golden(merged, golden["metric2"])


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("r", [-3, 0, 1, 2, 100])
def test_r_is_clamped_to_what_can_be_merged(num_tokens: int, r: int, class_token: bool) -> None:
    metric = torch.randn(2, num_tokens, 4, generator=torch.Generator().manual_seed(num_tokens))
    cap = (num_tokens - 1) // 2 if class_token else num_tokens // 2
    want = min(max(r, 0), cap)
    match = match_tokens(metric, r, class_token=class_token)
    num_even = (num_tokens + 1) // 2
    assert match.num_tokens == num_tokens
    assert match.src_idx.shape == match.dst_idx.shape == (2, want)
    assert match.unmerged_idx.shape == (2, num_even - want)
    x, size = merge_tokens(metric, _ones(metric), match)
    assert x.shape == (2, num_tokens - want, 4)
    assert torch.equal(size.sum(1), torch.full((2, 1), float(num_tokens)))


def _brute_force(metric: Tensor, r: int, class_token: bool) -> tuple[list[int], list[int], list[int]]:
    """Bipartite matching of one row (N, C) with Python lists: lowest index first at every tie."""
    unit = (metric / metric.norm(dim=-1, keepdim=True)).tolist()
    even, odd = unit[::2], unit[1::2]
    best: list[tuple[float, int]] = []
    for i, a in enumerate(even):
        scores = [sum(p * q for p, q in zip(a, b, strict=True)) for b in odd]
        if class_token and i == 0:
            scores = [-float("inf")] * len(odd)
        best.append((max(scores), scores.index(max(scores))))
    order = sorted(range(len(even)), key=lambda i: (-best[i][0], i))
    unmerged = sorted(order[r:]) if class_token else order[r:]
    return unmerged, order[:r], [best[i][1] for i in order[:r]]


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_exact_ties_take_the_lowest_index(seed: int, class_token: bool) -> None:
    # Vectors of four +-1 have norm 2 exactly, so similarities are exact multiples of 1/2 and ties are everywhere.
    generator = torch.Generator().manual_seed(seed)
    num_tokens = int(torch.randint(6, 40, (), generator=generator))
    metric = torch.randint(0, 2, (2, num_tokens, 4), generator=generator).float() * 2 - 1
    r = (num_tokens - 1) // 2 * (seed % 4 + 1) // 4
    match = match_tokens(metric, r, class_token=class_token)
    for row in range(2):
        unmerged, src, dst = _brute_force(metric[row], r, class_token)
        assert match.unmerged_idx[row].tolist() == unmerged
        assert match.src_idx[row].tolist() == src
        assert match.dst_idx[row].tolist() == dst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_identical_tokens_merge_in_order_into_the_first_destination(dtype: torch.dtype) -> None:
    metric = torch.ones(1, 1001, 8, dtype=dtype)
    match = match_tokens(metric, 300, class_token=True)
    assert match.src_idx[0].tolist() == list(range(1, 301))  # position 0 is the class token
    assert (match.dst_idx == 0).all()
    assert match.unmerged_idx[0].tolist() == [0, *range(301, 501)]


@pytest.mark.parametrize("class_token", [True, False])
def test_zero_tokens_give_no_nan_and_attract_nothing(class_token: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    metric = torch.rand(2, 24, 8, generator=generator) + 0.1  # every real pair has a positive similarity
    metric[:, 7] = 0  # a zero destination
    metric[0, 4] = 0  # a zero source
    match = match_tokens(metric, 8, class_token=class_token)
    x, size = merge_tokens(metric, _ones(metric), match)
    assert torch.isfinite(x).all()
    assert torch.isfinite(size).all()
    assert not (match.dst_idx == 3).any()  # token 7 is destination 3
    assert not (match.src_idx[0] == 2).any()  # token 4 is source 2: similarity 0 with all, so last in the order

    everything = torch.zeros(1, 9, 4, requires_grad=True)
    match = match_tokens(everything, 4, class_token=class_token)
    x, _ = merge_tokens(everything, _ones(everything), match)
    x.sum().backward()
    assert torch.isfinite(x).all()
    assert everything.grad is not None
    assert torch.isfinite(everything.grad).all()


def test_the_class_token_stays_first_and_alone() -> None:
    metric = torch.ones(1, 31, 4)
    x = torch.arange(31.0).view(1, 31, 1)
    size, source = _ones(metric), _start(metric)
    for _ in range(8):
        match = match_tokens(metric, 100, class_token=True)
        x, size = merge_tokens(x, size, match)
        source, metric = merge_source(source, match), torch.ones(1, x.shape[1], 4)
        assert x[0, 0, 0] == 0
        assert size[0, 0, 0] == 1
        assert (source == 0).sum() == 1
        assert source[0, 0] == 0
    assert x.shape[1] == 2  # the class token and one token that holds all thirty others
    assert size[0, 1, 0] == 30


def test_without_a_class_token_unmerged_tokens_come_by_descending_similarity() -> None:
    generator = torch.Generator().manual_seed(5)
    metric = torch.randn(3, 40, 8, generator=generator)
    unit = torch.nn.functional.normalize(metric, dim=-1)
    best = (unit[:, ::2] @ unit[:, 1::2].mT).amax(-1)  # (B, A)
    match = match_tokens(metric, 6, class_token=False)
    assert (best.gather(1, match.unmerged_idx).diff(dim=1) <= 0).all()
    assert (best.gather(1, match.src_idx).diff(dim=1) <= 0).all()
    assert (best.gather(1, match.src_idx).amin(1) >= best.gather(1, match.unmerged_idx).amax(1)).all()


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_merge_is_the_size_weighted_mean_and_unmerge_puts_it_back(seed: int, class_token: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 9 + 5 * seed
    metric = torch.randn(2, num_tokens, 8, generator=generator)
    x = torch.randn(2, num_tokens, 6, generator=generator)
    size = torch.randint(1, 9, (2, num_tokens, 1), generator=generator).float()
    match = match_tokens(metric, 1 + 2 * seed, class_token=class_token)
    merged, merged_size = merge_tokens(x, size, match)
    source = merge_source(_start(metric), match)
    for row in range(2):
        for token in range(merged.shape[1]):
            group = source[row] == token
            weight = size[row, group].double()
            assert merged_size[row, token, 0] == weight.sum()
            want = (x[row, group].double() * weight).sum(0) / weight.sum()
            torch.testing.assert_close(merged[row, token].double(), want, rtol=1e-5, atol=1e-6)
    back = unmerge_tokens(merged, match)
    assert torch.equal(back, merged.gather(1, source.unsqueeze(-1).expand(-1, -1, 6)))
    untouched = merged_size.gather(1, source.unsqueeze(-1)) == size
    torch.testing.assert_close(back[untouched.squeeze(-1)], x[untouched.squeeze(-1)])  # x * size / size may round


def test_large_sizes_do_not_overflow_in_half_precision() -> None:
    # goldens/NOTES 13: x * size reaches 75,000, beyond fp16, when the average is not accumulated in fp32.
    metric = torch.ones(1, 3, 4, dtype=torch.float16)
    x = torch.full((1, 3, 2), 300.0, dtype=torch.float16)
    merged, size = merge_tokens(x, torch.tensor([[[1.0], [250.0], [250.0]]]), match_tokens(metric, 1, class_token=True))
    assert merged.dtype == torch.float16
    assert size.dtype == torch.float32
    assert torch.equal(merged, torch.full((1, 2, 2), 300.0, dtype=torch.float16))
    assert size.flatten().tolist() == [1.0, 500.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_group_is_summed_from_its_destination_on_and_by_rank(backend: str, dtype: torch.dtype) -> None:
    # In float32, ((1 - 2**27) + 2**27) + 5 is 5; sources first, or in another order, it is something else.
    x = torch.tensor([2.0**27, 1.0, -(2.0**27), 0.0, 5.0, 0.0, 7.0], device=DEVICE, dtype=dtype).view(1, 7, 1)
    match = Matching(
        unmerged_idx=torch.tensor([[3]], device=DEVICE),
        src_idx=torch.tensor([[1, 0, 2]], device=DEVICE),
        dst_idx=torch.tensor([[0, 0, 0]], device=DEVICE),
        scores=torch.ones(1, 3, device=DEVICE),
        num_tokens=7,
    )
    merged, size = merge_tokens(x, torch.ones(1, 7, 1, device=DEVICE), match, backend=backend)
    assert merged[0, :, 0].tolist() == [7.0, 1.25, 0.0, 0.0]
    assert size[0, :, 0].tolist() == [1.0, 4.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_large_group_keeps_its_order(backend: str, dtype: torch.dtype) -> None:
    # 2**30 absorbs every one before the -2**30 comes, so the sum counts those behind it; a sort of many may mix them.
    num_tokens, r = 301, 63
    ranks = torch.randperm(151, generator=torch.Generator().manual_seed(0))
    match = Matching(
        unmerged_idx=ranks[r:].sort().values[None].to(DEVICE),
        src_idx=ranks[None, :r].to(DEVICE),
        dst_idx=torch.full((1, r), 77, device=DEVICE),
        scores=torch.ones(1, r, device=DEVICE),
        num_tokens=num_tokens,
    )
    for place in (0, 20, 62):
        x = torch.ones(1, num_tokens, 1, dtype=dtype)
        x[0, 2 * 77 + 1], x[0, 2 * int(ranks[place])] = 2.0**30, -(2.0**30)
        merged, size = merge_tokens(x.to(DEVICE), torch.ones(1, num_tokens, 1, device=DEVICE), match, backend=backend)
        at = 151 - r + 77
        assert size[0, at, 0] == 64
        assert merged[0, at, 0] == (62 - place) / 64


def test_sizes_stay_exact_in_bfloat16() -> None:
    x, size = torch.ones(1, 1024, 4, dtype=torch.bfloat16), torch.ones(1, 1024, 1)
    for _ in range(6):
        match = match_tokens(x, 400, class_token=False)
        x, size = merge_tokens(x, size, match)
        assert x.dtype == torch.bfloat16
        assert size.dtype == torch.float32
        assert size.sum() == 1024
    assert x.shape[1] == 20  # 1024 - 400, then halved five times: 624, 312, 156, 78, 39, 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_fp32_whatever_the_dtype(dtype: torch.dtype) -> None:
    # Smooth frames: neighbours differ by far less than a bf16 similarity can hold.
    generator = torch.Generator().manual_seed(0)
    metric = (torch.randn(1, 1, 16, generator=generator) + 0.02 * torch.randn(1, 400, 16, generator=generator)).to(
        dtype
    )
    low, full = (match_tokens(m, 80, class_token=True) for m in (metric, metric.float()))
    for a, b in zip(low[:4], full[:4], strict=True):
        assert torch.equal(a, b)


def test_a_matching_for_another_number_of_tokens_is_refused() -> None:
    match = match_tokens(torch.randn(1, 9, 4), 2, class_token=True)
    with pytest.raises(ValueError, match=r"9.*8|8.*9"):
        merge_tokens(torch.randn(1, 8, 4), torch.ones(1, 8, 1), match)


def test_inputs_are_not_written_to_and_may_be_strided() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 21, generator=generator).mT  # (B, N, C), not contiguous
    before, size = x.clone(), torch.ones(2, 21, 1)
    match = match_tokens(x, 5, class_token=True)
    merged, merged_size = merge_tokens(x, size, match)
    dense, dense_size = merge_tokens(before.contiguous(), size, match_tokens(before.contiguous(), 5, class_token=True))
    assert torch.equal(x, before)
    assert (size == 1).all()
    assert torch.equal(merged, dense)
    assert torch.equal(merged_size, dense_size)


def test_gradients_reach_every_token_with_its_share() -> None:
    x = torch.randn(1, 9, 3, requires_grad=True)
    size = torch.arange(1.0, 10.0).view(1, 9, 1)
    match: Matching = match_tokens(x.detach(), 3, class_token=True)
    merged, merged_size = merge_tokens(x, size, match)
    merged.sum().backward()
    source = merge_source(torch.arange(9).unsqueeze(0), match)
    share = size / merged_size.gather(1, source.unsqueeze(-1))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, share.expand(-1, -1, 3))
