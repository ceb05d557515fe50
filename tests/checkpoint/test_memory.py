"""Memory of loading and converting, as the peak of a fresh process; and one round at the full size of 7B."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

GIB = 2**30
ROOT = Path(__file__).parents[2]


def measured(task: str, **settings: Any) -> dict[str, Any]:
    """Run a task of `measure.py` in a process of its own."""
    command = [sys.executable, "-m", "tests.checkpoint.measure", task, json.dumps(settings)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1800,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(task, result)
    return result


@pytest.fixture(scope="module")
def two_gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random float16 checkpoint of 2.1 GB in the xtuner layout, in shards of 500 MB."""
    root = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(root).free < 6e9:
        pytest.skip("wants 6 GB of disk")
    done = measured(
        "write", folder=str(root / "model"), size="2gb", dtype="float16", layout="xtuner", max_shard_size="500MB"
    )
    assert 2.0e9 < done["bytes"] < 2.2e9
    yield root / "model"
    shutil.rmtree(root)


def test_loading_costs_at_most_a_tenth_more_than_the_weights(two_gigabytes: Path) -> None:
    done = measured("load", folder=str(two_gigabytes), dtype="float16")
    assert done["touched"] > 0
    assert done["peak"] - done["base"] <= 1.10 * done["bytes"]


@pytest.mark.parametrize("layout", ["aurora", "llava_hf"])
def test_converting_costs_at_most_a_shard_and_half_a_gigabyte(two_gigabytes: Path, layout: str) -> None:
    output = two_gigabytes.parent / layout
    done = measured("convert", folder=str(two_gigabytes), output=str(output), layout=layout, max_shard_size="500MB")
    shutil.rmtree(output)
    assert done["peak"] - done["base"] <= 0.5e9 + 0.5e9


def available_memory() -> int:
    """Bytes that a process could take now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def test_full_size(tmp_path_factory: pytest.TempPathFactory) -> None:
    """AuroraCap-7B in bfloat16: written as xtuner shards, converted, loaded, run for one image and four tokens."""
    root = tmp_path_factory.mktemp("full")
    if "AURORA_TEST_7B" not in os.environ:
        pytest.skip("takes about ten minutes and 45 GB of disk: set AURORA_TEST_7B=1")
    if shutil.disk_usage(root).free < 45e9:
        pytest.skip(f"wants 45 GB of disk, {shutil.disk_usage(root).free / 1e9:.0f} GB are free")
    if available_memory() < 20 * GIB:
        pytest.skip(f"wants 20 GiB of memory, {available_memory() / GIB:.1f} GiB are free")
    try:
        written = measured(
            "write", folder=str(root / "xtuner"), size="7b", dtype="bfloat16", layout="xtuner", max_shard_size="2GB"
        )
        assert 14e9 < written["bytes"] < 16e9
        made = measured(
            "convert", folder=str(root / "xtuner"), output=str(root / "aurora"), layout="aurora", max_shard_size="2GB"
        )
        assert made["peak"] - made["base"] <= 2.5e9
        shutil.rmtree(root / "xtuner")
        described = measured("describe", folder=str(root / "aurora"))
        assert len(described["ids"]) == 4
        assert described["dtype"] == "torch.bfloat16"
        assert described["peak"] <= 22 * GIB
    finally:
        shutil.rmtree(root)
