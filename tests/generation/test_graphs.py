"""Static decode steps against the ones of growing caches; recording itself needs a GPU."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from aurora.generation import SamplingConfig, generate, graphs
from aurora.generation.engine import PromptState, extend, prefill
from aurora.generation.graphs import GraphDecoder, StaticStep, Stepper, make_stepper
from aurora.generation.state import Decoder
from aurora.model.captioner import AuroraModel
from aurora.model.products import Decoding
from tests.golden import RTOL_LM, assert_close_to_golden
from tests.golden_models import captioner

LENGTHS = [9, 14, 5]
compile_ = torch.compile


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> AuroraModel:
    monkeypatch.setattr(graphs, "SMALL_BUCKETS", 8)
    monkeypatch.setattr(graphs, "LOOK_AHEAD", 4)
    return captioner("kv2")


def _read(model: AuroraModel, *, biased: bool = False) -> PromptState:
    """Three prompts of different lengths, read together."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 256, (3, max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        spliced = model.splice(ids, None, attention_mask=mask, padding_side="left")
    if biased:
        spliced = spliced._replace(key_bias=torch.rand(ids.shape, generator=generator))
    return prefill(model, spliced)


def _decode(decoder: Stepper, num_steps: int, *, keep: int | None = None, reorder: int | None = None) -> list[Tensor]:
    """Logits of steps with given ids; after step `keep` row 1 leaves, after `reorder` the rows change places."""
    steps = torch.randint(3, 256, (num_steps, 3), generator=torch.Generator().manual_seed(7))
    rows, logits = torch.arange(3), []
    with torch.inference_mode():
        for step, ids in enumerate(steps):
            logits.append(decoder.step(ids[rows]))
            if step == keep:
                rows = torch.tensor([0, 2])
                decoder.keep(rows)
            if step == reorder:
                decoder.reorder(torch.tensor([1, 1, 0]))
    return logits


def _expect_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert_close_to_golden(mine, theirs, RTOL_LM)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("keep", [None, 3])
def test_static_steps_equal_direct_ones_over_bucket_borders(model: AuroraModel, keep: int | None, biased: bool) -> None:
    want = _decode(Decoder(model, _read(model, biased=biased), 30), 30, keep=keep)
    _expect_equal(_decode(GraphDecoder(model, _read(model, biased=biased), 30), 30, keep=keep), want)
    slots = {key[1] for key in model.language_model.products.steps}
    assert slots == {24, 32, 48}  # 14 tokens and 4 to come; multiples of 8 up to 32, then of 16


def test_forked_prompts_are_written_out(model: AuroraModel) -> None:
    suffixes = [[7, 8, 9], [10], []]
    want, got = (
        _decode(kind(model, extend(model, _read(model), suffixes, [2, 0, 2]), 9), 9) for kind in (Decoder, GraphDecoder)
    )
    _expect_equal(got, want)


def test_beams_change_places_behind_their_prompt(model: AuroraModel) -> None:
    states = [extend(model, _read(model), [[], [], []], [1, 1, 1]) for _ in range(2)]
    want = _decode(Decoder(model, states[0], 12), 12, reorder=5)
    _expect_equal(_decode(GraphDecoder(model, states[1], 12), 12, reorder=5), want)


def test_a_step_is_used_again_but_never_by_two_at_once(model: AuroraModel) -> None:
    first, second = (GraphDecoder(model, _read(model), 4) for _ in range(2))
    assert first._static is not second._static
    recorded = weakref.ref(first._static)
    want = _decode(Decoder(model, _read(model), 4), 4)
    _expect_equal(_decode(first, 4), want)
    _expect_equal(_decode(second, 4), want)
    del first
    gc.collect()
    third = GraphDecoder(model, _read(model), 4)
    assert third._static is recorded()
    _expect_equal(_decode(third, 4), want)


def test_what_a_failed_answer_left_behind_does_not_matter(model: AuroraModel) -> None:
    want = _decode(Decoder(model, _read(model), 12), 12)
    for slots in (24, 32):  # where an answer begins, and where it moves to
        step = StaticStep(model.language_model, batch_size=3, num_slots=slots, biased=False)
        step.cache.keys.fill_(torch.nan)
        step.cache.values.fill_(torch.nan)
        model.language_model.products.steps[3, slots, False, Decoding.recorded] = step
    decoder = GraphDecoder(model, _read(model), 12)
    _expect_equal(_decode(decoder, 12), want)
    assert decoder._static is step


def test_steps_go_when_weights_change(model: AuroraModel) -> None:
    decoder = GraphDecoder(model, _read(model), 4)
    _decode(decoder, 2)
    del decoder
    assert len(model.language_model.products.steps) == 1
    model.double()
    assert not model.language_model.products.steps


