"""How a next token is chosen: distributions, reproducibility row by row, and refusals."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.generation.options import merge_for_call, split_options
from aurora.generation.sampling import DRAWS_AT_ONCE, Sampler, SamplingConfig, filter_probabilities
from aurora.model.merge import MergeConfig, Schedule, SizeBias
from aurora.runtime import define_missing_torchvision_ops

CPU = torch.device("cpu")
LOGITS = torch.tensor([[0.1, 2.0, -1.0, 1.5, 0.3]])


def draw(logits: torch.Tensor, num_steps: int, **settings: Any) -> list[list[int]]:
    sampler = Sampler(SamplingConfig(**settings), batch_size=len(logits), vocab_size=logits.shape[1], device=CPU)
    return torch.stack([sampler(logits) for _ in range(num_steps)], dim=1).tolist()


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id() -> None:
    assert draw(LOGITS, 2) == [[1, 1]]
    assert draw(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0]]), 1) == [[1], [0]]


def chi_square(drawn: Tensor, probabilities: list[float]) -> float:
    """How likely counts as far from the expected ones, or farther, are: Pearson's test. 0 if the impossible came."""
    expected = torch.tensor(probabilities, dtype=torch.float64) * drawn.numel()
    counts = drawn.flatten().bincount(minlength=len(probabilities)).double()
    possible = expected > 0
    assert float(expected[possible].min()) >= 5  # else the test says nothing
    if float(counts[~possible].sum()):
        return 0.0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    half_degrees = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_degrees, statistic / 2)) if half_degrees else 1.0


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(value) for value in logits]
    return [weight / sum(weights) for weight in weights]


def only(probabilities: list[float], kept: set[int]) -> list[float]:
    total = sum(probabilities[token] for token in kept)
    return [value / total if token in kept else 0.0 for token, value in enumerate(probabilities)]


PLAIN = LOGITS[0].tolist()
WARM = softmax([value / 0.7 for value in PLAIN])
FILTERS = {
    "plain": ({"temperature": 1.0}, softmax(PLAIN)),
    "temperature": ({"temperature": 0.7}, WARM),
    "top_k": ({"temperature": 0.7, "top_k": 3}, only(WARM, {1, 3, 4})),
    "top_p": ({"temperature": 0.7, "top_p": 0.9}, only(WARM, {1, 3, 4})),
    "top_k then top_p": ({"temperature": 1.0, "top_k": 2, "top_p": 0.7}, only(softmax(PLAIN), {1, 3})),
    "min_p": ({"temperature": 1.0, "min_p": 0.15}, only(softmax(PLAIN), {1, 3, 4})),
    "min_new_tokens": ({"temperature": 1.0, "min_new_tokens": 1}, only(softmax(PLAIN), {0, 2, 3, 4})),
}
LONG = [0.5, 0.1, 2.0, -0.3]


@pytest.mark.parametrize("name", FILTERS)
def test_sampled_frequencies_pass_a_chi_square_test(name: str) -> None:
    settings, probabilities = FILTERS[name]
    rows = 20_000
    sampler = Sampler(
        SamplingConfig(seed=list(range(rows)), **settings), batch_size=rows, vocab_size=5, device=CPU, stop_ids=[1]
    )
    drawn = sampler(LOGITS.expand(rows, -1))
    assert chi_square(drawn, probabilities) > 1e-3
    # The test has teeth: a tenth more of the likeliest token would not pass.
    likeliest = max(range(5), key=lambda token: probabilities[token])
    wrong = [value * (1.1 if token == likeliest else 1.0) for token, value in enumerate(probabilities)]
    assert chi_square(drawn, [value / sum(wrong) for value in wrong]) < 1e-3


def test_rows_and_steps_are_independent_draws() -> None:
    drawn = torch.tensor(draw(LOGITS.expand(8, -1), 2_600, temperature=1.0, seed=list(range(8))))  # crosses refills
    plain = softmax(PLAIN)
    assert chi_square(drawn, plain) > 1e-3
    pairs = [a * b for a in plain for b in plain]
    for first, second in ((drawn[:, :-1:2], drawn[:, 1::2]), (drawn[:4], drawn[4:])):
        assert chi_square(first * 5 + second, pairs) > 1e-3


