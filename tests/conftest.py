"""Shared by all tests: one thread for each process, and the numbers computed with the original code."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: tests run side by side

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton loads: kernels run on the CPU


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of tensors and tables computed with the original code."""
    return Path(__file__).parent / "goldens"
