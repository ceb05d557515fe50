"""Caches: selecting, reordering, a bias per key, and rows that share their prompts."""

import pytest
import torch
from torch import Tensor

from aurora.model import cache as caches
from aurora.model.attention import attention
from aurora.model.cache import KVCache, SharedKVCache
from aurora.model.llama import Llama, LlamaConfig
from tests.golden import RTOL_LM, assert_close_to_golden

VOCAB = 50


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    return Llama(LlamaConfig(vocab_size=VOCAB, max_seq_len=64, **sizes)).eval()


def _tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _cache(model: Llama, rows: int, max_length: int = 40) -> KVCache:
    return KVCache(model.config, batch_size=rows, max_length=max_length, device="cpu", dtype=torch.float32)


def _run(model: Llama, ids: Tensor, cache: KVCache | None = None, **kwargs: object) -> Tensor:
    start = cache.length if cache is not None else 0
    positions = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model(model.embed(ids), **{"position_ids": positions, "cache": cache, **kwargs})


@pytest.mark.parametrize("row_of", [[0, 1], [0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0], [1, 1], [0]], ids=str)
def test_forked_rows_continue_as_rows_of_their_own(model: Llama, row_of: list[int]) -> None:
    prompts, suffixes = _tokens(2, 9), _tokens(len(row_of), 6, seed=2)
    full = _run(model, torch.cat([prompts[row_of], suffixes], dim=1))[:, 9:]
    cache = _cache(model, 2)
    _run(model, prompts, cache)
    fork = cache.fork(row_of, 15)
    assert isinstance(fork, SharedKVCache)
    assert (fork.batch_size, fork.length, fork.max_length) == (len(row_of), 9, 15)
    parts = [_run(model, piece, fork) for piece in suffixes.split([3, 1, 1, 1], dim=1)]
    assert_close_to_golden(torch.cat(parts, dim=1), full, RTOL_LM)
    with pytest.raises(ValueError, match=r"16.*15"):
        _run(model, suffixes[:, :1], fork)
    assert cache.length == 9


def test_a_fork_reads_the_prompt_where_it_is(model: Llama) -> None:
    cache = _cache(model, 2)
    _run(model, _tokens(2, 9), cache)
    fork = cache.fork([0, 0, 1, 1], 20)
    assert fork.prompt_keys.data_ptr() == cache.keys.data_ptr()
    assert fork.prompt_values.data_ptr() == cache.values.data_ptr()
    assert fork.keys.shape[3] == 11


@pytest.mark.parametrize("shared", [False, True])
def test_reordered_rows_go_on_from_each_other(model: Llama, shared: bool) -> None:
    prompt, middle, last = _tokens(1, 7).expand(3, -1), _tokens(3, 4, seed=2), _tokens(3, 2, seed=3)
    cache = _cache(model, 1 if shared else 3)
    if shared:
        _run(model, prompt[:1], cache)
        cache = cache.fork([0, 0, 0], 20)
    else:
        _run(model, prompt, cache)
    _run(model, middle, cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    want = _run(model, torch.cat([prompt, middle[rows], last], dim=1))[:, -2:]
    assert_close_to_golden(_run(model, last, cache), want, RTOL_LM)


@pytest.mark.parametrize("shared", [False, True])
def test_selected_rows_are_copies(model: Llama, shared: bool) -> None:
    prompts, middle, last = _tokens(3, 7), _tokens(3, 4, seed=2), _tokens(4, 2, seed=3)
    cache = _cache(model, 3)
    _run(model, prompts, cache)
    if shared:
        cache = cache.fork([0, 1, 2], 20)
    _run(model, middle, cache)
    rows = torch.tensor([2, 0, 2, 2])  # row 1 has finished
    new = cache.select(rows)
    assert type(new) is type(cache)
    want = _run(model, torch.cat([prompts[rows], middle[rows], last], dim=1))[:, -2:]
    before = cache.keys.clone()
    assert_close_to_golden(_run(model, last, new), want, RTOL_LM)
    assert cache.length == 11
    assert torch.equal(cache.keys, before)


def test_a_fork_of_a_fork_still_shares_the_first_prompt(model: Llama) -> None:
    prompts, questions, last = _tokens(2, 7), _tokens(3, 4, seed=2), _tokens(6, 3, seed=3)
    row_of = [1, 0, 1]
    cache = _cache(model, 2)
    _run(model, prompts, cache)
    asked = cache.fork(row_of, 11)
    _run(model, questions, asked)
    beams = asked.fork(torch.arange(3).repeat_interleave(2), 14)
    assert beams.prompt_keys.data_ptr() == cache.keys.data_ptr()
    whole = torch.cat([prompts[row_of], questions], dim=1).repeat_interleave(2, dim=0)
    want = _run(model, torch.cat([whole, last], dim=1))[:, -3:]
    assert_close_to_golden(torch.cat([_run(model, x, beams) for x in last.split(1, dim=1)], dim=1), want, RTOL_LM)


@pytest.mark.parametrize("shared", [False, True])
def test_masked_keys_of_a_padded_prompt_stay_hidden(model: Llama, shared: bool) -> None:
    """Row 1 is three tokens shorter; what it holds in the padding must not matter."""
    prompts, suffixes = _tokens(2, 9), _tokens(2, 3, seed=2)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :3] = False
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    cache = _cache(model, 2)
    _run(model, prompts, cache, attention_mask=mask[:, :9], position_ids=positions[:, :9])
    if shared:
        cache = cache.fork([0, 1], 12)
    parts = []
    for start, end in ((9, 11), (11, 12)):
        new, at = suffixes[:, start - 9 : end - 9], positions[:, start:end]
        parts.append(_run(model, new, cache, attention_mask=mask[:, :end], position_ids=at))
    alone = _run(model, torch.cat([prompts[1:, 3:], suffixes[1:]], dim=1))[:, -3:]
    assert_close_to_golden(torch.cat(parts, dim=1)[1:], alone, RTOL_LM)