def test_second_tokens_follow_the_penalised_and_released_distribution() -> None:
    """Pairs of tokens where the first is punished in the second step, and may end the answer only then."""
    rows, penalty = 40_000, 1.6
    config = SamplingConfig(temperature=1.0, repetition_penalty=penalty, min_new_tokens=1, seed=list(range(rows)))
    sampler = Sampler(config, batch_size=rows, vocab_size=4, device=CPU, stop_ids=[2])
    logits = torch.tensor([LONG]).expand(rows, -1)
    pairs = sampler(logits) * 4 + sampler(logits)
    first = only(softmax(LONG), {0, 1, 3})
    expected = []
    for before in range(4):
        punished = [value / penalty if value > 0 else value * penalty for value in LONG]
        after = softmax([punished[token] if token == before else LONG[token] for token in range(4)])
        expected += [first[before] * value for value in after]
    assert chi_square(pairs, expected) > 1e-3
    unpunished = [one * two for one in first for two in softmax(LONG)]
    assert chi_square(pairs, unpunished) < 1e-9


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_top_p_of_a_large_vocabulary_is_that_of_the_definition(spread: float, top_p: float) -> None:
    """Flat rows need more than the head that is looked at first, peaked ones do not; one batch holds both."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 3000, generator=generator).round(decimals=1) * torch.tensor([[spread], [1.0], [0.2]])
    found = filter_probabilities(logits, top_p=top_p) > 0
    for row in range(3):
        probabilities = logits[row].double().softmax(0)
        order = sorted(range(3000), key=lambda token: (-float(probabilities[token]), token))
        total, kept = 0.0, set[int]()
        for token in order:
            if total >= top_p:
                break
            kept.add(token)
            total += float(probabilities[token])
        assert set(found[row].nonzero()[:, 0].tolist()) == kept


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 0.8, "top_p": 0.8},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.7, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.3, "top_p": 0.9},
    ],
)
def test_filters_are_those_of_transformers(settings: dict[str, Any]) -> None:
    define_missing_torchvision_ops()
    from transformers.generation import logits_process as theirs  # noqa: TID251

    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(2)) * 2
    seen = torch.tensor([[1, 5, 5], [0, 39, 2], [7, 8, 9], [3, 3, 3]])
    scores = logits
    if "repetition_penalty" in settings:
        scores = theirs.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(seen, scores)
    scores = (
        theirs.TemperatureLogitsWarper(settings["temperature"])(seen, scores)
        if settings["temperature"] != 1
        else scores
    )
    for key, warper in (
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
    ):
        if key in settings:
            scores = warper(settings[key])(seen, scores)
    sampler = Sampler(SamplingConfig(seed=0, **settings), batch_size=4, vocab_size=40, device=CPU)
    for column in seen.t():
        sampler._rules.record(column)
    filters = {key: settings[key] for key in ("top_k", "top_p", "min_p") if key in settings}
    found = filter_probabilities(sampler._rules.apply(logits) / settings["temperature"], **filters)
    found = found / found.sum(dim=-1, keepdim=True)
    assert torch.equal(found > 0, scores > -math.inf)
    assert torch.allclose(found.float(), scores.softmax(-1), atol=1e-6)


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


def test_the_extreme_draws_choose_what_is_possible() -> None:
    logits = torch.tensor([[-9.0, 1.0, 3.0, 2.0, -9.0]])
    config = SamplingConfig(temperature=1.0, top_k=3)
    sampler = Sampler(config, batch_size=1, vocab_size=5, device=CPU)
    for extreme, token in ((0.0, 1), (1 - 2**-53, 3), (1.0, 3)):
        sampler.prepare()
        sampler._draws.fill_(extreme)
        assert sampler.choose(logits).tolist() == [token]


def test_draws_are_those_of_the_seeds_generator_across_refills() -> None:
    count = 2 * DRAWS_AT_ONCE + 9
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    cumulative = torch.zeros(1, 7).double().softmax(-1).cumsum(-1)[0]
    want = [int((cumulative > value).nonzero()[0, 0]) for value in uniform * cumulative[-1]]
    assert draw(torch.zeros(1, 7), count, temperature=1.0, seed=11) == [want]


def test_rows_that_stay_draw_what_they_would_have_drawn() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"temperature": 1.0, "repetition_penalty": 2.0, "seed": [3, 4, 5, 6]}
    whole = torch.tensor(draw(logits, 300, **settings))
    sampler = Sampler(SamplingConfig(**settings), batch_size=4, vocab_size=30, device=CPU, keep_logprobs=True)
    for _ in range(5):
        sampler(logits)
    rows = torch.tensor([3, 1])
    sampler.keep(rows)
    rest = torch.stack([sampler(logits[rows]) for _ in range(295)], dim=1)
    assert torch.equal(rest, whole[rows, 5:])
    assert sampler.logprobs is not None
    assert sampler.logprobs.shape == (2,)


def test_stop_ids_wait_for_min_new_tokens_and_unknown_ones_do_no_harm() -> None:
    config = SamplingConfig(min_new_tokens=3)
    sampler = Sampler(config, batch_size=2, vocab_size=5, device=CPU, stop_ids=[1, 3, 99])
    logits = torch.cat([LOGITS, LOGITS.flip(1)])
    assert [sampler(logits).tolist() for _ in range(5)] == [[4, 0]] * 3 + [[1, 3]] * 2
    assert torch.equal(logits, torch.cat([LOGITS, LOGITS.flip(1)]))


def test_log_probabilities_are_of_the_chosen_tokens_before_any_rule() -> None:
    config = SamplingConfig(temperature=0.5, top_k=2, repetition_penalty=3.0, min_new_tokens=1, seed=0)
    sampler = Sampler(config, batch_size=2, vocab_size=5, device=CPU, stop_ids=[1], keep_logprobs=True)
    logits = torch.cat([LOGITS, LOGITS.flip(1)]).bfloat16()
    for _ in range(4):
        ids = sampler(logits)
        assert sampler.logprobs is not None
        assert sampler.logprobs.dtype == torch.float32
        assert torch.equal(sampler.logprobs, logits.float().log_softmax(-1)[torch.arange(2), ids])


EVERYTHING: dict[str, Any] = {
    "temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "min_new_tokens": 2,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_a_step_asks_the_device_nothing_and_moves_no_storage(settings: dict[str, Any]) -> None:
    meta = torch.device("meta")  # has no values: whatever would wait for one raises
    sampler = Sampler(
        SamplingConfig(**settings), batch_size=2, vocab_size=700, device=meta, stop_ids=[3], keep_logprobs=True
    )
    assert sampler(torch.zeros(2, 700, device=meta)).shape == (2,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros(1, device=meta).sum() > 0)
    sampler = Sampler(
        SamplingConfig(seed=1, **settings), batch_size=2, vocab_size=700, device=CPU, stop_ids=[3], keep_logprobs=True
    )
    states = [value for owner in (sampler, sampler._rules) for value in vars(owner).values() if torch.is_tensor(value)]
    before = [state.data_ptr() for state in states]
    for _ in range(DRAWS_AT_ONCE + 2):
        sampler(torch.zeros(2, 700))
    states = [value for owner in (sampler, sampler._rules) for value in vars(owner).values() if torch.is_tensor(value)]
    assert [state.data_ptr() for state in states] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_a_graph_chooses_what_a_call_does(settings: dict[str, Any]) -> None:
    cuda = torch.device("cuda")
    logits = torch.randn(300, 2, 5000, generator=torch.Generator().manual_seed(0)) * 3
    samplers = [
        Sampler(SamplingConfig(seed=[1, 2], **settings), batch_size=2, vocab_size=5000, device=device, stop_ids=[3])
        for device in (cuda, cuda, CPU)
    ]
    warm = Sampler(SamplingConfig(seed=0, **settings), batch_size=2, vocab_size=5000, device=cuda, stop_ids=[3])
    given = logits[0].to(cuda)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        warm(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = samplers[0].choose(given)
    for step in logits:
        given.copy_(step)
        samplers[0].prepare()
        graph.replay()
        assert out.tolist() == samplers[1](step.to(cuda)).tolist() == samplers[2](step).tolist()


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
        ({"temperature": -0.1}, r"temperature=-0.1: want a number >= 1e-06, or 0 \(greedy\)"),
        ({"temperature": 1e-30}, "temperature=1e-30: want a number >= 1e-06"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0.0}, r"top_p=0.0: want a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1: want an integer >= 0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: want a number >= 1e-06"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty=1e-38: want"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: want an integer >= 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"min_p": -0.1}, r"min_p=-0.1: want a number in \[0, 1\]"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: want an integer from 0 to max_new_tokens=256"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9: want an integer from 0 to max_new_tokens=8"),
        ({"stop": ""}, "stop='': want a text that is not empty"),
        ({"stop": ["a", 3]}, r"stop=\['a', 3\]: want"),
        ({"num_beams": 0}, "num_beams=0: want an integer >= 1"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams=2, temperature=0.5: a beam search does not sample, want"),
        ({"length_penalty": math.inf}, "length_penalty=inf: want a number from -10 to 10"),
        ({"length_penalty": 1000}, "length_penalty=1000: want a number from -10 to 10"),
        ({"early_stopping": "never"}, "early_stopping='never': want True or False"),
        ({"eos_token_id": -2}, "eos_token_id=-2: want a token id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id="),
        ({"seed": -1}, "seed=-1: want an integer >= 0"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


@pytest.mark.parametrize("settings", [{"temperature": 1e-6}, {"temperature": 1e30}, {"repetition_penalty": 1e-6}])
def test_extreme_settings_still_choose_a_token(settings: dict[str, Any]) -> None:
    options = {"temperature": 1.0, "seed": 0} | settings
    ids = torch.tensor(draw(torch.tensor([[1e4, -1e4, 3.0, 2.0]]).expand(50, 4), 4, **options))
    assert ids.min() >= 0
    assert ids.max() < 4


def test_every_token_ending_the_answer_is_refused_where_none_may() -> None:
    with pytest.raises(ValueError, match="min_new_tokens=1: every token is in eos_token_id, want one that is not"):
        Sampler(SamplingConfig(min_new_tokens=1), batch_size=2, vocab_size=3, device=CPU, stop_ids=[0, 1, 2])


def test_logits_that_are_no_numbers_give_an_id_that_exists() -> None:
    """The engine refuses them, but on a GPU only some steps later."""
    logits = torch.full((3, 4), math.nan)
    for settings in ({"temperature": 1.0, "seed": 1, "repetition_penalty": 2.0}, {"repetition_penalty": 2.0}):
        assert 0 <= min(map(min, draw(logits, 3, **settings))) <= max(map(max, draw(logits, 3, **settings))) < 4


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
