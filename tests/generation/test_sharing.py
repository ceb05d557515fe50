"""Prompts read apart, together and from a common beginning: the ids and log-probabilities of single runs."""

import pytest
import torch

from aurora.generation import SamplingConfig, generate
from aurora.generation.engine import Decoder, GenerateResult, extend, prefill
from aurora.model.cache import KVCache
from aurora.model.captioner import AuroraModel, Spliced
from aurora.model.ragged_cache import RaggedKVCache
from tests.golden_models import captioner


@pytest.fixture(scope="module")
def model() -> AuroraModel:
    model = captioner("kv2")
    model.config.eos_token_id = -1
    return model


def texts(*lengths: int, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 256, (length,), generator=generator).tolist() for length in lengths]


def splice(model: AuroraModel, *rows: list[int]) -> Spliced:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    with torch.no_grad():
        return model.splice(ids, None, attention_mask=mask, padding_side="left")


def run(model: AuroraModel, rows: list[list[int]], **settings: object) -> GenerateResult:
    config = SamplingConfig(**{"max_new_tokens": 12, **settings})  # type: ignore[arg-type]
    return generate(model, splice(model, *rows), config, keep_logprobs=True)


@pytest.mark.parametrize("lengths", [(7, 300, 90, 12), (150, 20, 150, 149, 21), (260, 9)])
def test_rows_of_very_different_lengths_are_read_apart_and_get_what_they_get_alone(
    model: AuroraModel, lengths: tuple[int, ...]
) -> None:
    rows = texts(*lengths)
    state = prefill(model, splice(model, *rows), room=12)
    assert isinstance(state.cache, RaggedKVCache)
    assert sum(part.max_length * part.batch_size for part in state.cache.parts) < len(rows) * max(lengths)
    together = run(model, rows)
    for row, ids in enumerate(rows):
        alone = run(model, [ids])
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()
        assert float((together.logprobs[row] - alone.logprobs[0]).abs().max()) < 1e-4


