"""suite=kernels: every op in PyTorch, compiled and in Triton, against the formulation it replaces.

A row is an op, a shape, a type, a pass (fwd, bwd, full) and a side. On CUDA it also says how much of the device's
bandwidth and arithmetic the least necessary work amounts to, and the memory the side takes beyond its inputs.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console

from aurora.benchmark.cases import Case, Run, attention_cases, cross_entropy_cases, merge_cases
from aurora.benchmark.config import BenchmarkConfig, Op
from aurora.benchmark.encoder import strict_recompiles
from aurora.benchmark.harness import Row, compare
from aurora.kernels.cases import ENCODER_SHAPES, EncoderShape
from aurora.kernels.common import HAS_TRITON, INTERPRETED
from aurora.runtime import Dtype, resolve_device, resolve_dtype, seed_everything

PEAKS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12)}
"""Device -> bytes/s and half-precision operations/s by its data sheet, without sparsity."""

PASSES = ("fwd", "bwd", "full")


def run(config: BenchmarkConfig) -> list[Row]:
    """Measure the ops.

    Args:
        config: op picks one; quick takes tiny shapes; dtype and device as elsewhere.

    Returns:
        A row per op, shape, pass and side.
    """
    device = resolve_device(config.device)
    console = Console(stderr=True)
    rows: list[Row] = []
    # A backward pass is timed alone by running it again and again, for which its buffers must stay.
    functorch = importlib.import_module("torch._functorch.config")
    with strict_recompiles(), functorch.patch(donated_buffer=False):
        for case in _cases(config, device):
            for kind in PASSES if case.num_grads else PASSES[:1]:
                console.print(f"{case.op.value} {case.label} {_name(case.dtype)} {kind}", highlight=False)
                rows += measure(case, kind, config, device)
    return rows


def measure(case: Case, kind: str, config: BenchmarkConfig, device: torch.device) -> list[Row]:
    """Time one pass of a case on all its sides.

    Args:
        case: The op and its sides.
        kind: fwd, bwd or full.
        config: Of the run.
        device: Where the inputs are.

    Returns:
        A row per side.
    """
    torch.compiler.reset()  # each case compiles anew, and none counts towards another's limit
    sides = dict(case.sides)
    if config.compile:
        for name in case.compiled:
            sides[f"{name}, compiled"] = torch.compile(case.sides[name], fullgraph=True, dynamic=False)
    calls = {name: _call(side, case, kind) for name, side in sides.items()}
    on_gpu = device.type == "cuda"
    takes_long = case.op in (Op.attention, Op.linear_cross_entropy)
    compared = compare(
        calls,
        repeats=1 if config.quick else 30 if on_gpu else 15 if takes_long else 45,
        warmup=3 if on_gpu else 1 if config.quick else 2 if takes_long else 5,
        settle=0 if on_gpu or config.quick else 1,
        threads_per_side=(config.threads,) if config.threads else (1,) if config.quick else None,
        check=case.check if kind == "fwd" else None,
        device=device,
    )
    first: Row = {"op": case.op.value, "shape": case.label, "dtype": _name(case.dtype), "pass": kind}
    rows = []
    for row in compared:
        ratio = row.pop("ratio")
        rows.append(first | row | {"vs_first": ratio} | _rates(case, kind, row["p50_ms"], on_gpu))
        if on_gpu:
            rows[-1]["mib"] = _memory_mib(calls[row["side"]], device)
    del calls
    gc.collect()
    _add_ratios_to_compiled(rows, case)
    return rows


def _cases(config: BenchmarkConfig, device: torch.device) -> Iterator[Case]:
    ops = list(Op) if config.op is None else [config.op]
    # Interpreted kernels say whether a side works, never how fast it is.
    with_triton = HAS_TRITON and (device.type == "cuda" or (INTERPRETED and config.quick))
    if config.dtype is not Dtype.auto or config.quick:
        dtypes = [resolve_dtype(config.dtype, device)]
    else:
        dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    for op in ops:
        for dtype in dtypes if op is not Op.match else [torch.float32]:
            for shape in _shapes(config, op, device):
                seed_everything(config.seed)
                if op is Op.attention:
                    # The interpreter multiplies bfloat16 matrices wrongly.
                    dots = with_triton and not (INTERPRETED and dtype == torch.bfloat16)
                    yield from attention_cases(shape, dtype, device, with_triton=dots)
                elif op is not Op.linear_cross_entropy:
                    yield from merge_cases(op, shape, dtype, device, with_triton=with_triton)
            if op is Op.linear_cross_entropy:
                seed_everything(config.seed)
                sizes = (
                    (33, 64, 97)
                    if config.quick
                    else (4096, 4096, 32000)
                    if device.type == "cuda"
                    else (256, 1024, 32000)
                )
                yield from cross_entropy_cases(*sizes, dtype, device)


def _shapes(config: BenchmarkConfig, op: Op, device: torch.device) -> list[EncoderShape]:
    if config.quick:
        return [EncoderShape(B=2, N=19, C=32, H=2, D=16, R=5)]
    if device.type != "cuda":
        return [ENCODER_SHAPES[0]._replace(B=2) if op is Op.attention else ENCODER_SHAPES[0]]
    return list(ENCODER_SHAPES)


def _call(side: Run, case: Case, kind: str) -> Callable[[], Any]:
    """Return a call without arguments that runs one pass of a side."""
    if kind == "fwd":

        def forward() -> Any:
            with torch.no_grad():
                return side(*case.inputs)

        return forward
    # Leaves of their own: sides must not share gradients.
    leaves = [t.detach().clone().requires_grad_() for t in case.inputs[: case.num_grads]]
    inputs = (*leaves, *case.inputs[case.num_grads :])

    def outputs() -> list[torch.Tensor]:
        result = side(*inputs)
        tensors = result if isinstance(result, tuple) else (result,)
        return [tensor for tensor in tensors if tensor.requires_grad]

    if kind == "full":

        def full() -> Any:
            got = outputs()
            return torch.autograd.grad(got, leaves, [torch.ones_like(tensor) for tensor in got])

        return full
    kept: list[list[torch.Tensor]] = []

    def backward() -> Any:
        if not kept:  # the first call, which is not counted
            kept.append(outputs())
        return torch.autograd.grad(kept[0], leaves, [torch.ones_like(tensor) for tensor in kept[0]], retain_graph=True)

    return backward


def _rates(case: Case, kind: str, milliseconds: float, on_gpu: bool) -> Row:
    """Least traffic and arithmetic per second, and the larger share of the device's peak that these are."""
    passes = 2.0 if kind == "full" else 1.0
    flops = {"fwd": case.flops, "bwd": case.backward_flops, "full": case.flops + case.backward_flops}[kind]
    seconds = milliseconds / 1e3
    rates: Row = {"gb_per_s": passes * case.num_bytes / seconds / 1e9}
    rates["tflop_per_s"] = flops / seconds / 1e12 if flops else None
    if on_gpu:
        name = torch.cuda.get_device_name()
        bandwidth, arithmetic = next((peak for key, peak in PEAKS.items() if key in name), (None, None))
        if bandwidth is not None and arithmetic is not None:
            rates["share_of_peak"] = max(passes * case.num_bytes / seconds / bandwidth, flops / seconds / arithmetic)
    return rates


def _memory_mib(call: Callable[[], Any], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _add_ratios_to_compiled(rows: list[Row], case: Case) -> None:
    """Say of each row how many times faster it is than the first side compiled."""
    first = f"{next(iter(case.sides))}, compiled"
    compiled_ms = next((row["p50_ms"] for row in rows if row["side"] == first), None)
    for row in rows:
        row["vs_compiled"] = compiled_ms / row["p50_ms"] if compiled_ms is not None else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
