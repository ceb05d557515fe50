"""The merge kernels compile to machine code of the GPUs they are for, and no tuned choice changes an order of sums."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aurora.kernels.common import HAS_TRITON

SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that one program may have on A100, H100


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "width"), [("fp32", 80), ("fp32", 5), ("bf16", 80), ("bf16", 16), ("fp16", 128)])
def test_matching_compiles_and_every_tile_sums_norms_alike(dtype: str, width: int, capability: int) -> None:
    lines = run("match", capability, dtype, width)
    tuned = [line for line in lines if line[0] == "match_fwd_kernel"]
    assert len(tuned) > 1
    assert lines[-1][0] == "select_fwd_kernel"
    assert_fits(lines, capability)
    assert all(line[3] == "1" for line in tuned), "equal scores do not go to the lowest index"  # the interpreter's do
    # One norm in another order is another last bit, and that may be another pair: then timing would choose what merges.
    layouts = {layout for line in tuned for layout in line[4:]}
    assert len(layouts) == 1, layouts


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "width"), [("bf16", 1280), ("fp32", 1152), ("fp16", 33), ("bf16", 8192)])
def test_merging_compiles(dtype: str, width: int, capability: int) -> None:
    lines = run("merge", capability, dtype, width)
    assert [line[0] for line in lines] == ["merge_fwd_kernel"] * 2 + ["merge_bwd_kernel"] * 2 + ["norm_bwd_kernel"]
    assert_fits(lines, capability)


def run(op: str, capability: int, dtype: str, width: int) -> list[list[str]]:
    """Kernel, bytes of shared memory, uses of local memory in PTX, maxima by lowest index, layouts of float sums."""
    # In a process of its own: this one may have loaded Triton as an interpreter.
    done = subprocess.run(
        [sys.executable, __file__, op, str(capability), dtype, str(width)],
        capture_output=True,
        text=True,
        timeout=280,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split("|") for line in done.stdout.splitlines()]


def assert_fits(lines: list[list[str]], capability: int) -> None:
    for name, shared, local, *_ in lines:
        assert int(shared) <= SHARED_MEMORY_BYTES[capability], name
        assert int(local) == 0, f"{name} keeps arrays in local memory"


def _compile(op: str, capability: int, dtype: str, width: int) -> None:
    from aurora.kernels import match_triton, merge_triton
    from aurora.kernels.common import next_power_of_2

    tile = {"BLOCK_D": match_triton.tile_width(width), "CLASS_TOKEN": True}
    if op == "match":
        for config in match_triton._CONFIGS:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            _report(match_triton.match_fwd_kernel.fn, tile | config.kwargs, options, capability, dtype)
        select = {"CLASS_TOKEN": True, "BLOCK_A": 512, "BLOCK_J": 32}
        _report(match_triton.select_fwd_kernel, select, {"num_warps": 8}, capability, dtype)
        return
    row = merge_triton._row_tile(width)
    options = {"num_warps": row.pop("num_warps")}
    for everything in (True, False):
        flags = dict.fromkeys(("HAS_RESIDUAL", "HAS_NORM", "HAS_BIAS"), everything)
        flags |= {"HAS_MERGES": True, "BLOCK_R": next_power_of_2(22)} | row
        _report(merge_triton.merge_fwd_kernel, flags, options, capability, dtype)
    for norm in (True, False):
        _report(merge_triton.merge_bwd_kernel, {"HAS_NORM": norm} | row, options, capability, dtype)
    _report(merge_triton.norm_bwd_kernel, row, options, capability, dtype)


_TYPES = {
    "best_ptr": "*fp32", "scores_ptr": "*fp32", "size_ptr": "*fp32", "out_size_ptr": "*fp32", "log_size_ptr": "*fp32",
    "dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "partner_ptr": "*i32", "position_ptr": "*i32", "eps": "fp32",
    "unmerged_ptr": "*i64", "src_ptr": "*i64", "dst_ptr": "*i64",
}  # fmt: skip


def _report(kernel: object, constants: dict, options: dict, capability: int, dtype: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else _TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or "stride" in n},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^#(\w+) = (.*)$", code, flags=re.MULTILINE))
    sums = re.findall(r"\(tensor<\d+x\d+xf32, #(\w+)>\) -> tensor<\d+xf32", code)  # not of a maximum and its index
    within_row = [re.sub(r"\[(\d+), (\d+)\]", r"\2", layouts[name]) for name in sums]
    lowest = len(re.findall(r"cmpf oeq, %arg\d+, %arg\d+ : f32.*\n.*cmpi slt, %arg\d+, %arg\d+ : i32", code))
    local = compiled.asm["ptx"].count(".local")
    print(kernel.__name__, compiled.metadata.shared, local, lowest, *within_row, sep="|")


if __name__ == "__main__":
    _compile(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
