"""The harness: who runs when, what is checked before, and what a row says."""

from __future__ import annotations

import json
import math
import mmap
import time

import pytest
import torch

from aurora.benchmark import harness
from aurora.benchmark.harness import (
    WrongResultError,
    compare,
    device_slug,
    expect_close,
    header,
    is_met,
    percentiles,
    print_table,
    write_report,
)


def recorder(calls: list[str], name: str, result: object = None):
    def run() -> object:
        calls.append(name)
        return result

    return run


def test_sides_take_turns_and_each_one_goes_first():
    calls: list[str] = []
    rows = compare({name: recorder(calls, name) for name in "abc"}, repeats=4, warmup=1, threads_per_side=(1,))
    assert calls[:3] == ["a", "b", "c"]  # the first calls, timed apart
    assert calls[3:] == [*"abc", *"bca", *"cab", *"abc"]
    assert [row["side"] for row in rows] == ["a", "b", "c"]
    assert all(row["repeats"] == 4 and row["warmup_ms"] > 0 for row in rows)


def test_a_side_that_settles_runs_untimed_before_each_sample():
    calls: list[str] = []
    names = "ab"
    compare({name: recorder(calls, name) for name in names}, repeats=2, warmup=1, settle=2, threads_per_side=(1,))
    assert calls == [*"ab", *"aaabbb", *"bbbaaa"]


def test_a_row_on_a_cpu_tells_processor_time_and_fresh_memory():
    def wait() -> None:
        time.sleep(0.03)

    def write() -> None:
        with mmap.mmap(-1, 300 * mmap.PAGESIZE) as fresh:
            for page in range(300):
                fresh[page * mmap.PAGESIZE] = 1

    waited, wrote = compare({"wait": wait, "write": write}, repeats=3, threads_per_side=(1,))
    assert waited["p50_ms"] > 29 > 15 > waited["cpu_ms"]
    assert waited["page_faults"] < 100
    assert wrote["page_faults"] >= 300


def test_rows_say_how_often_faster_than_the_baseline(monkeypatch):
    clock = iter(range(1, 1000))
    took = {"slow": 30.0, "fast": 10.0}
    calls: list[str] = []

    def time_once(run, device):
        run()
        return took[calls[-1]] + next(clock) * 1e-6

    monkeypatch.setattr(harness, "time_once", time_once)
    sides = {name: recorder(calls, name) for name in took}
    slow, fast = compare(sides, repeats=5, warmup=1, threads_per_side=(1,))
    assert slow["ratio"] == pytest.approx(1.0)
    assert fast["ratio"] == pytest.approx(3.0, rel=1e-3)
    assert fast["p20_ms"] < fast["p50_ms"] < fast["p80_ms"]
    slow, _ = compare(sides, repeats=5, warmup=1, threads_per_side=(1,), baseline="fast")
    assert slow["ratio"] == pytest.approx(1 / 3, rel=1e-3)


def test_each_side_keeps_the_threads_that_suit_it(monkeypatch):
    before = torch.get_num_threads()
    seen: dict[str, list[int]] = {"few": [], "many": []}

    def time_once(run, device):
        run()
        name = calls[-1]
        seen[name].append(torch.get_num_threads())
        return float(torch.get_num_threads()) if name == "few" else 1.0 / torch.get_num_threads()

    calls: list[str] = []
    monkeypatch.setattr(harness, "time_once", time_once)
    few, many = compare({name: recorder(calls, name) for name in seen}, repeats=2, warmup=1, threads_per_side=(1, 2))
    assert (few["threads"], many["threads"]) == (1, 2)
    assert seen["few"][-2:] == [1, 1]
    assert seen["many"][-2:] == [2, 2]
    assert torch.get_num_threads() == before
    compare({"few": recorder(calls, "few")}, repeats=2, threads_per_side={"few": 2})
    assert seen["few"][-2:] == [2, 2]


def test_a_wrong_result_is_never_timed():
    calls: list[str] = []
    right = torch.arange(4.0)
    sides = {"base": recorder(calls, "base", right), "wrong": recorder(calls, "wrong", right + 0.1)}
    with pytest.raises(WrongResultError, match=r"wrong: differs from the baseline by 0\.1"):
        compare(sides, repeats=5, check=expect_close(atol=1e-3))
    assert calls == ["base", "wrong"]
    assert compare(sides, repeats=1, check=expect_close(atol=0.1), threads_per_side=(1,))


