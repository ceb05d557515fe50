"""Device, dtype, threads and the environment report."""

from __future__ import annotations

import pytest
import torch

from aurora import runtime
from aurora.runtime import Dtype, RuntimeConfig, environment_report, resolve_device, resolve_dtype, set_threads


def test_auto_takes_what_there_is():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "meta", "", "cpu:zero", "cuda:99"])
def test_an_impossible_device_is_named(name):
    with pytest.raises(ValueError, match=f"^device={name}: "):
        resolve_device(name)


def test_dtype_follows_the_device(monkeypatch):
    cuda = torch.device("cuda")
    assert resolve_dtype(Dtype.auto, torch.device("cpu")) is torch.float32
    assert resolve_dtype(Dtype.bfloat16, torch.device("cpu")) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve_dtype(Dtype.auto, cuda) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_dtype(Dtype.auto, cuda) is torch.float16


@pytest.mark.parametrize(("field", "value"), [("threads", -1), ("seed", -1)])
def test_ranges_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field}=-1"):
        RuntimeConfig(**{field: value})


def test_threads_leave_busy_cores_alone(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    for load, threads in [(0.1, 4), (2.9, 1), (1.0, 3), (40.0, 1)]:
        monkeypatch.setattr(runtime.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert set_threads() == threads
    assert set_threads(2) == 2
    assert chosen == [4, 1, 3, 1, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set_threads() == torch.get_num_threads()
    assert len(chosen) == 5


def test_report_names_versions_and_commit():
    report = environment_report()
    assert report["torch"] == torch.__version__
    assert {"python", "platform", "aurora-captioner", "triton", "commit", "threads", "device"} <= set(report)
    assert all(isinstance(value, str) for value in report.values())


def test_seed_makes_random_numbers_repeat():
    runtime.seed_everything(3)
    first = torch.rand(3)
    runtime.seed_everything(3)
    assert torch.equal(first, torch.rand(3))