def test_only_so_many_steps_are_kept(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_STEPS_KEPT", 2)
    _decode(GraphDecoder(model, _read(model), 30), 30)
    assert [key[1] for key in model.language_model.products.steps] == [32, 48]


@pytest.mark.parametrize("steps_per_check", [1, 8])
def test_the_step_chooses_greedily_what_a_sampler_would(
    model: AuroraModel, steps_per_check: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end, rows that move into smaller steps and larger buckets; ids never pass through the host."""
    monkeypatch.setattr("aurora.generation.engine._steps_per_check", lambda device: steps_per_check)
    long = generate(model, _read(model), SamplingConfig(max_new_tokens=30, eos_token_id=-1))
    stops = [int(long.sequences[0, 6]), int(long.sequences[2, 12])]
    greedy = SamplingConfig(max_new_tokens=30, eos_token_id=stops)
    sampled = SamplingConfig(max_new_tokens=30, eos_token_id=stops, temperature=1.0, top_k=1)
    want = generate(model, _read(model), greedy)
    assert len(set(want.num_generated)) > 1
    monkeypatch.setattr("aurora.generation.engine.make_stepper", GraphDecoder)
    chosen, step = [], GraphDecoder.step
    monkeypatch.setattr(GraphDecoder, "step", lambda self, ids: chosen.append(ids) or step(self, ids))
    for config in (greedy, sampled):
        made = generate(model, _read(model), config)
        assert torch.equal(made.sequences, want.sequences)
        assert made.num_generated == want.num_generated
        assert bool(chosen) == (config is sampled)
    kept = generate(model, _read(model), greedy, keep_logits=True, keep_logprobs=True)
    assert torch.equal(kept.sequences, want.sequences)
    assert kept.logits is not None
    for row, length in enumerate(want.num_generated):
        assert torch.equal(kept.logits[row, :length].argmax(dim=-1), want.sequences[row, :length])


def test_a_step_that_fails_says_so(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora.generation.engine._steps_per_check", lambda device: 8)
    monkeypatch.setattr("aurora.generation.engine.make_stepper", GraphDecoder)
    taken, forward = [], model.language_model.forward

    def broken(*args: object, **kwargs: object) -> Tensor:
        taken.append(1)
        return forward(*args, **kwargs) * (torch.nan if len(taken) == 3 else 1)

    state = _read(model)
    monkeypatch.setattr(model.language_model, "forward", broken)
    with pytest.raises(ValueError, match="logits of new token 4 are not finite"):
        generate(model, state, SamplingConfig(max_new_tokens=9, eos_token_id=-1))


def test_a_cpu_decodes_directly(model: AuroraModel) -> None:
    assert isinstance(make_stepper(model, _read(model), 4), Decoder)


@pytest.mark.slow
def test_the_step_compiles_whole(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded on a GPU traces without a break; here with the products that a GPU has, which are no copies."""
    monkeypatch.setattr("aurora.model.products.SHARE_OF_MEMORY", 0.0)
    want = _decode(Decoder(model, _read(model), 4), 4)
    model.language_model.decoding = Decoding.compiled
    _expect_equal(_decode(GraphDecoder(model, _read(model), 4), 4), want)


def test_more_sizes_compile_than_dynamo_allows_by_itself(model: AuroraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight graphs of one function are its limit, and beyond it a whole graph is an error."""
    monkeypatch.setattr("aurora.model.products.SHARE_OF_MEMORY", 0.0)
    monkeypatch.setattr(torch, "compile", lambda run, options, **more: compile_(run, backend="eager", **more))
    model.language_model.decoding = Decoding.compiled
    for rows in range(1, 11):
        ids = torch.randint(3, 256, (rows, 5))
        decoder = GraphDecoder(model, prefill(model, model.splice(ids, None, padding_side="left")), 4)
        with torch.inference_mode():
            assert decoder.step(ids[:, 0]).shape == (rows, 256)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [Decoding.recorded, Decoding.compiled])
def test_recorded_steps_give_the_same_ids(mode: Decoding) -> None:
    model = captioner("kv2").cuda()
    spliced = model.splice(torch.randint(3, 256, (2, 40), device="cuda"), None, padding_side="left")
    sampling = SamplingConfig(max_new_tokens=50, eos_token_id=-1)
    model.language_model.decoding = Decoding.direct
    want = generate(model, spliced, sampling).sequences
    model.language_model.decoding = mode
    for _ in range(2):  # recorded, then replayed by another answer
        assert torch.equal(generate(model, spliced, sampling).sequences, want)
    assert any(isinstance(step, StaticStep) and step.graph for step in model.language_model.products.steps.values())
