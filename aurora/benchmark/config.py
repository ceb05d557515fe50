"""Settings of the verb `benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from aurora.config import register_schema
from aurora.runtime import RuntimeConfig


class Suite(Enum):
    """What to measure."""

    kernels = "kernels"
    """Each op: reference, compiled and Triton."""
    encoder = "encoder"
    """The vision tower at several kept ratios, against itself unmerged and transformers' CLIP."""
    generation = "generation"
    """Prefill and decoding of the language model."""
    training = "training"
    """Training steps at several kept ratios, and our loop against transformers: time, memory, loss."""
    device = "device"
    """All that a GPU has to show: its tests, a memory check, and the other suites; into docs/results/<device>.json."""


class Step(Enum):
    """One part of suite=device."""

    tests = "tests"
    """pytest -m gpu; without a GPU the kernels run in Triton's interpreter."""
    sanitizer = "sanitizer"
    """The kernels under compute-sanitizer, tiny."""
    kernels = "kernels"
    encoder = "encoder"
    generation = "generation"
    """The suites of these names."""


class Op(Enum):
    """One op of the kernels suite."""

    match = "match"
    merge = "merge"
    merge_step = "merge_step"
    merge_norm = "merge_norm"
    attention = "attention"
    linear_cross_entropy = "linear_cross_entropy"


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig(RuntimeConfig):
    """Time our code against its alternatives in one process."""

    suite: Suite = Suite.kernels
    """kernels | encoder | generation | training | device."""
    op: Op | None = None
    """One op of suite=kernels, such as merge; null measures them all."""
    quick: bool = False
    """Tiny shapes and few repeats: whether it runs, not how fast it is."""
    compile: bool = True
    """Also measure what torch.compile makes of it (compiling takes seconds each)."""
    steps: list[Step] = field(default_factory=lambda: list(Step))
    """Parts of suite=device: tests, sanitizer, kernels, encoder, generation."""
    output: str | None = None
    """JSON file to write; null is outputs/bench/<suite>-<device>.json (suite=device on a GPU: docs/results)."""

    def __post_init__(self) -> None:
        """Check that the keys fit together."""
        RuntimeConfig.__post_init__(self)
        if self.op is not None and self.suite is not Suite.kernels:
            raise ValueError(f"op={self.op.value}: want suite=kernels, got suite={self.suite.value}")
        if self.steps != list(Step) and self.suite is not Suite.device:
            raise ValueError(f"steps={[step.value for step in self.steps]}: want suite=device, got {self.suite.value}")
        if self.output is not None and Path(self.output).suffix != ".json":
            raise ValueError(f"output={self.output}: want a name that ends in .json")


register_schema("benchmark_schema", BenchmarkConfig)
