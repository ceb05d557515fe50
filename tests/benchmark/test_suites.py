"""`aurora benchmark` with quick=true: every suite runs, checks its sides and writes what it found."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from aurora.benchmark.config import BenchmarkConfig, Op, Suite
from aurora.benchmark.encoder import PEER, TOME, UNMERGED, gflop_per_frame
from aurora.cli import main
from aurora.kernels.common import HAS_TRITON, INTERPRETED
from aurora.model.merge import MergeConfig, Schedule, plan_merge
from aurora.model.vision import VisionConfig

FULL = VisionConfig()


def run(tmp_path, capsys, *arguments: str) -> dict:
    output = tmp_path / "result.json"
    main(["benchmark", "quick=true", "device=cpu", "threads=1", f"output={output}", *arguments])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(last) == json.loads(output.read_text())
    return json.loads(last)


def test_the_encoder_suite(tmp_path, capsys):
    result = run(tmp_path, capsys, "suite=encoder")
    assert result["header"]["claim"] == "quick run: no speed claim"
    rows = {row["side"]: row for row in result["rows"]}
    ratios = [f"{ratio} {schedule}" for ratio in (0.5, 0.2, 0.1) for schedule in ("constant", "linear")]
    assert {UNMERGED, TOME, "0.2 constant, size bias", *ratios} <= rows.keys()
    assert rows[UNMERGED]["vs_unmerged"] == 1.0
    assert rows["0.2 constant"]["merge_ms"] == pytest.approx(
        rows["0.2 constant"]["merge_share"] * rows["0.2 constant"]["p50_ms"]
    )
    assert rows["0.2 constant"]["tokens"] == rows["0.2 linear"]["tokens"] < rows[UNMERGED]["tokens"]
    assert rows["0.2 linear"]["gflop_per_frame"] < rows["0.2 constant"]["gflop_per_frame"]
    if PEER in rows:
        assert rows[PEER]["vs_clip"] == 1.0
        assert rows[PEER]["gflop_per_frame"] > rows[UNMERGED]["gflop_per_frame"]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_the_generation_suite(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no .venv-llama
    rows = run(tmp_path, capsys, "suite=generation")["rows"]
    sides: dict[str, dict] = {}
    for row in rows:
        sides.setdefault(row["op"].split(",")[0], {})[row["side"]] = row
    decode, captions = sides["decode"], sides["caption"]
    kinds = ("float32", "bfloat16")
    assert decode.keys() == {f"{who} {kind}" for who in ("transformers", "ours") for kind in kinds} | {
        "ours int8",
        "llama.cpp",
    }
    assert decode["ours float32"]["same_ids"] == 1
    best = min(decode[f"transformers {kind}"]["p50_ms"] for kind in kinds)
    assert decode["ours int8"]["ratio"] == pytest.approx(best / decode["ours int8"]["p50_ms"])
    assert decode["llama.cpp"]["note"] == "not installed: make .venv-llama"
    assert captions.keys() == {"transformers LLaVA", "ours 0.2 constant", "ours 0.2 linear"}
    assert captions["ours 0.2 linear"]["flop_bound"] > captions["ours 0.2 constant"]["flop_bound"] > 1
    assert sides["5 questions"].keys() == {"one question", "5 calls", "one call"}
    assert sides["3 mixed clips"].keys() == {"single calls", "one batch"}
    wanted = [row for row in rows if "wanted" in row]
    assert len(wanted) == 7
    assert all(row["met"] in (True, False) for row in wanted)


@pytest.fixture
def not_interpreted(monkeypatch):
    """Leave out interpreted kernels, which take a second a call."""
    monkeypatch.setattr("aurora.benchmark.kernels.INTERPRETED", False)


def test_a_kernel_is_interpreted_where_there_is_no_gpu(tmp_path, capsys):
    rows = run(tmp_path, capsys, "op=match", "compile=false")["rows"]
    assert [row["side"] for row in rows] == ["ToMe", "torch", "triton"][: 3 if HAS_TRITON and INTERPRETED else 2]


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.value)
def test_one_op(tmp_path, capsys, op):
    result = run(tmp_path, capsys, f"op={op.value}", "compile=false")
    assert result["suite"] == f"kernels-{op.value}-quick"
    assert {row["op"] for row in result["rows"]} == {op.value}
    wanted = {"fwd"} if op in (Op.match, Op.merge_step) else {"fwd", "bwd", "full"}
    assert {row["pass"] for row in result["rows"]} == wanted
    for row in result["rows"]:
        assert {"shape", "dtype", "side", "p20_ms", "p50_ms", "p80_ms", "vs_first", "gb_per_s"} <= row.keys()
        assert row["p50_ms"] > 0


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, capsys, dtype):
    for op in ("merge_step", "merge_norm"):
        result = run(tmp_path, capsys, f"op={op}", "compile=false", f"dtype={dtype}")
        assert {row["dtype"] for row in result["rows"]} == {dtype}


@pytest.mark.slow
@pytest.mark.usefixtures("not_interpreted")
def test_compiled_sides(tmp_path, capsys):
    result = run(tmp_path, capsys, "op=merge_norm")
    sides = {row["side"] for row in result["rows"]}
    assert {"ToMe", "ToMe, compiled", "torch", "torch, compiled"} <= sides
    assert all(row["vs_compiled"] is not None for row in result["rows"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("suite", ["kernels", "encoder"])
def test_quick_on_a_gpu(tmp_path, capsys, suite):
    output = tmp_path / "result.json"
    main(["benchmark", "quick=true", f"suite={suite}", "compile=false", f"output={output}"])
    sides = {row["side"] for row in json.loads(output.read_text())["rows"]}
    assert "triton" in sides if suite == "kernels" else UNMERGED in sides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite=encoder", "op=merge"], "op=merge: want suite=kernels, got suite=encoder"),
        (["op=sort"], "op=sort: want one of match, merge"),
        (["output=here.txt"], "output=here.txt: want a name that ends in .json"),
    ],
)
def test_mistakes_get_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        main(["benchmark", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_operations_of_a_frame_are_those_of_the_design():
    """KERNELS 1.3: 976 GFLOP a frame unmerged, 585 at 0.2, and less than half with the linear schedule."""

    def gflop(**settings: object) -> float:
        plan = plan_merge(MergeConfig(**settings), height_px=378, width_px=378, vision=FULL, num_active_layers=31)
        return gflop_per_frame(FULL, plan)

    assert gflop() == pytest.approx(976, rel=0.005)
    assert gflop(token_kept_ratio=0.2) == pytest.approx(585, rel=0.005)
    assert gflop() / gflop(token_kept_ratio=0.2, schedule=Schedule.linear) == pytest.approx(2.145, rel=0.005)


def test_defaults_are_a_kernels_run():
    config = BenchmarkConfig()
    assert (config.suite, config.op, config.quick) == (Suite.kernels, None, False)
