"""The generation loop against full recomputation, batches against single rows, stopping, streaming, the cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.generation import SamplingConfig, check_context, generate
from aurora.generation.engine import Decoder, GenerateResult
from aurora.model.cache import KVCache
from aurora.model.captioner import AuroraModel, Spliced
from aurora.model.merge import MergeConfig
from tests.golden import full_case
from tests.golden_models import captioner


@pytest.fixture(scope="module")
def model() -> AuroraModel:
    model = captioner("kv2")
    model.config.eos_token_id = -1
    return model


def splice(model: AuroraModel, case: str, ratio: float = 0.4) -> Spliced:
    inputs = full_case(case)
    with torch.no_grad():
        visual = model.encode(inputs["pixel_values"], merge=MergeConfig(token_kept_ratio=ratio))
        return model.splice(inputs["input_ids"], visual, attention_mask=inputs["attention_mask"], padding_side="left")


def text_batch(model: AuroraModel, lengths: list[int]) -> tuple[Spliced, list[Spliced]]:
    """Random text rows, left-padded together and each alone."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 256, (1, length), generator=generator) for length in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths]).bool()
    with torch.no_grad():
        together = model.splice(ids, None, attention_mask=mask, padding_side="left")
        return together, [model.splice(row, None, padding_side="left") for row in rows]


def run(model: AuroraModel, spliced: Spliced, **settings: Any) -> GenerateResult:
    keep = settings.pop("keep_logits", False)
    return generate(model, spliced, SamplingConfig(**settings), keep_logits=keep)


def recompute(model: AuroraModel, spliced: Spliced, num_steps: int) -> tuple[Tensor, Tensor]:
    """Greedy generation of one unpadded row that runs the whole sequence anew for each token."""
    embeds, ids, kept = spliced.inputs_embeds, [], []
    with torch.no_grad():
        for _ in range(num_steps):
            positions = torch.arange(embeds.shape[1])[None]
            logits = model.language_model(embeds, position_ids=positions)[:, -1]
            kept.append(logits)
            ids.append(logits.argmax(-1))
            embeds = torch.cat([embeds, model.language_model.embed(ids[-1][:, None])], dim=1)
    return torch.stack(ids, dim=1), torch.stack(kept, dim=1)


def test_cached_decoding_equals_full_recomputation(model: AuroraModel) -> None:
    spliced = splice(model, "vid4_r0.4")
    ids, logits = recompute(model, spliced, 20)
    result = run(model, spliced, max_new_tokens=20, keep_logits=True)
    assert torch.equal(result.sequences, ids)
    assert result.logits is not None
    assert float((result.logits - logits).abs().max()) <= 2e-5 * float(logits.abs().max())


