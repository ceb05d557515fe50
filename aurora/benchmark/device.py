"""suite=device: the one command for a machine with a GPU, `python scripts/benchmark.py suite=device`.

Each step is a program of its own, since one illegal access ends every CUDA call of its process: the tests marked `gpu`,
the kernels under compute-sanitizer, then the suites. Without a GPU the same command runs the same tests in Triton's
interpreter and the suites with tiny shapes, and says so: it shows that everything is ready, and no speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from aurora.benchmark.config import BenchmarkConfig, Step
from aurora.benchmark.harness import Row, device_slug, header
from aurora.runtime import resolve_device

RESULTS = Path("docs/results")
"""Where results of a GPU are kept, in a checkout."""


def run(config: BenchmarkConfig) -> list[Row]:
    """Run the steps and, on a GPU, put what they found into docs/results.

    Args:
        config: Steps, device and whether to be quick.

    Returns:
        A row per step: result (passed, failed, skipped), seconds and a detail.

    Raises:
        ValueError: outside of a checkout, where there are no tests.
    """
    if not Path("tests/kernels").is_dir() or not RESULTS.is_dir():
        raise ValueError("suite=device: want the root of a checkout as the working directory, which has tests")
    device = resolve_device(config.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        print("no CUDA device: kernels run in Triton's interpreter, suites with tiny shapes; no speed claim")
    results: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for step in config.steps:
            print(f"--- {step.value}", flush=True)
            started = time.monotonic()
            result, detail, content = _run_step(step, config, Path(folder), device)
            results[step.value] = {"result": result, "detail": detail} | content
            rows.append({"step": step.value, "result": result, "seconds": time.monotonic() - started, "detail": detail})
    if on_gpu and not config.quick and config.output is None:
        path = RESULTS / f"{device_slug()}.json"
        before = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else {}
        content = {"header": header(), "steps": before | results}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")
    return rows


def _run_step(
    step: Step, config: BenchmarkConfig, folder: Path, device: torch.device
) -> tuple[str, str, dict[str, Any]]:
    """Return passed, failed or skipped, a line about it, and what belongs into the JSON."""
    on_gpu = device.type == "cuda"
    if step is Step.tests:
        report = folder / "tests.xml"
        return _tests(["-m", "gpu", "tests"], report)
    program = [sys.executable, "-m", "aurora.cli", "benchmark", f"device={device}"]
    if step is Step.sanitizer:
        sanitizer = _sanitizer()
        if not on_gpu or sanitizer is None:
            return (
                "skipped",
                "no CUDA device" if not on_gpu else "compute-sanitizer is in neither PATH nor CUDA_HOME",
                {},
            )
        check = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"]
        output = f"output={folder / 'sanitizer.json'}"
        # One allocation for each tensor, so that an access beyond it is seen.
        code = _call(
            [*check, *program, "suite=kernels", "quick=true", "compile=false", output],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        return ("failed", f"exit code {code}", {}) if code else ("passed", "no invalid access", {})
    output_file = folder / f"{step.value}.json"
    quick = config.quick or not on_gpu
    settings = [f"suite={step.value}", f"quick={str(quick).lower()}", f"seed={config.seed}", f"output={output_file}"]
    settings.append(f"compile={str(config.compile and on_gpu).lower()}")
    code = _call([*program, *settings], {"TRITON_INTERPRET": "0" if on_gpu else "1"})
    if code or not output_file.is_file():
        return "failed", f"exit code {code}", {}
    content = json.loads(output_file.read_text(encoding="utf-8"))
    return "passed", f"{len(content['rows'])} rows", content


def _sanitizer() -> str | None:
    """Find the program, which images with CUDA hold but often not in PATH."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(toolkit))


def _tests(selection: list[str], report: Path) -> tuple[str, str, dict[str, Any]]:
    """Run pytest and count what it says."""
    code = _call([sys.executable, "-m", "pytest", "-q", *selection, f"--junitxml={report}"], {})
    if not report.is_file():
        return "failed", f"exit code {code}, no report", {}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    detail = f"{passed} passed, {counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped"
    return ("failed" if code else "passed"), detail, {"counts": counts | {"passed": passed}}


def _call(command: list[str], environment: dict[str, str]) -> int:
    """Run a program with its output on ours; return its exit code."""
    return subprocess.run(command, env=os.environ | environment).returncode
