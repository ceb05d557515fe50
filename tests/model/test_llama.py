"""The decoder: cache, masks, grouped heads, rotary scaling, tied head."""

import math

import pytest
import torch
from torch import Tensor

from aurora.model.attention import attention
from aurora.model.cache import KVCache
from aurora.model.llama import Llama, LlamaConfig, RMSNorm, RopeScaling, rotary_frequencies
from tests.golden import RTOL_LM, assert_close_to_golden


def _llama(**changes: object) -> Llama:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    return Llama(LlamaConfig(**{**sizes, "max_seq_len": 64, **changes})).eval()


def _run(model: Llama, embeds: Tensor, start: int = 0, **kwargs: object) -> Tensor:
    positions = torch.arange(start, start + embeds.shape[1]).expand(len(embeds), -1)
    with torch.no_grad():
        return model(embeds, **{"position_ids": positions, **kwargs})


def _embeds(model: Llama, rows: int = 2, length: int = 11) -> Tensor:
    ids = torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.embed(ids)


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [10, 1], [11]], ids=str)
def test_cached_decoding_equals_full_recomputation(pieces: list[int]) -> None:
    model = _llama()
    embeds = _embeds(model)
    full = _run(model, embeds)
    cache = KVCache(model.config, batch_size=2, max_length=11, device="cpu", dtype=torch.float32)
    parts = [_run(model, piece, cache.length, cache=cache) for piece in embeds.split(pieces, dim=1)]
    assert cache.length == 11
    assert_close_to_golden(torch.cat(parts, dim=1), full, RTOL_LM)


def test_a_full_cache_says_so_and_can_grow() -> None:
    model = _llama()
    embeds = _embeds(model)
    cache = KVCache(model.config, batch_size=2, max_length=6, device="cpu", dtype=torch.float32)
    _run(model, embeds[:, :6], cache=cache)
    with pytest.raises(ValueError, match=r"7.*6"):
        _run(model, embeds[:, 6:7], 6, cache=cache)
    cache.grow(20)
    assert cache.length == 6
    assert cache.max_length == 20
    assert_close_to_golden(_run(model, embeds[:, 6:], 6, cache=cache), _run(model, embeds)[:, 6:], RTOL_LM)


def test_left_padding_with_a_cache_equals_the_row_alone() -> None:
    model = _llama()
    embeds = _embeds(model)
    padded = torch.cat([torch.zeros(2, 3, 32), embeds[:, :8]], dim=1)
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[:, :3] = False
    cache = KVCache(model.config, batch_size=2, max_length=14, device="cpu", dtype=torch.float32)
    positions = (torch.arange(11) - 3).clamp_min(0).expand(2, -1)
    first = _run(model, padded, position_ids=positions, attention_mask=valid[:, :11], cache=cache)
    full = _run(model, embeds)
    assert torch.isfinite(first).all()
    assert_close_to_golden(first[:, 3:], full[:, :8], RTOL_LM)
    for step in range(3):
        out = _run(model, embeds[:, 8 + step : 9 + step], 8 + step, attention_mask=valid[:, : 12 + step], cache=cache)
        assert_close_to_golden(out[:, 0], full[:, 8 + step], RTOL_LM)


def test_only_the_wanted_logits_are_computed() -> None:
    model = _llama()
    embeds = _embeds(model)
    assert _run(model, embeds, logits_to_keep=1).shape == (2, 1, 50)
    assert_close_to_golden(_run(model, embeds, logits_to_keep=3), _run(model, embeds)[:, -3:])