def test_cache_grows_over_bucket_borders_without_a_change(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spliced, _ = text_batch(model, [9, 14])
    whole = run(model, spliced, max_new_tokens=40)
    grown: list[int] = []
    real = KVCache.grow
    monkeypatch.setattr("aurora.generation.state.CACHE_BUCKET", 4)
    monkeypatch.setattr(KVCache, "grow", lambda self, slots: (grown.append(slots), real(self, slots))[1])
    assert torch.equal(run(model, spliced, max_new_tokens=40).sequences, whole.sequences)
    assert grown == [24, 36, 54]


def test_long_limits_do_not_allocate_what_is_not_used(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    real = KVCache.__init__

    def spy(self: KVCache, *args: Any, **kwargs: Any) -> None:
        allocated.append(kwargs["max_length"])
        real(self, *args, **kwargs)

    monkeypatch.setattr(KVCache, "__init__", spy)
    spliced, _ = text_batch(model, [6])
    first = int(run(model, spliced, max_new_tokens=1).sequences[0, 0])
    run(model, spliced, max_new_tokens=900, eos_token_id=first)
    assert allocated == [7, 256]


@pytest.mark.parametrize("lengths", [[5, 17], [1, 2, 30], [8, 8]])
def test_greedy_ids_and_log_probabilities_do_not_depend_on_the_batch(model: AuroraModel, lengths: list[int]) -> None:
    together, alone = text_batch(model, lengths)
    batch = run(model, together, max_new_tokens=16, keep_logits=True)
    assert batch.logits is not None
    for row, spliced in enumerate(alone):
        single = run(model, spliced, max_new_tokens=16, keep_logits=True)
        assert single.logits is not None
        assert batch.sequences[row].tolist() == single.sequences[0].tolist()
        drift = batch.logits[row].log_softmax(-1) - single.logits[0].log_softmax(-1)
        assert float(drift.abs().max()) < 1e-4


def test_rows_end_each_by_themselves_and_are_filled_with_the_pad_id(model: AuroraModel) -> None:
    together, _ = text_batch(model, [6, 11, 4])
    free = run(model, together, max_new_tokens=12)
    assert free.stopped_by == ["length"] * 3
    assert free.num_generated == [12] * 3
    stop = int(free.sequences[1, 3])
    result = run(model, together, max_new_tokens=12, eos_token_id=stop)
    for row in range(3):
        ids = free.sequences[row].tolist()
        length = ids.index(stop) + 1 if stop in ids else 12
        assert result.num_generated[row] == length
        assert result.stopped_by[row] == ("eos" if stop in ids else "length")
        padding = [model.config.pad_token_id] * (result.sequences.shape[1] - length)
        assert result.sequences[row].tolist() == ids[:length] + padding
    assert result.num_generated[1] < 12


def test_generation_ends_when_every_row_has(model: AuroraModel) -> None:
    together, _ = text_batch(model, [6, 11])
    free = run(model, together, max_new_tokens=6)
    stops = [int(token) for token in free.sequences[:, 1]]
    result = run(model, together, max_new_tokens=500, eos_token_id=stops)
    assert result.sequences.shape[1] == 2
    assert result.stopped_by == ["eos", "eos"]
    never = run(model, together, max_new_tokens=6, eos_token_id=-1)
    assert torch.equal(never.sequences, free.sequences)


def test_a_row_that_fills_the_context_ends_there(model: AuroraModel) -> None:
    together, alone = text_batch(model, [6, 11])
    free = run(model, together, max_new_tokens=12)
    model.config.text.max_seq_len = 16
    try:
        result = run(model, together, max_new_tokens=8)
        assert result.stopped_by == ["length", "context"]
        assert result.num_generated == [8, 5]
        assert result.sequences[0].tolist() == free.sequences[0, :8].tolist()
        assert result.sequences[1].tolist() == free.sequences[1, :5].tolist() + [0] * 3
        assert run(model, alone[0], max_new_tokens=8).sequences.tolist() == [result.sequences[0].tolist()]
        assert run(model, alone[1], max_new_tokens=5).stopped_by == ["length"]
        full, _ = text_batch(model, [16, 3])
        with pytest.raises(ValueError, match=r"row 0: .* = 16 prompt tokens leave no room .* want at most 15"):
            run(model, full)
    finally:
        model.config.text.max_seq_len = 1024


def test_context_check_gives_the_room_or_the_numbers() -> None:
    assert check_context([10, 5], [20, 0], 40) == [10, 35]
    assert check_context([39], [0], 40) == [1]
    with pytest.raises(ValueError, match=r"row 1: 12 text \+ 30 visual = 42 prompt tokens .*text.max_seq_len=40"):
        check_context([1, 12], [0, 30], 40)
    with pytest.raises(ValueError, match="row 0: the prompt is empty"):
        check_context([0], [0], 40)


class Recorder:
    def __init__(self) -> None:
        self.columns: list[list[int]] = []
        self.ended = 0

    def put(self, ids: Tensor) -> None:
        assert ids.device.type == "cpu"
        self.columns.append(ids.tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_every_column_once_and_its_end_also_after_an_error(model: AuroraModel) -> None:
    together, _ = text_batch(model, [6, 11])
    stop = int(run(model, together, max_new_tokens=4).sequences[0, 1])
    streamer = Recorder()
    config = SamplingConfig(max_new_tokens=6, eos_token_id=stop)
    result = generate(model, together, config, streamer=streamer)
    assert torch.tensor(streamer.columns).t().tolist() == result.sequences.tolist()
    assert streamer.ended == 1
    broken = together._replace(attention_mask=together.attention_mask.flip(1))
    with pytest.raises(ValueError, match="a row ends in padding, want prompts padded on the left"):
        generate(model, broken, config, streamer=streamer)
    assert streamer.ended == 2


def test_sampling_repeats_with_its_seed_and_ignores_the_neighbours(model: AuroraModel) -> None:
    together, alone = text_batch(model, [6, 11])
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 50}
    first = run(model, together, seed=[3, 4], **settings).sequences
    assert torch.equal(first, run(model, together, seed=[3, 4], **settings).sequences)
    assert first[1].tolist() == run(model, alone[1], seed=4, **settings).sequences[0].tolist()
    assert not torch.equal(first, run(model, together, seed=[5, 6], **settings).sequences)


def test_logits_that_are_not_finite_are_an_error_not_a_caption(model: AuroraModel) -> None:
    spliced, _ = text_batch(model, [6])
    broken = spliced._replace(inputs_embeds=spliced.inputs_embeds * float("nan"))
    with pytest.raises(ValueError, match=r"logits of the prompt are not finite in torch\.float32"):
        run(model, broken)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("steps_per_check", [1, 8])
def test_logits_that_cease_to_be_finite_are_an_error_too(
    model: AuroraModel, num_beams: int, value: str, steps_per_check: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = text_batch(model, [6, 9])
    monkeypatch.setattr("aurora.generation.engine._steps_per_check", lambda device: steps_per_check)
    step, taken = Decoder.step, []

    def broken(self: Decoder, ids: Tensor) -> Tensor:
        logits = step(self, ids)
        taken.append(len(logits))
        if len(taken) == 3:
            logits[-1, 5] = float(value)
        return logits

    monkeypatch.setattr(Decoder, "step", broken)
    with pytest.raises(ValueError, match=r"logits of new token 4 are not finite in torch\.float32; want a wider dtype"):
        run(model, together, max_new_tokens=12, num_beams=num_beams)


def test_a_row_that_has_ended_may_fail(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run along with the others until the ids are looked at; what it computes then is nobody's."""
    together, _ = text_batch(model, [6, 9])
    want = run(model, together, max_new_tokens=6).sequences
    stop = int(want[0, 1])
    assert stop not in want[1]
    monkeypatch.setattr("aurora.generation.engine._steps_per_check", lambda device: 8)
    step, taken = Decoder.step, []

    def broken(self: Decoder, ids: Tensor) -> Tensor:
        logits = step(self, ids)
        taken.append(len(logits))
        if len(taken) > 2:
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(Decoder, "step", broken)
    got = run(model, together, max_new_tokens=6, eos_token_id=stop)
    assert got.sequences[1].tolist() == want[1].tolist()
    assert got.num_generated == [2, 6]


def test_seconds_are_measured_for_both_phases(model: AuroraModel) -> None:
    spliced, _ = text_batch(model, [6])
    model.language_model.products.clear()
    seconds = run(model, spliced, max_new_tokens=3).seconds
    assert set(seconds) == {"prefill", "decode", "warmup"}
    assert all(0 < value < 60 for value in seconds.values())
    assert run(model, spliced, max_new_tokens=3).seconds["warmup"] == 0  # the weights are arranged already
