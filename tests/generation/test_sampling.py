"""How a next token is chosen: distributions, reproducibility row by row, and refusals."""

import math
from typing import Any

import pytest
import torch

from aurora.generation.options import merge_for_call, split_options
from aurora.generation.sampling import Sampler, SamplingConfig, filter_probabilities
from aurora.model.merge import MergeConfig, Schedule, SizeBias

CPU = torch.device("cpu")
LOGITS = torch.tensor([[0.1, 2.0, -1.0, 1.5, 0.3]])


def draw(logits: torch.Tensor, num_steps: int, **settings: Any) -> list[list[int]]:
    sampler = Sampler(SamplingConfig(**settings), batch_size=len(logits), vocab_size=logits.shape[1], device=CPU)
    return torch.stack([sampler(logits) for _ in range(num_steps)], dim=1).tolist()


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id() -> None:
    assert draw(LOGITS, 2) == [[1, 1]]
    assert draw(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0]]), 1) == [[1], [0]]


def test_frequencies_follow_the_softmax_at_its_temperature() -> None:
    count = 5_000
    drawn = torch.tensor(draw(LOGITS, count, temperature=0.7, seed=3)[0]).bincount(minlength=5) / count
    assert torch.allclose(drawn, (LOGITS[0] / 0.7).softmax(0), atol=4 * math.sqrt(0.25 / count))


def test_top_k_keeps_k_and_top_p_the_fewest_that_reach_it() -> None:
    full = LOGITS.double().softmax(-1)
    assert torch.allclose(filter_probabilities(LOGITS), full)
    assert (filter_probabilities(LOGITS, top_k=2) > 0).tolist() == [[False, True, False, True, False]]
    first = float(full.max())
    for top_p, kept in ((1e-9, 1), (first - 1e-6, 1), (first + 1e-6, 2), (0.999999, 5)):
        assert int((filter_probabilities(LOGITS, top_p=top_p) > 0).sum()) == kept, top_p
    assert filter_probabilities(torch.zeros(1, 4), top_k=2)[0].tolist() == [0.5, 0.5, 0.0, 0.0]  # ties: lowest ids
    assert set(draw(LOGITS, 200, temperature=5.0, top_k=2, seed=0)[0]) == {1, 3}
    # top_p counts among what top_k left: 0.622 of the two kept reaches 0.6, where 0.502 of all would not.
    assert int((filter_probabilities(LOGITS, top_k=2, top_p=0.6) > 0).sum()) == 1


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    together = draw(logits, 20, temperature=1.0, seed=[7, 8, 9])
    for row, seed in enumerate((7, 8, 9)):
        assert draw(logits[row : row + 1], 20, temperature=1.0, seed=seed) == [together[row]]
    shared = draw(logits, 20, temperature=1.0, seed=8)
    assert shared[1] == together[1]


def test_no_seed_follows_the_default_generator() -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(draw(torch.zeros(2, 1000), 10, temperature=1.0))
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_repetition_penalty_punishes_generated_tokens_of_either_sign_in_their_row_alone() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.5], [-1.0, -1.4, -3.0]])
    assert draw(logits, 4, repetition_penalty=1.5) == [[0, 1, 0, 0], [0, 1, 0, 0]]
    assert draw(logits, 4, repetition_penalty=1.2) == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert draw(logits, 3, repetition_penalty=9.0) == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: want a number >= 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0.0}, r"top_p=0.0: want a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1: want an integer >= 0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: want a number > 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: want an integer >= 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"num_beams": 4}, "num_beams=4: beam search is not available in this version, want 1"),
        ({"num_beams": 0}, "num_beams=0: want 1"),
        ({"eos_token_id": -2}, "eos_token_id=-2: want a token id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id="),
        ({"seed": -1}, "seed=-1: want an integer >= 0"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


def test_seeds_must_match_the_rows() -> None:
    with pytest.raises(ValueError, match="seed: got 2 seeds, want 3"):
        draw(torch.zeros(3, 4), 1, temperature=1.0, seed=[1, 2])


def test_stop_ids() -> None:
    cases = ((None, {2}), (7, {7}), (-1, set()), ([7, 8], {7, 8}), ([7, -1], {7}))
    assert all(SamplingConfig(eos_token_id=given).stop_ids(2) == want for given, want in cases)
    assert SamplingConfig().stop_ids(-1) == set()


def test_options_of_a_call_override_a_copy_of_the_defaults() -> None:
    base = MergeConfig(schedule=Schedule.list, r=[1, 2])
    assert merge_for_call(base, {}) == base
    assert merge_for_call(base, {"token_kept_ratio": 0.5}) == MergeConfig(token_kept_ratio=0.5)
    assert merge_for_call(base, {"r": [3, 4]}) == MergeConfig(schedule=Schedule.list, r=[3, 4])
    budget = MergeConfig(visual_token_budget=99, token_kept_ratio=0.2)
    assert merge_for_call(budget, {"token_kept_ratio": 0.5}) == MergeConfig(token_kept_ratio=0.5)
    assert merge_for_call(budget, {"token_kept_ratio": None, "slowfast": True}).visual_token_budget == 99
    assert merge_for_call(MergeConfig(), {"schedule": "exact", "size_bias": "keys"}) == MergeConfig(
        schedule=Schedule.exact, size_bias=SizeBias.keys
    )
    assert base == MergeConfig(schedule=Schedule.list, r=[1, 2])


def test_options_are_split_and_unknown_ones_refused() -> None:
    sampling, merging = split_options({"max_new_tokens": 5, "token_kept_ratio": 0.3, "seed": 4})
    assert (sampling, merging) == (SamplingConfig(max_new_tokens=5, seed=4), {"token_kept_ratio": 0.3})
    with pytest.raises(ValueError, match="token_keep_ratio: no such option, want one of token_kept_ratio, "):
        split_options({"token_keep_ratio": 0.3})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(ValueError, match="schedule='fast': want one of constant, exact, linear, list"):
        merge_for_call(MergeConfig(), {"schedule": "fast"})
