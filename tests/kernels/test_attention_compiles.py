"""The attention kernels compile to machine code of the GPUs they are for, which needs a compiler but no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aurora.kernels.common import HAS_TRITON

SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that one program may have on A100, H100


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "width", "flags"),
    [("bf16", 80, "bias"), ("fp16", 80, ""), ("bf16", 128, "causal bias mask gqa"), ("fp32", 80, "bias")],
)
def test_kernels_compile(dtype: str, width: int, flags: str, capability: int) -> None:
    # In a process of its own: this one may have loaded Triton as an interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(capability), dtype, str(width), *flags.split()],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["attention_fwd_kernel", "attention_bwd_q_kernel", "attention_bwd_kv_kernel"]
    for _name, shared, products in lines:
        assert int(shared) <= SHARED_MEMORY_BYTES[capability]
        assert dtype == "fp32" or int(products) > 0, "no tensor cores"


def _compile(capability: int, dtype: str, width: int, flags: list[str]) -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from aurora.kernels import attention_bwd_triton as backward
    from aurora.kernels import attention_triton as forward

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    q = torch.empty(1, 730, 16, width, dtype=types[dtype], device="meta")
    k = torch.empty(1, 730, 4 if "gqa" in flags else 16, width, dtype=types[dtype], device="meta")
    bias = k if "bias" in flags else None
    mask = k if "mask" in flags else None
    kernels = (forward.attention_fwd_kernel, backward.attention_bwd_q_kernel, backward.attention_bwd_kv_kernel)
    for kernel in kernels:
        tile = forward.tile_sizes(q, backward=kernel is not kernels[0])
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        constants = forward.kernel_flags(q, k, mask, bias, "causal" in flags) | tile
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name in ("bias_ptr", "log_sum_ptr", "delta_ptr"):
                signature[name] = "*fp32"
            elif name == "mask_ptr" and mask is not None:
                signature[name] = "*u8"
            else:
                signature[name] = f"*{dtype}" if name.endswith("_ptr") else "fp32" if name == "scale" else "i32"
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = [n for n in kernel.arg_names if n.endswith("_ptr") or n.startswith("stride")]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        code = compiled.asm["ptx"]
        print(kernel.__name__, compiled.metadata.shared, code.count("wgmma.mma_async") + code.count("mma.sync"))


if __name__ == "__main__":
    _compile(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
