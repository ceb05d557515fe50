"""Which implementation an operation runs: PyTorch or Triton. Decided before the launch, recorded, never changed later.

`with use("torch")` beats the environment variable AURORA_KERNELS, which beats `set_default` (`runtime.kernels` of a
config), which is `auto` at first. A `backend=` argument of an operation beats them all. `auto` takes Triton on CUDA
where it can serve the arguments and PyTorch elsewhere; the interpreter on a CPU is a test tool and has to be asked for.
Asking for Triton where it cannot run raises. Nothing is caught around a launch.

Under torch.compile a choice is made while tracing and is part of the compiled code; `use` and `set_default` are
guarded, so another choice compiles again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from aurora.kernels.common import HAS_TRITON, INTERPRETED

__all__ = [
    "BACKENDS",
    "KernelUnavailable",
    "choose",
    "reason_against_device",
    "report",
    "reset_report",
    "set_default",
    "setting",
    "use",
]

BACKENDS = ("auto", "torch", "triton")
"""Names that every public operation takes as `backend`."""

logger = logging.getLogger("aurora.kernels")

_in_use: str | None = None
_default: str = "auto"
_choices: dict[tuple[str, str, str], int] = {}
_announced: set[tuple[str, str]] = set()

_Function = TypeVar("_Function", bound=Callable[..., Any])


class KernelUnavailable(ValueError):  # noqa: N818 - its name is part of the interface
    """Triton was asked for and cannot run an operation here."""

    def __init__(self, op: str, reason: str) -> None:
        super().__init__(f"{op}: {reason}")
        self.op = op
        self.reason = reason


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run operations with one backend inside a `with` block; concerns the whole process, not one thread.

    Args:
        backend: auto | torch | triton.

    Raises:
        ValueError: if there is no such backend.
    """
    global _in_use
    before, _in_use = _in_use, _checked(backend, "kernels.use")
    try:
        yield
    finally:
        _in_use = before


def set_default(backend: str) -> None:
    """Set the backend that operations run with unless `use` or AURORA_KERNELS says otherwise.

    Args:
        backend: auto | torch | triton.

    Raises:
        ValueError: if there is no such backend.
    """
    global _default
    _default = _checked(backend, "runtime.kernels")


def setting() -> str:
    """Return what operations without a `backend=` of their own run now: auto, torch or triton.

    Raises:
        ValueError: if AURORA_KERNELS is none of them.
    """
    return _wanted(None, _in_use, _default)[0]


def choose(op: str, *, device: torch.device, reason_against: str | None, backend: str | None = None) -> str:
    """Decide how an operation runs, and record it.

    Args:
        op: Name of the operation, for reports and errors.
        device: Where its tensors are.
        reason_against: Why Triton cannot serve these arguments, or None. No token counts in it: each reason is
            announced once.
        backend: auto | torch | triton, or None for what is set (see the module).

    Returns:
        `torch` or `triton`.

    Raises:
        KernelUnavailable: if Triton was asked for and cannot run.
        ValueError: if a backend has an unknown name.
    """
    # Read here, where torch.compile guards them; the rest happens once for each compiled graph.
    return _decide(op, device, reason_against, backend, _in_use, _default)


def reason_against_device(device: torch.device) -> str | None:
    """Say why Triton cannot run on a device, whatever the operation; None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and not INTERPRETED:
        return f"tensors are on {device.type}, want cuda, or TRITON_INTERPRET=1 before the start"
    if device.type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET is set, and the interpreter is for tensors on a CPU"
    return None


def report() -> list[dict[str, Any]]:
    """List the choices so far, in order of first use: op, backend, reason, calls (a compiled graph counts once)."""
    return [
        {"op": op, "backend": backend, "reason": reason, "calls": calls}
        for (op, backend, reason), calls in _choices.items()
    ]


def reset_report() -> None:
    """Forget the choices recorded and the reasons announced so far."""
    _choices.clear()
    _announced.clear()


def _checked(backend: str, key: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{key}={backend}: want one of {', '.join(BACKENDS)}")
    return backend


def _folded(function: _Function) -> _Function:
    # What torch.compiler.assume_constant_result sets; calling that one would import the compiler, three seconds long.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_folded
def _decide(
    op: str, device: torch.device, reason_against: str | None, argument: str | None, in_use: str | None, default: str
) -> str:
    wanted, source = _wanted(argument, in_use, default)
    against = reason_against_device(device) or reason_against
    if wanted == "triton":
        if against is not None:
            raise KernelUnavailable(op, f"{against} ({source})")
        return _record(op, "triton", source)
    if wanted == "torch":
        return _record(op, "torch", source)
    if against is None and device.type == "cuda":
        return _record(op, "triton", "auto")
    reason = against or "auto runs the interpreter only when asked"
    if (op, reason) not in _announced:
        _announced.add((op, reason))
        # On a CPU PyTorch is what anyone expects; on a GPU it is a fallback that costs speed.
        level = logging.WARNING if device.type == "cuda" else logging.INFO
        logger.log(level, "%s runs in PyTorch, not Triton: %s", op, reason)
    return _record(op, "torch", reason)


def _wanted(argument: str | None, in_use: str | None, default: str) -> tuple[str, str]:
    if argument is not None:
        return _checked(argument, "backend"), f"backend={argument}"
    if in_use is not None:
        return in_use, f"kernels.use({in_use!r})"
    from_environment = os.environ.get("AURORA_KERNELS")
    if from_environment:
        return _checked(from_environment, "AURORA_KERNELS"), f"AURORA_KERNELS={from_environment}"
    return default, f"runtime.kernels={default}"


def _record(op: str, backend: str, reason: str) -> str:
    key = (op, backend, reason)
    _choices[key] = _choices.get(key, 0) + 1
    return backend