def test_long_rows_go_on_alone_when_half_have_ended(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = texts(9, 200, 30, 31, 110, 12)
    free = run(model, rows, max_new_tokens=20).sequences.tolist()
    early = {token: sum(token in ids[:8] for ids in free) for ids in free for token in ids}
    stop = max(early, key=lambda token: (early[token] < len(rows)) * early[token])
    assert early[stop] >= 1
    stops = [stop, free[0][3], free[3][5], free[4][2]]
    kept: list[int] = []
    real = Decoder.keep
    monkeypatch.setattr(Decoder, "keep", lambda self, chosen: (kept.append(len(chosen)), real(self, chosen))[1])
    result = run(model, rows, max_new_tokens=20, eos_token_id=stops)
    for got, whole, length, reason in zip(
        result.sequences.tolist(), free, result.num_generated, result.stopped_by, strict=True
    ):
        end = next((index + 1 for index, token in enumerate(whole) if token in stops), 20)
        assert (length, reason) == (end, "eos" if whole[end - 1] in stops else "length")
        assert got == whole[:end] + [0] * (len(got) - end)
    assert kept
    assert kept[0] <= len(rows) // 2


@pytest.mark.parametrize("every", [3, 8, 64])
@pytest.mark.parametrize("sampled", [False, True])
def test_looking_at_the_ids_rarely_changes_nothing(
    model: AuroraModel, monkeypatch: pytest.MonkeyPatch, every: int, sampled: bool
) -> None:
    """As on a GPU, where the host learns the ids every few steps."""
    settings = {"temperature": 0.8, "seed": [1, 2, 3, 4]} if sampled else {}
    rows = texts(9, 100, 30, 12)
    free = run(model, rows, max_new_tokens=20, **settings)
    stops = [int(free.sequences[0, 2]), int(free.sequences[1, 4]), int(free.sequences[3, 7])]
    want = run(model, rows, max_new_tokens=20, eos_token_id=stops, **settings)
    monkeypatch.setattr("aurora.generation.engine._steps_per_check", lambda device: every)
    got = run(model, rows, max_new_tokens=20, eos_token_id=stops, **settings)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert (got.num_generated, got.stopped_by) == (want.num_generated, want.stopped_by)
    assert torch.allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_log_probabilities_are_those_of_the_tokens_and_0_behind_the_end(model: AuroraModel) -> None:
    rows = texts(9, 14)
    stop = int(run(model, rows).sequences[0, 2])
    result = generate(
        model,
        splice(model, *rows),
        SamplingConfig(max_new_tokens=6, eos_token_id=stop, temperature=0.7, seed=3, repetition_penalty=1.3),
        keep_logits=True,
        keep_logprobs=True,
    )
    assert result.logits is not None
    want = result.logits.log_softmax(-1).gather(2, result.sequences[:, :, None])[..., 0]
    for row, length in enumerate(result.num_generated):
        assert torch.allclose(result.logprobs[row, :length], want[row, :length], atol=1e-6)
        assert not result.logprobs[row, length:].any()


@pytest.mark.parametrize("lengths", [(40, 43), (300, 8)], ids=["one part", "ragged"])
def test_texts_that_go_on_from_read_prompts_get_what_they_get_when_read_whole(
    model: AuroraModel, lengths: tuple[int, int]
) -> None:
    prompts, suffixes = texts(*lengths), [*texts(5, 1, 17, seed=6), []]
    row_of = [1, 0, 1, 0]
    state = prefill(model, splice(model, *prompts))
    before = [part.keys.clone() for part in _parts(state.cache)]
    for _ in range(2):  # a state may be extended again
        forked = extend(model, state, suffixes, row_of, room=12)
        result = generate(model, forked, SamplingConfig(max_new_tokens=12), keep_logprobs=True)
        for row, (prompt, suffix) in enumerate(zip(row_of, suffixes, strict=True)):
            whole = run(model, [prompts[prompt] + suffix])
            assert result.sequences[row].tolist() == whole.sequences[0].tolist()
            assert float((result.logprobs[row] - whole.logprobs[0]).abs().max()) < 1e-4
            assert forked.lengths[row] == len(prompts[prompt]) + len(suffix)
    assert all(torch.equal(part.keys, old) for part, old in zip(_parts(state.cache), before, strict=True))


def _parts(cache: KVCache) -> list[KVCache]:
    return cache.parts if isinstance(cache, RaggedKVCache) else [cache]


def test_a_fork_of_a_fork_goes_on(model: AuroraModel) -> None:
    """As in a conversation, where two answers to one turn are both followed."""
    (prompt,) = texts(60)
    first, second, third = texts(4, 9, 3, seed=7)
    turn = extend(model, prefill(model, splice(model, prompt)), [first, second], [0, 0])
    both = extend(model, turn, [third, third, []], [1, 0, 1], room=12)
    made = generate(model, both, SamplingConfig(max_new_tokens=8)).sequences
    for row, text in enumerate((second + third, first + third, second)):
        assert made[row].tolist() == run(model, [prompt + text], max_new_tokens=8).sequences[0].tolist()


@pytest.mark.parametrize("lengths", [(9, 14, 11), (9, 200, 30)], ids=["one part", "ragged"])
def test_beams_of_a_batch_are_those_of_single_prompts(model: AuroraModel, lengths: tuple[int, ...]) -> None:
    rows = texts(*lengths)
    stops = [int(token) for token in run(model, rows).sequences[:, 3]]
    settings = {"num_beams": 3, "eos_token_id": stops, "max_new_tokens": 10}
    together = run(model, rows, **settings)
    greedy = run(model, rows, eos_token_id=stops, max_new_tokens=10)
    better = 0
    for row, ids in enumerate(rows):
        alone, length = run(model, [ids], **settings), together.num_generated[row]
        assert together.sequences[row, :length].tolist() == alone.sequences[0].tolist()
        assert together.stopped_by[row] == alone.stopped_by[0]
        mean = (together.logprobs[row].sum() / length, greedy.logprobs[row].sum() / greedy.num_generated[row])
        better += bool(mean[0] > mean[1] + 1e-4)
    assert better >= 1


def test_beams_end_with_the_context_stream_at_their_end_and_keep_no_logits(
    model: AuroraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Columns:
        def __init__(self) -> None:
            self.columns: list[list[int]] = []
            self.ended = 0

        def put(self, ids: torch.Tensor) -> None:
            self.columns.append(ids.tolist())

        def end(self) -> None:
            self.ended += 1

    rows, config, streamer = texts(9, 14), SamplingConfig(num_beams=2, max_new_tokens=6), Columns()
    monkeypatch.setattr(model.config.text, "max_seq_len", 18)
    result = generate(model, splice(model, *rows), config, streamer=streamer)
    assert (result.num_generated, result.stopped_by) == ([6, 4], ["length", "context"])
    assert torch.tensor(streamer.columns).t().tolist() == result.sequences.tolist()
    assert (streamer.ended, result.logprobs) == (1, None)
    with pytest.raises(ValueError, match=r"num_beams=2: .*want num_beams=1 with output_logits"):
        generate(model, splice(model, *rows), config, keep_logits=True)


@torch.inference_mode()
def test_a_ragged_cache_selects_reorders_and_grows_like_its_parts(model: AuroraModel) -> None:
    rows = texts(200, 9, 100, 8)
    state = prefill(model, splice(model, *rows), room=1)
    state.cache.grow(state.cache.length + 40)
    assert state.cache.max_length >= 240
    ids = torch.tensor([4, 5, 6, 7])
    want = Decoder(model, prefill(model, splice(model, *rows), room=2), 3).step(ids)
    decoder = Decoder(model, state, 40)
    decoder.keep(torch.tensor([3, 0]))
    assert torch.allclose(decoder.step(ids[[3, 0]]), want[[3, 0]], atol=1e-4)
    forked = extend(model, prefill(model, splice(model, *rows)), [[]] * 4, [0, 0, 1, 1], room=4)
    decoder = Decoder(model, forked, 4)
    decoder.step(torch.tensor([4, 5, 6, 7]))
    decoder.reorder(torch.tensor([1, 1, 2, 2]))
    logits = decoder.step(torch.tensor([8, 9, 8, 9]))
    for row, text in enumerate(([5, 8], [5, 9], [6, 8], [6, 9])):
        alone = prefill(model, splice(model, rows[row // 2] + text)).logits[0]
        assert torch.allclose(logits[row], alone, atol=1e-4)
