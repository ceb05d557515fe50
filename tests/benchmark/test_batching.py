"""The measurement of batches and shared prompts: right inputs, right arithmetic, and no speed from wrong ids."""

import pytest
import torch

from aurora.benchmark import batching
from aurora.benchmark.batching import QUESTIONS, measure_mixed_batch, measure_shared_prompts, mixed_batch
from aurora.benchmark.harness import WrongResultError
from aurora.captioning import BUNDLED_MODEL
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor


@pytest.fixture(scope="module")
def loaded() -> tuple[AuroraForConditionalGeneration, AuroraProcessor]:
    return AuroraForConditionalGeneration.from_pretrained(BUNDLED_MODEL), AuroraProcessor.from_pretrained(BUNDLED_MODEL)


def test_the_clips_are_alike_in_nothing(loaded: tuple[AuroraForConditionalGeneration, AuroraProcessor]) -> None:
    batch = mixed_batch(*loaded)
    assert len(batch.input_ids) == 16
    assert batch.pixel_values[-1] is None
    assert len({tuple(pixels.shape) for pixels in batch.pixel_values if pixels is not None}) == 6
    assert len({len(pixels) for pixels in batch.pixel_values if pixels is not None}) >= 4
    assert len(set(batch.token_kept_ratio)) == 4
    assert len({len(ids) for ids in batch.input_ids}) > 8


def test_both_measurements_compare_the_same_tokens(
    loaded: tuple[AuroraForConditionalGeneration, AuroraProcessor],
) -> None:
    alone, together = measure_mixed_batch(*loaded, num_rows=2, max_new_tokens=3, repeats=1)
    assert (alone["side"], together["side"]) == ("single calls", "one batch")
    for row in (alone, together):
        assert 0 < row["end_to_end_tokens_s"] < row["generated_tokens_s"] < row["decode_tokens_s"]
    assert alone["decode_ratio"] == 1
    assert together["decode_ratio"] == pytest.approx(together["decode_tokens_s"] / alone["decode_tokens_s"])
    rows = measure_shared_prompts(*loaded, questions=QUESTIONS[:2], num_frames=1, max_new_tokens=3, repeats=1)
    assert [row["side"] for row in rows] == ["one question", "2 calls", "one call"]
    assert rows[0]["cost"] == 1
    assert rows[2]["cost"] == pytest.approx(rows[2]["p50_ms"] / rows[0]["p50_ms"])


def test_wrong_ids_are_an_error_and_no_speed(
    loaded: tuple[AuroraForConditionalGeneration, AuroraProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batching._made

    def wrong(output: object) -> object:
        made = real(output)  # type: ignore[arg-type]
        if len(made.sequences) > 1:
            made.sequences = made.sequences + torch.tensor([[0], [1], [0]])
        return made

    monkeypatch.setattr(batching, "_made", wrong)
    with pytest.raises(WrongResultError, match="one batch: row 1 has other ids than alone"):
        measure_mixed_batch(*loaded, num_rows=3, max_new_tokens=2, repeats=1)
