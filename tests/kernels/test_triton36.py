"""The kernels on Triton 3.6, which a GPU's image may hold, in an environment of their own (`make .venv-triton36`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-triton36" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not PYTHON.exists(), reason="make .venv-triton36 builds the environment")
def test_the_kernels_pass_on_triton_36() -> None:
    version = "import triton, numpy; print(triton.__version__, numpy.__version__)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([PYTHON, "-c", version], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("3.6."), done.stdout
    files = [
        ROOT / "tests" / "kernels" / name for name in ("test_merge.py", "test_merge_triton.py", "test_attention.py")
    ]
    done = subprocess.run(
        [PYTHON, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
