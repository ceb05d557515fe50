"""Options of decoding through the engine: log-probabilities, a least length, penalties, seeds, against transformers."""

from typing import Any

import pytest
import torch

from aurora.captioning import CaptionConfig
from aurora.cli import _with_quotes
from aurora.generation import SamplingConfig, generate
from aurora.generation.engine import GenerateResult
from tests.tiny_llama import STOPS, model, needs_transformers, padded, peer, prompts, splice


def run(rows: list[list[int]], **settings: Any) -> GenerateResult:
    return generate(model(), splice(rows), SamplingConfig(**settings), keep_logits=True, keep_logprobs=True)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 9, "seed": 1, "repetition_penalty": 1.5}])
def test_log_probabilities_are_those_of_the_raw_logits(settings: dict[str, Any]) -> None:
    made = run(prompts(6), max_new_tokens=10, eos_token_id=STOPS, **settings)
    assert made.logits is not None
    assert made.logprobs is not None
    assert made.logprobs.dtype == torch.float32
    for row, length in enumerate(made.num_generated):
        ids = made.sequences[row, :length, None]
        want = made.logits[row, :length].log_softmax(-1).gather(1, ids)[:, 0]
        assert torch.equal(made.logprobs[row, :length], want)
        assert not made.logprobs[row, length:].any()
    assert len(set(made.num_generated)) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_row_ends_by_a_stop_id_before_min_new_tokens(temperature: float) -> None:
    rows, settings = prompts(12), {"max_new_tokens": 14, "eos_token_id": STOPS, "temperature": temperature, "seed": 5}
    free = run(rows, **settings)
    made = run(rows, min_new_tokens=6, **settings)
    assert min(free.num_generated) < 6 <= min(made.num_generated)
    assert "eos" in made.stopped_by
    for row in range(12):
        assert not set(made.sequences[row, :5].tolist()) & set(STOPS)
        if free.num_generated[row] > 6 and temperature == 0:
            assert made.sequences[row].tolist()[:6] == free.sequences[row].tolist()[:6]


@needs_transformers
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.6}, {"min_new_tokens": 7, "repetition_penalty": 1.2}])
def test_greedy_ids_are_those_of_transformers(rules: dict[str, Any]) -> None:
    rows = prompts(10, seed=7)
    made = run(rows, max_new_tokens=12, eos_token_id=STOPS, **rules)
    for index, row in enumerate(rows):  # alone: see test_beam on their penalty in padded batches
        ids, mask = padded([row])
        with torch.inference_mode():
            embeds = peer().get_input_embeddings()(ids)
            theirs = peer().generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=STOPS,
                max_new_tokens=12,
                **rules,
            )
        assert made.sequences[index, : made.num_generated[index]].tolist() == theirs[0].tolist()


def test_each_row_samples_by_its_own_seed_while_others_end() -> None:
    rows = prompts(6, seed=8)
    settings: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "max_new_tokens": 16, "eos_token_id": STOPS}
    seeds = list(range(6))
    together = run(rows, seed=seeds, **settings)
    assert len(set(together.num_generated)) > 2  # so rows left the batch
    for row, seed in enumerate(seeds):
        alone = run([rows[row]], seed=seed, **settings)
        length = alone.num_generated[0]
        assert together.num_generated[row] == length
        assert together.sequences[row, :length].tolist() == alone.sequences[0].tolist()
    assert not torch.equal(run(rows, seed=[9] * 6, **settings).sequences[:, :3], together.sequences[:, :3])


def test_stop_strings_are_a_list_on_the_command_line() -> None:
    arguments = ["stop=[the end,\\n]", "prompt=[as, typed]"]
    assert _with_quotes(arguments, CaptionConfig) == [arguments[0], 'prompt="[as, typed]"']


def test_the_caption_command_hands_on_every_option_of_decoding() -> None:
    given: dict[str, Any] = {
        "min_new_tokens": 3,
        "stop": ["x"],
        "num_beams": 2,
        "length_penalty": 0.5,
        "early_stopping": True,
        "repetition_penalty": 1.1,
    }
    sampling = CaptionConfig(visual_input="clip.mp4", **given).sampling
    assert {key: getattr(sampling, key) for key in given} == given
    with pytest.raises(ValueError, match=r"num_beams=2, temperature=0\.5: a beam search does not sample"):
        CaptionConfig(visual_input="clip.mp4", temperature=0.5, **given)
