"""suite=device: which programs it starts, what it makes of their ends, and where results go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aurora.benchmark import device
from aurora.benchmark.config import BenchmarkConfig, Step, Suite
from aurora.benchmark.run import benchmark

JUNIT = '<testsuites><testsuite name="pytest" errors="0" failures="{failures}" skipped="2" tests="10"/></testsuites>'


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def programs(monkeypatch) -> dict:
    """Programs are not started: what they would write is written, and their command lines are kept."""
    state: dict = {"commands": [], "failing": ""}

    def call(command: list[str], environment: dict[str, str]) -> int:
        state["commands"].append((" ".join(command), environment))
        fails = bool(state["failing"]) and state["failing"] in " ".join(command)
        for word in command:
            if word.startswith("--junitxml="):
                Path(word.partition("=")[2]).write_text(JUNIT.format(failures=3 if fails else 0))
            if word.startswith("output=") and not fails:
                Path(word.partition("=")[2]).write_text(json.dumps({"rows": [{"side": "a"}], "header": {}}))
        return 1 if fails else 0

    monkeypatch.setattr(device, "_call", call)
    return state


def with_gpu(monkeypatch) -> None:
    monkeypatch.setattr(device, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(device, "device_slug", lambda: "nvidia-x1")
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/opt/{name}")


def test_without_a_gpu_it_says_so_and_interprets(checkout, programs, capsys):
    rows = device.run(BenchmarkConfig(suite=Suite.device, device="cpu"))
    assert "no CUDA device: kernels run in Triton's interpreter" in capsys.readouterr().out
    assert {row["step"]: row["result"] for row in rows} == {
        "tests": "passed", "sanitizer": "skipped", "kernels": "passed", "encoder": "passed", "generation": "passed",
    }  # fmt: skip
    assert rows[0]["detail"] == "8 passed, 0 failed, 2 skipped"
    for command, environment in programs["commands"][1:]:
        assert "quick=true" in command
        assert environment == {"TRITON_INTERPRET": "1"}
    assert list((checkout / "docs" / "results").iterdir()) == []


def test_a_gpu_gets_everything_at_full_size_and_keeps_results(checkout, programs, monkeypatch):
    with_gpu(monkeypatch)
    rows = device.run(BenchmarkConfig(suite=Suite.device))
    assert [row["result"] for row in rows] == ["passed"] * 5
    assert "compute-sanitizer --tool memcheck" in programs["commands"][1][0]
    for command, _ in programs["commands"][2:]:
        assert "quick=false" in command
        assert "compile=true" in command
    written = json.loads((checkout / "docs" / "results" / "nvidia-x1.json").read_text())
    assert written["steps"]["kernels"]["rows"] == [{"side": "a"}]
    assert written["steps"]["tests"]["counts"]["passed"] == 8
    # A later run of one step, such as within another lease, replaces that one alone.
    programs["failing"] = "pytest"
    device.run(BenchmarkConfig(suite=Suite.device, steps=[Step.tests]))
    again = json.loads((checkout / "docs" / "results" / "nvidia-x1.json").read_text())
    assert again["steps"]["tests"]["result"] == "failed"
    assert again["steps"]["kernels"] == written["steps"]["kernels"]


def test_a_failure_is_told_after_the_other_steps(checkout, programs):
    programs["failing"] = "suite=kernels"
    with pytest.raises(ValueError, match="failed: kernels; what they printed stands above"):
        benchmark(BenchmarkConfig(suite=Suite.device, device="cpu", output="result.json"))
    rows = json.loads((checkout / "result.json").read_text())["rows"]
    assert [row["result"] for row in rows] == ["passed", "skipped", "failed", "passed", "passed"]


def test_it_wants_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="suite=device: want the root of a checkout"):
        device.run(BenchmarkConfig(suite=Suite.device))


def test_pytest_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_two.py").write_text("def test_a():\n    pass\n\n\ndef test_b():\n    assert False\n")
    result, detail, content = device._tests(["-p", "no:cacheprovider", "test_two.py"], tmp_path / "report.xml")
    assert (result, detail) == ("failed", "1 passed, 1 failed, 0 skipped")
    assert content["counts"]["tests"] == 2


def test_steps_belong_to_this_suite():
    with pytest.raises(ValueError, match=r"steps=\['tests'\]: want suite=device, got kernels"):
        BenchmarkConfig(steps=[Step.tests])