def test_the_check_compares_with_a_baseline_that_is_not_first():
    sides = {"a": lambda: torch.ones(2), "b": lambda: torch.ones(2)}
    wanted: list[object] = []
    compare(sides, repeats=1, baseline="b", check=lambda name, got, want: wanted.append((name, want is not None)))
    assert wanted == [("b", True), ("a", True)]


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (torch.tensor([1.0, math.nan]), "differs from the baseline by nan"),
        (torch.ones(3), "got shapes"),
        ((torch.ones(2), torch.ones(2)), "got shapes"),
    ],
)
def test_nan_and_other_shapes_are_wrong(got, message):
    with pytest.raises(WrongResultError, match=message):
        expect_close(atol=1.0)("x", got, torch.ones(2))


def test_indices_are_compared_too():
    expect_close(atol=0.0)("x", (torch.tensor([3, 4]), 7), (torch.tensor([3, 4]), 7))
    with pytest.raises(WrongResultError):
        expect_close(atol=0.0)("x", torch.tensor([3, 4]), torch.tensor([4, 3]))


def test_percentiles():
    assert percentiles([5.0]) == (5.0, 5.0, 5.0)
    assert percentiles([float(n) for n in range(11)]) == pytest.approx((2.0, 5.0, 8.0))
    with pytest.raises(ValueError, match="repeats=0: want at least 1"):
        percentiles([])


@pytest.mark.parametrize("sides", [{}, {"a": lambda: None}])
def test_an_unknown_baseline_is_refused(sides):
    with pytest.raises(ValueError, match="baseline=b: want"):
        compare(sides, baseline="b")


def test_a_header_names_machine_versions_and_commit(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "99")
    report = header(command=["python", "scripts/benchmark.py", "op=merge", "hydra.run.dir=."])
    assert report["command"] == "python scripts/benchmark.py op=merge"
    assert {"device", "cpu", "cores", "torch", "triton", "commit", "dirty", "time", "load_1min"} <= report.keys()
    assert isinstance(report["dirty"], bool)
    assert "MALLOC_TRIM_THRESHOLD_=99" in report["environment"].split()
    assert not report["commit"].endswith("-dirty")
    if not torch.cuda.is_available():
        assert report["claim"] == "CPU run: no claim about the speed of a GPU"


def test_the_report_is_written_and_is_the_last_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"side": "a", "p50_ms": 1.5}, {"side": "b", "p50_ms": 1234.5, "note": None}]
    print_table("title", rows)
    path = write_report("kernels", {"device": "cpu"}, rows)
    assert path.parts == ("outputs", "bench", f"kernels-{device_slug()}.json")
    lines = capsys.readouterr().out.strip().splitlines()
    assert json.loads(lines[-1]) == json.loads(path.read_text())
    assert json.loads(lines[-1]) == {"suite": "kernels", "header": {"device": "cpu"}, "rows": rows}
    assert any("1.5" in line for line in lines)
    assert any("1234" in line for line in lines)
    assert write_report("x", {}, [], "elsewhere/a.json").is_file()


def test_what_is_wanted_is_compared_with_what_was_measured():
    wanted = {"wanted": "share >= 0.7, cost <= 2"}
    assert is_met(wanted | {"share": 0.7, "cost": 2}) is True
    assert is_met(wanted | {"share": 0.6, "cost": 1}) is False
    assert is_met(wanted | {"share": 0.8, "cost": 2.1}) is False
    assert is_met(wanted | {"share": 0.8, "cost": None}) is None
    assert is_met(wanted | {"share": None, "cost": 3.0}) is False
    strict = {"wanted": "ratio > 1, |errors| < 2"}
    assert is_met(strict | {"ratio": 1.1, "errors": -1.9}) is True
    assert is_met(strict | {"ratio": 1.0, "errors": 0.0}) is False
    assert is_met(strict | {"ratio": 1.1, "errors": -2.0}) is False
    with pytest.raises(KeyError):
        is_met({"wanted": "ratio == 1", "ratio": 1})
