"""suite=training with quick=true: equal starts, equal batches, right arithmetic, and no speed from another model."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora.benchmark import training, training_case
from aurora.benchmark.harness import WrongResultError
from aurora.benchmark.training import LEARNING_SIDES, MERGED, SIDES, UNMERGED, measure_learning, measure_ratios
from aurora.benchmark.training_case import CASES, PEER, batches
from aurora.benchmark.training_worker import build_trainer, peak_bytes
from aurora.captioning import BUNDLED_MODEL
from aurora.checkpoint.pretrained import load_model
from aurora.cli import main
from aurora.data.conversation import IGNORE_INDEX
from aurora.training.config import Precision

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"device": CPU, "precision": Precision.fp32, "quick": True, "threads": 1}
needs_transformers = pytest.mark.skipif(training.importlib.util.find_spec("transformers") is None, reason="the peer")


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the memory of each side, which takes a process of seconds each."""
    sizes = {PEER: 4, UNMERGED: 4, "0.2 constant": 3, "0.1 constant": 2, "0.2 linear": 2, "0.1 linear": 1}
    monkeypatch.setattr(training, "peak_bytes", lambda case, side, *rest: sizes[side] * 2**20)


def test_batches_are_a_function_of_the_seed() -> None:
    case = CASES["quick"]
    first, second = islice(batches(case, "train", CPU), 2)
    again = next(batches(case, "train", CPU, first=case.num_rows))
    assert torch.equal(second.input_ids, again.input_ids)
    assert not torch.equal(first.labels, second.labels)
    assert (first.input_ids == case.config.image_token_index).sum(dim=1).tolist() == [case.num_frames] * case.num_rows
    assert [clip.shape for clip in first.pixel_values if clip is not None] == [(2, 3, 48, 48)] * 2
    learned = first.labels != IGNORE_INDEX
    assert learned.any(dim=1).all()
    assert torch.equal(first.labels[learned], first.input_ids[learned])


def test_the_start_is_aurora_tiny() -> None:
    first, second = (training_case.build_model(CASES["llava"], seed, CPU).state_dict() for seed in (0, 1))
    bundled = load_model(BUNDLED_MODEL).state_dict()
    assert first.keys() == bundled.keys()
    assert all(torch.equal(first[name][: len(weight)], weight) for name, weight in bundled.items())
    embeddings = "language_model.embed_tokens.weight"
    assert not torch.equal(first[embeddings], second[embeddings]), "eight new rows are drawn"


@needs_transformers
def test_both_loops_take_the_same_steps() -> None:
    """Unmerged, from the same weights, on the same batches: losses stay together over the steps."""
    ours, peer = (build_trainer("quick", side, 3, Precision.fp32, CPU) for side in (UNMERGED, PEER))
    for batch in islice(batches(CASES["quick"], "train", CPU), 4):
        assert ours.step(batch) == pytest.approx(peer.step(batch), rel=1e-4)
    held_out = next(batches(CASES["quick"], "val", CPU))
    assert ours.loss(held_out) == pytest.approx(peer.loss(held_out), rel=1e-4)


@pytest.mark.usefixtures("no_processes")
def test_rows_of_kept_ratios() -> None:
    rows = {row["side"]: row for row in measure_ratios(**QUICK)}
    assert tuple(rows) == SIDES
    assert rows[UNMERGED]["ratio"] == rows[UNMERGED]["peak_share"] == 1
    assert rows["0.1 linear"]["peak_share"] == 0.25
    assert rows[UNMERGED]["visual_tokens"] == 36
    assert rows["0.1 constant"]["visual_tokens"] == rows["0.1 linear"]["visual_tokens"] == 12
    assert all(row["p50_ms"] > 0 for row in rows.values())
    assert "met" not in rows[UNMERGED]
    merged = [row for side, row in rows.items() if side != UNMERGED]
    assert [row["met"] for row in merged] == [row["ratio"] > 1 for row in merged]


@needs_transformers
@pytest.mark.usefixtures("no_processes")
def test_rows_of_learning() -> None:
    rows = {row["side"]: row for row in measure_learning(**QUICK)}
    assert tuple(rows) == LEARNING_SIDES
    assert rows[PEER]["ratio"] == rows[PEER]["cpu_ratio"] == 1
    assert all(row["cpu_ms"] > 0 for row in rows.values())
    assert rows[UNMERGED]["losses"] == pytest.approx(rows[PEER]["losses"], abs=2e-4)
    assert abs(rows[UNMERGED]["standard_errors"]) < 0.1
    assert rows[MERGED]["losses"] != rows[PEER]["losses"]
    assert rows[MERGED]["ratio"] == pytest.approx(rows[MERGED]["text_tokens_s"] / rows[PEER]["text_tokens_s"])
    assert rows[MERGED]["wanted"].startswith("ratio >= 1.3")
    faster, as_good = rows[MERGED]["ratio"] >= 1.3, abs(rows[MERGED]["standard_errors"]) < 2
    assert rows[MERGED]["met"] is (faster and as_good)
    assert [side for side, row in rows.items() if "met" in row] == [MERGED]


def test_standard_errors() -> None:
    assert training.standard_errors([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0
    # Variances 1 and 1 over three seeds each: one standard error is sqrt(2 / 3).
    assert training.standard_errors([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / (2 / 3) ** 0.5)
    assert training.standard_errors([1.0, 1.0], [2.0, 2.0]) == float("-inf")
    assert training.standard_errors([2.0, 2.0], [2.0, 2.0]) == 0


def test_a_rate_leaves_out_the_first_step_of_each_seed() -> None:
    seconds, tokens = [9.0, 1.0, 1.0] * 3, [5, 10, 30] * 3
    assert training._rate(seconds, tokens) == 20


@needs_transformers
@pytest.mark.usefixtures("no_processes")
def test_another_model_is_an_error_and_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = training_case.Peer._loss
    monkeypatch.setattr(training_case.Peer, "_loss", lambda self, batch: real(self, batch) * 1.01)
    with pytest.raises(WrongResultError, match=r"ours unmerged: loss .* before the first step, transformers LLaVA has"):
        measure_learning(**QUICK)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_of_a_fresh_process_falls_with_the_kept_ratio() -> None:
    found = [peak_bytes("llava", side, Precision.fp32, CPU) for side in (PEER, UNMERGED, MERGED, "0.1 linear")]
    assert all(found)
    assert found[0] > found[2] > found[3]  # type: ignore[operator]
    assert found[1] > found[2]  # type: ignore[operator]


@pytest.mark.slow
def test_the_suite_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    main(["benchmark", "suite=training", "quick=true", "device=cpu", "threads=1", f"output={output}"])
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert json.loads(printed.strip().splitlines()[-1]) == result
    assert {row["side"] for row in result["rows"]} == {*SIDES, *LEARNING_SIDES}
    assert result["header"]["claim"] == "quick run: no speed claim"
    assert all(row["peak_mib"] > 1 for row in result["rows"])


def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["benchmark", "suite=training", "quick=true", "device=cpu", "dtype=float16"])
    assert left.value.code == 2
    assert "dtype=float16: want float32 or bfloat16 for suite=training" in capsys.readouterr().err
