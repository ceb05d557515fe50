"""docs/api.md is what the docstrings say now, and they name every argument."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import aurora

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(build_api: ModuleType) -> None:
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == build_api.render(), "run: make docs"


def test_the_page_has_every_public_name(build_api: ModuleType) -> None:
    headings = re.findall(r"^##+ (\S+)$", build_api.render(), flags=re.MULTILINE)
    assert set(aurora.__all__) <= set(headings)
    for method in ("from_pretrained", "save_pretrained", "forward", "generate", "encode"):
        assert f"AuroraForConditionalGeneration.{method}" in headings
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("name", aurora.__all__)
def test_docstrings_name_every_argument(name: str) -> None:
    """Of a method that has an Args section, and of those that take more than one argument."""
    item = getattr(aurora, name)
    functions = [item] if inspect.isfunction(item) else [f for f in vars(item).values() if inspect.isfunction(f)]
    functions += (
        [f.__func__ for f in vars(item).values() if isinstance(f, classmethod)] if inspect.isclass(item) else []
    )
    for function in functions:
        if function.__name__.startswith("_") and function.__name__ not in ("__init__", "__call__"):
            continue
        names = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        documented = re.findall(r"^ {4}\*{0,2}(\w+):", inspect.getdoc(function) or "", flags=re.MULTILINE)
        if documented:
            assert set(names) <= set(documented), f"{name}.{function.__name__}: {set(names) - set(documented)}"
