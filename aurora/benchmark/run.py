"""The verb `benchmark`: run a suite, print its table, write its JSON."""

from __future__ import annotations

import importlib
from typing import Any

import hydra
from omegaconf import DictConfig

from aurora.benchmark.config import BenchmarkConfig
from aurora.benchmark.harness import header, print_header, print_table, write_report
from aurora.config import load_config


def benchmark(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Run the suite that `config` names, print and write what it found.

    Args:
        config: Suite, op, size and where to run.

    Returns:
        The rows, as in the JSON file.

    Raises:
        ValueError: if a step of suite=device failed.
    """
    report = header()
    print_header(report)
    if config.quick:
        print("quick=true: tiny shapes and few repeats, no speed claim")
        report["claim"] = "quick run: no speed claim"
    suite = importlib.import_module(f"aurora.benchmark.{config.suite.value}")
    name = config.suite.value if config.op is None else f"{config.suite.value}-{config.op.value}"
    rows: list[dict[str, Any]] = []
    try:
        for row in suite.run(config):
            rows.append(row)
    finally:
        # What was measured before a failure or Ctrl-C is kept too: some suites take many minutes.
        if rows:
            print_table(name, rows)
            write_report(name + ("-quick" if config.quick else ""), report, rows, config.output)
    if failed := [row["step"] for row in rows if row.get("result") == "failed"]:
        raise ValueError(f"failed: {', '.join(failed)}; what they printed stands above")
    return rows


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="benchmark")
def main(raw: DictConfig) -> None:
    """Measure what the command line names; called through `aurora.cli.run`."""
    benchmark(load_config(raw, BenchmarkConfig))
