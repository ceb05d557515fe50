"""Shared by all tests: one thread for each process, and the numbers computed with the original code."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: tests run side by side

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of tensors and tables computed with the original code."""
    return Path(__file__).parent / "goldens"