def test_later_tokens_change_nothing_before_them() -> None:
    model = _llama()
    embeds = _embeds(model)
    changed = embeds.clone()
    changed[:, 7:] += 1
    before, after = _run(model, embeds), _run(model, changed)
    assert_close_to_golden(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().max() > 1e-3


def test_grouped_heads_equal_repeated_ones() -> None:
    grouped, full = _llama(num_kv_heads=2), _llama(num_kv_heads=4)
    state = grouped.state_dict()
    for key in [k for k in state if "k_proj" in k or "v_proj" in k]:
        state[key] = state[key].view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32)
    full.load_state_dict(state)
    assert_close_to_golden(_run(full, _embeds(grouped)), _run(grouped, _embeds(grouped)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_norm_of_one_token_is_its_norm_among_others(dtype: torch.dtype) -> None:
    norm = RMSNorm(70, 1e-5).to(dtype)
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).mul(5).to(dtype)
    x[1] = 0
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        alone = torch.cat([norm(row[None]) for row in x])
    step = torch.finfo(dtype).eps
    for want in (norm(x).detach(), torch.no_grad()(norm)(x)):  # as in training, and as for a prompt
        assert alone.dtype == want.dtype == dtype
        torch.testing.assert_close(alone, want, rtol=2 * step, atol=0)


def test_a_tied_head_has_no_weights_of_its_own() -> None:
    model = _llama(tie_word_embeddings=True)
    assert "lm_head.weight" not in model.state_dict()
    assert "lm_head.weight" in _llama().state_dict()
    assert _run(model, _embeds(model)).shape == (2, 11, 50)


def test_linear_scaling_divides_the_positions() -> None:
    plain, scaled = _llama(), _llama(rope_scaling=RopeScaling(rope_type="linear", factor=4.0))
    embeds = _embeds(plain)
    far = 4 * torch.arange(11).expand(2, -1)
    assert_close_to_golden(_run(scaled, embeds, position_ids=far), _run(plain, embeds))
    assert (_run(scaled, embeds) - _run(plain, embeds)).abs().max() > 1e-3


def test_llama3_scaling_follows_its_definition() -> None:
    scaling = RopeScaling(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )
    config = LlamaConfig(hidden_size=128, num_heads=1, num_kv_heads=1, rope_theta=500000.0, rope_scaling=scaling)
    got = rotary_frequencies(config, torch.device("cpu")).tolist()
    kept = divided = between = 0
    for channel, value in enumerate(got):
        frequency = 500000.0 ** (-2 * channel / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            want, kept = frequency, kept + 1
        elif wavelength > 8192:
            want, divided = frequency / 8, divided + 1
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want, between = (1 - smooth) * frequency / 8 + smooth * frequency, between + 1
        assert value == pytest.approx(want, rel=1e-5)
    assert kept
    assert divided
    assert between


def test_rotary_angles_stay_exact_in_half_precision() -> None:
    model, half = _llama(max_seq_len=16384), _llama(max_seq_len=16384).to(torch.bfloat16)
    embeds = _embeds(model)
    far = torch.arange(9000, 9011).expand(2, -1)
    # Only differences of positions count, so a shift by 9000 may cost rounding but not meaning.
    near, shifted = (_run(half, embeds.bfloat16(), position_ids=p).float() for p in (far - 9000, far))
    assert (near - shifted).abs().max() < 0.05 * near.abs().max()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize(
    "kind", ["plain", "causal", "continued", "mask", "key_bias", "causal_key_bias", "mask_key_bias"]
)
def test_attention_backends_agree_with_the_formula(kind: str, heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    num_queries = 3 if kind == "continued" else 7
    q = torch.randn(2, num_queries, heads[0], 8, generator=generator)
    k, v = torch.randn(2, 2, 7, heads[1], 8, generator=generator)
    causal = kind in ("causal", "continued", "causal_key_bias")
    mask = torch.rand(2, num_queries, 7, generator=generator) < 0.7 if kind.startswith("mask") else None
    if mask is not None:
        mask |= torch.eye(7, dtype=torch.bool)
    bias = torch.randint(1, 9, (2, 7), generator=generator).float().log() if kind.endswith("key_bias") else None

    allowed = torch.ones(2, num_queries, 7, dtype=torch.bool) if mask is None else mask
    if causal:
        allowed = allowed & torch.ones(7, 7, dtype=torch.bool).tril()[7 - num_queries :]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(heads[0] // heads[1], dim=2)) / math.sqrt(8)
    scores = scores + (0 if bias is None else bias[:, None, None])
    weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    want = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(heads[0] // heads[1], dim=2))
    for backend in ("eager", "sdpa", "auto"):
        got = attention(q, k, v, causal=causal, mask=mask, key_bias=bias, backend=backend)
        assert_close_to_golden(got, want)


def test_attention_refuses_what_it_does_not_know() -> None:
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"attn_implementation='flash'.*eager"):
        attention(x, x, x, backend="flash")
    with pytest.raises(ValueError, match="causal"):
        attention(x, x, x, causal=True, mask=torch.ones(1, 2, 2, dtype=torch.bool))
