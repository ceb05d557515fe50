"""Beam search: ids of transformers' beam search, an exhaustive search, and the rules of ending."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.generation.beam import BeamResult, beam_search
from aurora.generation.engine import GenerateResult, generate
from aurora.generation.sampling import SamplingConfig
from aurora.model.cache import SharedKVCache
from aurora.model.merge import MergeConfig
from tests.golden import full_case
from tests.golden_models import captioner
from tests.tiny_llama import STOPS, model, needs_transformers, padded, peer, prompts, splice


def search(rows: Sequence[Sequence[int]], **settings: Any) -> GenerateResult:
    stopper = settings.pop("stopper", None)
    return generate(model(), splice(rows), SamplingConfig(**settings), stopper=stopper, keep_logprobs=True)


def answers(made: GenerateResult | BeamResult) -> list[list[int]]:
    return [row[:length] for row, length in zip(made.sequences.tolist(), made.num_generated, strict=True)]


def reference(rows: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """New ids of transformers' beam search, which is given embeddings, so that no penalty counts the prompt.

    Cut behind the stop id: with pad id 0 it fills rows with the first stop id instead.
    """
    ids, mask = padded(rows)
    with torch.inference_mode():
        made = peer().generate(
            inputs_embeds=peer().get_input_embeddings()(ids),
            attention_mask=mask,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
    stops = settings["eos_token_id"]
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in made.tolist()]


@needs_transformers
@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.5, 2.0])
def test_ids_are_those_of_transformers(num_beams: int, early_stopping: bool, length_penalty: float) -> None:
    settings: dict[str, Any] = {
        "num_beams": num_beams,
        "early_stopping": early_stopping,
        "length_penalty": length_penalty,
        "max_new_tokens": 14,
        "eos_token_id": STOPS[:2] if num_beams == 2 else STOPS,
    }
    rows = prompts(20)
    made = search(rows, **settings)
    assert answers(made) == reference(rows, **settings)
    assert set(made.stopped_by) <= {"eos", "length"}
    if length_penalty == 1 and num_beams > 2:  # answers of many lengths, so that the comparison says something
        assert len(set(made.num_generated)) > 5


@needs_transformers
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize(
    "rules", [{"min_new_tokens": 5}, {"repetition_penalty": 1.7}, {"min_new_tokens": 3, "repetition_penalty": 0.8}]
)
def test_ids_are_those_of_transformers_with_rules(num_beams: int, rules: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": 12, "eos_token_id": STOPS, **rules}
    rows = prompts(8)
    made = search(rows, **settings)
    # One by one: with padding theirs forgets as many generated tokens as a row is padded with (5.23, embeddings given).
    assert answers(made) == [reference([row], **settings)[0] for row in rows]
    assert answers(made) != answers(search(rows, num_beams=num_beams, max_new_tokens=12, eos_token_id=STOPS))
    assert min(made.num_generated) >= rules.get("min_new_tokens", 1)


@needs_transformers
def test_ids_of_20_prompts_that_cannot_end_are_those_of_transformers() -> None:
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 30, "eos_token_id": [STOPS[0]], "min_new_tokens": 30}
    assert answers(search(prompts(20, seed=2), **settings)) == reference(prompts(20, seed=2), **settings)


@needs_transformers
@pytest.mark.parametrize("early_stopping", [False, True])
def test_ids_where_most_tokens_end_an_answer_are_those_of_transformers(early_stopping: bool) -> None:
    settings: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 8, "eos_token_id": list(range(20, 61))}
    settings |= {"early_stopping": early_stopping, "length_penalty": 3.0}
    made = search(prompts(20, seed=9), **settings)
    assert answers(made) == reference(prompts(20, seed=9), **settings)
    assert max(made.num_generated) > 2


class Table:
    """A language model of four tokens whose logits hang on all that went before; token 3 ends an answer."""

    def __init__(self, num_beams: int, seed: int) -> None:
        self.seed = seed
        self.rows: list[tuple[int, ...]] = [()] * num_beams

    def logits(self, history: tuple[int, ...]) -> Tensor:
        code = int("1" + "".join(map(str, history)), base=4)
        return torch.randn(4, generator=torch.Generator().manual_seed(1000 * self.seed + code)) * 2

    def step(self, ids: Tensor) -> Tensor:
        self.rows = [(*row, token) for row, token in zip(self.rows, ids.tolist(), strict=True)]
        return torch.stack([self.logits(row) for row in self.rows])

    def reorder(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]

    def score(self, answer: tuple[int, ...]) -> float:
        parts = [self.logits(answer[:at]).log_softmax(0)[token] for at, token in enumerate(answer)]
        return float(torch.stack(parts).sum())


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_with_enough_beams_the_best_of_all_answers_is_found(seed: int, length_penalty: float) -> None:
    limit, num_beams = 4, 200
    table = Table(num_beams, seed)
    config = SamplingConfig(num_beams=num_beams, length_penalty=length_penalty, max_new_tokens=limit)
    made = beam_search(table, table.logits(())[None], config, stop_ids=[3], limits=[limit], pad_token_id=0)
    everything = [
        answer
        for length in range(1, limit + 1)
        for answer in itertools.product(range(4), repeat=length)
        if 3 not in answer[:-1] and (answer[-1] == 3 or length == limit)
    ]
    best = max(everything, key=lambda answer: table.score(answer) / len(answer) ** length_penalty)
    assert answers(made) == [list(best)]
    assert float(made.scores) == pytest.approx(table.score(best) / len(best) ** length_penalty, rel=1e-5)
    assert made.stopped_by == ["eos" if best[-1] == 3 else "length"]


def test_a_prompt_gets_alone_what_it_gets_in_a_batch() -> None:
    rows = prompts(6, seed=3)
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 12, "eos_token_id": STOPS}
    together = search(rows, **settings)
    assert together.logprobs is not None
    for index, row in enumerate(rows):
        alone = search([row], **settings)
        assert alone.logprobs is not None
        length = alone.num_generated[0]
        assert answers(alone)[0] == answers(together)[index]
        assert alone.stopped_by[0] == together.stopped_by[index]
        assert torch.allclose(alone.logprobs[0], together.logprobs[index, :length], atol=1e-5)
        assert not together.logprobs[index, length:].any()
        assert not together.sequences[index, length:].any()
    assert len(set(together.num_generated)) > 2


def test_log_probabilities_are_the_models_before_any_rule() -> None:
    rows = prompts(4, seed=4)
    made = search(rows, num_beams=3, max_new_tokens=8, repetition_penalty=1.5)
    assert made.logprobs is not None
    for row, answer, found in zip(rows, answers(made), made.logprobs, strict=True):
        ids = torch.tensor([row + answer])
        with torch.no_grad():
            logits = model().language_model(
                model().language_model.embed(ids), position_ids=torch.arange(ids.shape[1])[None]
            )
        want = logits[0, len(row) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert torch.allclose(found[: len(answer)], want, atol=1e-4)


def test_a_prompt_whose_context_is_short_ends_there_and_leaves_the_others_alone() -> None:
    rows = [*prompts(3, seed=5), list(range(3, 60))]  # the last one has room for 64 - 57 = 7 tokens
    made = search(rows, num_beams=3, max_new_tokens=10)
    assert made.num_generated == [10, 10, 10, 7]
    assert made.stopped_by == ["length"] * 3 + ["context"]
    assert answers(made)[:3] == answers(search(rows[:3], num_beams=3, max_new_tokens=10))
    assert answers(made)[3] == answers(search(rows[3:], num_beams=3, max_new_tokens=7))[0]


def test_a_stop_string_ends_a_hypothesis_as_a_stop_id_does() -> None:
    rows = prompts(8, seed=6)
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 14, "length_penalty": 0.5}
    by_id = search(rows, eos_token_id=STOPS[3], **settings)
    by_text = search(rows, stopper=lambda given: [row[-1] == STOPS[3] for row in given], **settings)
    assert answers(by_id) == answers(by_text)
    assert "eos" in by_id.stopped_by
    assert by_text.stopped_by == ["stop" if reason == "eos" else reason for reason in by_id.stopped_by]


def test_all_beams_read_one_prompt_and_move_their_suffixes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, int]] = []
    real = SharedKVCache.reorder

    def spy(self: SharedKVCache, rows: Tensor) -> None:
        moved.append((self.prompt_keys.shape[1], self.keys.shape[1]))
        real(self, rows)

    monkeypatch.setattr(SharedKVCache, "reorder", spy)
    search(prompts(2), num_beams=4, max_new_tokens=6)
    assert moved == [(2, 8)] * 5


def test_beams_over_a_clip_are_those_of_the_prompt_alone() -> None:
    inputs = full_case("vid4_r0.4")
    tower = captioner("kv2")
    config = SamplingConfig(num_beams=3, max_new_tokens=8, eos_token_id=-1)
    ids, width = inputs["input_ids"], inputs["input_ids"].shape[1]
    longer = torch.cat([ids, torch.tensor([[9, 17, 30]])], dim=1)
    both = torch.cat([torch.nn.functional.pad(ids, (3, 0)), longer])
    mask = torch.tensor([[0] * 3 + [1] * width, [1] * (width + 3)])
    with torch.no_grad():
        visual = tower.encode(inputs["pixel_values"].repeat(2, 1, 1, 1, 1), merge=MergeConfig(token_kept_ratio=0.4))
        single = tower.encode(inputs["pixel_values"], merge=MergeConfig(token_kept_ratio=0.4))
        together = generate(tower, tower.splice(both, visual, attention_mask=mask, padding_side="left"), config)
        for row, prompt in enumerate((ids, longer)):
            alone = generate(tower, tower.splice(prompt, single, padding_side="left"), config)
            assert alone.sequences[0].tolist() == together.sequences[row].tolist()


def test_beams_stream_when_the_search_is_over_and_keep_no_logits() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.columns: list[list[int]] = []

        def put(self, ids: Tensor) -> None:
            self.columns.append(ids.tolist())

        def end(self) -> None:
            self.columns.append([])

    recorder = Recorder()
    config = SamplingConfig(num_beams=2, max_new_tokens=5)
    made = generate(model(), splice(prompts(2)), config, streamer=recorder)
    assert recorder.columns == [*made.sequences.t().tolist(), []]
    with pytest.raises(ValueError, match=r"num_beams=2: .* want num_beams=1"):
        generate(model(), splice(prompts(1)), config, keep_logits=True)
