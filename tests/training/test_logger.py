"""What a run writes about itself: the curve, the line, and other loggers where they are asked for."""

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergeConfig
from aurora.model.vision import VisionConfig
from aurora.training.flops import FlopCounter
from aurora.training.logger import LoggerConfig, RunLog, measured_peak_flops, open_sinks, peak_memory_gib


def log_of(folder: Path, start: int = 0, **changes: Any) -> RunLog:
    config = LoggerConfig(**changes.pop("config", {}))
    return RunLog(folder, name="s", num_steps=10, start=start, enabled=True, config=config, **changes)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def test_means_sums_and_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_of(tmp_path, peak_flops=1e12)
    for loss in (1.0, 2.0):
        log.add({"loss": loss, "tokens": 100.0, "visual_tokens": 25.0, "flops": 1e6})
    log.write(2, lr=0.5)
    [row] = rows(tmp_path)
    assert (row["stage"], row["step"], row["loss"], row["lr"]) == ("s", 2, 1.5, 0.5)
    assert row["tokens_per_s"] == pytest.approx(4 * row["visual_tokens_per_s"])
    assert row["mfu"] == pytest.approx(row["tflops_per_s"], rel=1e-3)  # of a peak of 1 TFLOP/s
    assert row["eta_s"] == pytest.approx(8 / row["steps_per_s"], rel=1e-3)
    line = capsys.readouterr().out
    assert line.startswith("s 2/10  loss 1.5  ")
    assert " tokens/s  " in line
    assert line.rstrip().endswith(" left")
    log.write(3)
    assert "loss" not in rows(tmp_path)[1]  # the means start anew


def test_a_pause_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("aurora.training.logger.time.monotonic", lambda: now[0])
    log = log_of(tmp_path)
    log.add({"tokens": 100.0})
    now[0] += 2
    with log.paused():
        now[0] += 98
    log.write(1)
    assert rows(tmp_path)[0]["tokens_per_s"] == 50
    assert rows(tmp_path)[0]["steps_per_s"] == 0.5


def test_resuming_cuts_the_curve_back(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for step in (1, 2, 3):
        log.add({"loss": 1.0})
        log.write(step)
    with (tmp_path / "curve.jsonl").open("a") as file:
        file.write('{"stage": "s", "st')  # a kill
    log_of(tmp_path, start=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_silent_rank_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, name="s", num_steps=2, start=0, enabled=False)
    log.add({"loss": 1.0})
    log.write(1)
    log.text(1, "captions", ["a"])
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"logger.{package}=true: {package} is not installed: pip install {package}"):
        open_sinks(LoggerConfig(**{package: True}), tmp_path, "s", 0)


def test_wandb_gets_numbers_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        id = "abc"

        def log(self, values: dict[str, Any], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finished")

    stub = types.ModuleType("wandb")
    stub.__spec__ = importlib.util.spec_from_loader("wandb", None)
    stub.init = lambda **settings: (calls.append(settings), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for start in (0, 1):
        log = log_of(tmp_path, start=start, config={"wandb": True, "wandb_project": "p"})
        log.record(start + 1, {"loss": 1.0})
        log.text(start + 1, "captions", ["a", "b"])
        log.close()
    assert [(call["id"], call["resume"], call["project"]) for call in calls if "id" in call] == [
        (None, "allow", "p"),
        ("abc", "allow", "p"),
    ]
    assert (2, {"loss": 1.0}) in calls
    assert (1, {"captions": "a\n\nb"}) in calls
    assert calls.count("finished") == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = log_of(tmp_path, config={"tensorboard": True})
    log.record(1, {"loss": 1.5})
    log.text(1, "captions", ["a fox"])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5)]


def test_on_a_terminal_there_is_one_live_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    log = log_of(tmp_path)
    for step in (1, 2):
        log.add({"loss": 1.25, "tokens": 10.0})
        log.write(step)
    log.record(2, {"val/loss": 3.0})
    log.close()
    out = capsys.readouterr().out
    assert "2/10" in out
    assert "loss 1.25" in out
    assert "s 2/10  val/loss 3" in out
    assert "s 1/10" not in out  # records go to the file, not between the lines
    assert len(rows(tmp_path)) == 3


def test_the_live_line_keeps_its_time_on_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    log = log_of(tmp_path, peak_flops=1e12)
    for _ in range(3):
        log.add({"loss": 12.345678, "tokens": 1e4, "visual_tokens": 1e4, "flops": 1e12})
    log.close()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # colours
    shown = [line.rstrip() for line in re.split(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]", plain) if "loss" in line][-1]
    assert 60 < len(shown) <= 80
    assert "\u2026" not in shown  # nothing is cut
    assert re.search(r"3/10 +(-|\d+):\S+ +loss 12\.346  \d+ tokens/s", shown)


def test_a_summary_tells_the_first_and_the_last_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("aurora.training.logger.time.monotonic", lambda: now[0])
    log = log_of(tmp_path, start=4)
    assert log.summary() == "0 steps in 0:00:00"
    for step, loss in ((5, 3.0), (6, 2.0), (7, 1.0)):
        now[0] += 30
        log.add({"loss": loss})
        log.write(step)
    assert log.summary() == "3 steps in 0:01:30, loss 3 -> 1"


def test_a_full_disk_names_the_curve(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.add({"loss": 1.0})
    (tmp_path / "curve.jsonl").mkdir()  # nothing can be written there
    with pytest.raises(OSError, match=r"curve\.jsonl: cannot write \(Is a directory\); the checkpoints stay"):
        log.write(1)


def test_the_peak_is_of_this_program_alone() -> None:
    """`ru_maxrss` would start at the peak of the process that started it."""
    held = torch.ones(2**26)  # 256 MiB
    program = "from aurora.training.logger import peak_memory_gib; print(peak_memory_gib())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < peak_memory_gib() - 0.2
    assert float(done.stdout) > 0.1
    assert held.sum() > 0


def test_peak_is_measured_on_gpus_alone() -> None:
    assert measured_peak_flops(torch.device("cpu"), torch.float32) is None
    with pytest.raises(ValueError, match=r"logger\.peak_tflops=0"):
        LoggerConfig(peak_tflops=0)


@pytest.mark.parametrize("trainable", ["projector.", "vision_tower.", ""])
def test_operations_are_those_torch_counts(trainable: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    vision = VisionConfig(hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2, image_size=56)
    text = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64
    )
    model = AuroraModel(AuroraConfig(vision=vision, text=text, attn_implementation="eager"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trainable))
    merge = MergeConfig(token_kept_ratio=0.6)
    ids = torch.tensor([[1, -200, 5, 6, 7, 8]])
    counter = FlopCounterMode(display=False)
    with counter:
        out = model(ids, pixel_values=torch.randn(1, 1, 3, 56, 56), labels=ids.clamp_min(-100), merge=merge)
        assert out.loss is not None
        out.loss.backward()
    length = out.logits.shape[1]
    plans = [model.plan(1, 56, 56, merge)]
    found = FlopCounter(model, model.config).step(plans, [length], length)
    # Here attention is dense, the last position has logits too, and pixels need no gradient.
    assert found == pytest.approx(counter.get_total_flops(), rel=0.12)