@pytest.mark.parametrize("shared", [False, True])
def test_a_key_bias_counts_in_every_step(model: Llama, shared: bool) -> None:
    """A bias of log 2 on a key equals that key standing there twice."""
    ids, last = _tokens(1, 6), _tokens(1, 3, seed=2)
    doubled = torch.cat([ids[:, :3], ids[:, 2:]], dim=1)
    positions = torch.tensor([[0, 1, 2, 2, 3, 4, 5, 6, 7, 8]])
    sight = torch.ones(10, 10, dtype=torch.bool).tril()
    sight[2, 3] = True  # the twin sees its twin, as the one with the bias sees itself twice
    twice = torch.cat([doubled, last], dim=1)
    want = _run(model, twice, position_ids=positions, attention_mask=sight[None])[:, -3:]

    bias = torch.zeros(1, 9)
    bias[0, 2] = torch.tensor(2.0).log()
    assert_close_to_golden(_run(model, torch.cat([ids, last], dim=1), key_bias=bias)[:, -3:], want, RTOL_LM)
    cache = _cache(model, 1, max_length=6)
    cache.key_bias = bias[:, :6]
    _run(model, ids, cache)
    cache = cache.fork([0], 7) if shared else cache
    cache.grow(9)
    got = torch.cat([_run(model, piece, cache) for piece in last.split([2, 1], dim=1)], dim=1)
    assert_close_to_golden(got, want, RTOL_LM)
    assert not torch.allclose(_run(model, torch.cat([ids, last], dim=1))[:, -3:], want, rtol=1e-3)


def test_a_key_bias_must_cover_the_keys(model: Llama) -> None:
    with pytest.raises(ValueError, match=r"key_bias: covers 5 keys, want 6"):
        _run(model, _tokens(1, 6), key_bias=torch.zeros(1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_one_query_of_many_keys_is_attention(
    dtype: torch.dtype, masked: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=96, num_layers=1, num_heads=6, num_kv_heads=2, max_seq_len=900)
    random = torch.Generator().manual_seed(3)
    cache = KVCache(config, batch_size=2, max_length=710, device="cpu", dtype=dtype)
    cache.keys.normal_(generator=random)
    cache.values.normal_(generator=random)
    cache.length = 699
    q, k, v = (torch.randn(2, 1, heads, 16, generator=random).to(dtype) for heads in (6, 2, 2))
    mask = torch.rand(2, 1, 700, generator=random) > 0.3 if masked else None
    bias = torch.rand(2, 700, generator=random) if biased else None

    def attend(backend: str) -> Tensor:
        with torch.inference_mode():
            return cache.attend(0, q, k, v, mask=mask, key_bias=bias, backend=backend).float()

    fused = attend("sdpa")
    keys, values = (t[0, :, :, :700].transpose(1, 2).float() for t in (cache.keys, cache.values))
    want = attention(q.float(), keys, values, mask=mask, key_bias=bias, backend="eager")
    monkeypatch.setattr(caches, "attention", None)  # auto does not come there
    got = attend("auto")
    floor = 1e-6 if dtype is torch.float32 else 2**-8
    assert (got - want).abs().max() <= max(2 * (fused - want).abs().max(), floor * want.abs().max())
    assert torch.equal(cache.keys[0, :, :, 699], k[:, 0])
    assert torch.equal(cache.values[0, :, :, 699], v[:, 0])
