"""Shared by all tests: one thread for each process, and the numbers computed with the original code."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: tests run side by side

from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Verbs set the threads of their process, which is this one; other sums would then round otherwise."""
    yield
    torch.set_num_threads(1)
