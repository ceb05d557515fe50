"""Generation with attention that takes no mask: a stand-in for flash-attn, which needs a GPU."""

import pytest
import torch

from aurora.generation import SamplingConfig, generate
from aurora.generation.engine import extend, prefill
from aurora.generation.graphs import is_recordable
from aurora.model.captioner import AuroraModel
from aurora.model.products import Decoding
from tests.golden_models import captioner
from tests.model.test_attention import flash_attn  # noqa: F401  (a fixture)


@pytest.fixture
def model() -> AuroraModel:
    return captioner("kv2")


@pytest.mark.parametrize("lengths", [[9, 9], [14, 9, 5]], ids=["alike", "padded"])
def test_ids_are_those_of_sdpa(model: AuroraModel, lengths: list[int], flash_attn: list[str]) -> None:  # noqa: F811
    ids = torch.randint(3, 256, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    with torch.no_grad():
        spliced = model.splice(ids, None, attention_mask=mask, padding_side="left")
    sampling = SamplingConfig(max_new_tokens=12, eos_token_id=-1)
    want = generate(model, spliced, sampling).sequences
    assert not flash_attn
    model.language_model.backend = "flash_attention_2"
    assert torch.equal(generate(model, spliced, sampling).sequences, want)
    assert ("ragged" in flash_attn) == (len(set(lengths)) > 1)


def test_what_takes_no_mask_is_not_recorded(model: AuroraModel) -> None:
    with torch.no_grad():
        spliced = model.splice(torch.tensor([[5, 6, 7]]), None, padding_side="left")
    state = prefill(model, spliced)
    language_model = model.language_model
    for cache in (state.cache, extend(model, state, [[8], [9]], [0, 0]).cache):
        for backend in ("auto", "sdpa", "eager", "sdpa_cudnn", "triton"):
            language_model.backend = backend
            assert is_recordable(language_model, cache)
        for backend in ("flash_attention_2", "sdpa_flash"):
            language_model.backend = backend
            assert not is_recordable(language_model, cache)
    language_model.backend, language_model.decoding = "auto", Decoding.direct
    assert not is_recordable(language_model, state.cache)
