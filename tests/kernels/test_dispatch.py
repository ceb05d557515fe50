"""Which backend an operation gets, what is recorded, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from aurora import kernels
from aurora.kernels import dispatch
from aurora.kernels.common import dtype_reason, next_power_of_2, with_dense_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choices of other tests; a machine with Triton and no interpreter, whatever this one is."""
    monkeypatch.delenv("AURORA_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_announced", set())
    yield
    kernels.set_default("auto")


def choose(device: torch.device = CPU, against: str | None = None, backend: str | None = None) -> str:
    return kernels.choose("op", device=device, reason_against=against, backend=backend)


def test_auto_takes_triton_on_cuda_only_and_where_it_can_serve() -> None:
    assert choose(CUDA) == "triton"
    assert choose(CUDA, against="float64") == "torch"
    assert choose(CPU) == "torch"


def test_auto_leaves_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert choose(CPU) == "torch"
    assert choose(CPU, backend="triton") == "triton"
    with pytest.raises(kernels.KernelUnavailable, match="interpreter is for tensors on a CPU"):
        choose(CUDA, backend="triton")


@pytest.mark.parametrize(
    ("device", "against", "has_triton", "words"),
    [
        (CPU, None, True, "op: tensors are on cpu, want cuda, or TRITON_INTERPRET=1"),
        (CUDA, "x is float64", True, r"op: x is float64 \(backend=triton\)"),
        (CUDA, None, False, "op: Triton is not installed"),
    ],
)
def test_triton_that_cannot_run_raises(
    device: torch.device, against: str | None, has_triton: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", has_triton)
    with pytest.raises(kernels.KernelUnavailable, match=words) as caught:
        choose(device, against, backend="triton")
    assert isinstance(caught.value, ValueError)
    assert caught.value.op == "op"
    assert kernels.report() == []


def test_argument_beats_use_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(CUDA) == "triton"
    kernels.set_default("torch")
    assert choose(CUDA) == "torch"
    monkeypatch.setenv("AURORA_KERNELS", "triton")
    assert choose(CUDA) == "triton"
    with kernels.use("torch"):
        assert choose(CUDA) == "torch"
        with kernels.use("auto"):
            assert choose(CUDA) == "triton"
        assert choose(CUDA, backend="triton") == "triton"
        assert choose(CUDA) == "torch"
    assert choose(CUDA) == "triton"


def test_use_is_undone_by_an_error() -> None:
    with pytest.raises(RuntimeError, match="boom"), kernels.use("torch"):
        raise RuntimeError("boom")
    assert choose(CUDA) == "triton"


def test_unknown_names_are_refused_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"kernels\.use=cuda: want one of auto, torch, triton"), kernels.use("cuda"):
        pass
    with pytest.raises(ValueError, match=r"runtime\.kernels=no: want"):
        kernels.set_default("no")
    with pytest.raises(ValueError, match="backend=fast: want"):
        choose(backend="fast")
    monkeypatch.setenv("AURORA_KERNELS", "Triton")
    with pytest.raises(ValueError, match="AURORA_KERNELS=Triton: want"):
        choose()


def test_the_report_counts_choices_with_their_reason() -> None:
    choose(CUDA)
    choose(CUDA)
    choose(CUDA, against="too wide")
    choose(CUDA, backend="torch")
    assert kernels.report() == [
        {"op": "op", "backend": "triton", "reason": "auto", "calls": 2},
        {"op": "op", "backend": "torch", "reason": "too wide", "calls": 1},
        {"op": "op", "backend": "torch", "reason": "backend=torch", "calls": 1},
    ]
    kernels.reset_report()
    assert kernels.report() == []


def test_a_fallback_on_a_gpu_is_announced_once_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="aurora.kernels"):
        for against in ("too wide", "too wide", "float64", None):
            choose(CUDA, against=against)
        choose(CPU)  # nobody expects Triton there
        choose(CUDA, against="too wide", backend="torch")  # asked for
    assert [record.getMessage() for record in caplog.records] == [
        "op runs in PyTorch, not Triton: too wide",
        "op runs in PyTorch, not Triton: float64",
    ]


def test_a_choice_is_part_of_the_compiled_graph_and_guarded() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if choose(CUDA) == "triton" else x - 1

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    assert compiled(x)[0] == compiled(x)[0] == 1
    with kernels.use("torch"):
        assert compiled(x)[0] == -1
    assert compiled(x)[0] == 1
    assert [(row["backend"], row["calls"]) for row in kernels.report()] == [("triton", 1), ("torch", 1)]


def test_guards_of_tensors() -> None:
    assert dtype_reason({"x": torch.zeros(1), "y": None}) is None
    assert dtype_reason({"x": torch.zeros(1), "y": torch.zeros(1, dtype=torch.int8)}) == (
        "y is int8, kernels take float32, float16 and bfloat16"
    )
    x = torch.zeros(2, 3, 4)
    assert with_dense_rows(x[:, ::2]).data_ptr() == x.data_ptr()
    assert with_dense_rows(x.mT).stride(-1) == 1
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
