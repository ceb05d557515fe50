"""The house rules that a machine can check: laziness, direction of imports, sizes, docstrings."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import aurora

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for folder in ("aurora", "kernels", "scripts")
    for file in (ROOT / folder).rglob("*.py")
    if not file.relative_to(ROOT).as_posix().startswith(("aurora/kernels/", "aurora/configs/"))
)
IDS = [file.relative_to(ROOT).as_posix() for file in SOURCES]

# Modules may import from their own level and below: the order of DESIGN section 1, highest first.
LEVELS = [
    {"scripts"},
    {"cli", "demo"},
    {"serving", "evaluation", "benchmark", "training", "visualization", "captioning", "conversion", "loading"},
    {"modeling"},
    {"generation", "checkpoint", "processing", "data"},
    {"model"},
    {"kernels"},
]
# Tools that any verb uses; they import nothing of Aurora but each other.
SHARED = {"config", "runtime", "records", "configs", "assets"}
HEAVY = [
    "hydra",
    "omegaconf",
    "av",
    "PIL",
    "triton",
    "timm",
    "transformers",
    "sentencepiece",
    "tokenizers",
    "matplotlib",
    "gradio",
    "fastapi",
    "tensorboard",
    "wandb",
    "playwright",
]


def part(module: str) -> str:
    """Name the part of the house that a module belongs to: `aurora.model.vision` is in `model`."""
    names = module.split(".")
    if names[0] in ("scripts", "kernels"):
        return names[0]
    return names[1] if len(names) > 1 else "aurora"


def level(name: str) -> int:
    found = [number for number, parts in enumerate(LEVELS) if name in parts]
    assert found, f"aurora.{name} has no place in LEVELS"
    return found[0]


def module_name(file: Path) -> str:
    names = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported_modules(file: Path) -> set[str]:
    """All modules of Aurora that a file imports, at the top, in functions or for types."""
    module = module_name(file)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            found.update([f"aurora.{alias.name}" for alias in node.names] if base == "aurora" else [base])
    return {name for name in found if name.split(".")[0] in ("aurora", "kernels", "configs", "scripts")}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lazy():
    assert run_python(f"import sys, aurora; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_model_and_kernels_need_only_torch_and_einops():
    code = "import sys, aurora.kernels, aurora.model.captioner; "
    assert run_python(code + f"print([m for m in {HEAVY} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("name", aurora.__all__)
def test_each_public_name_loads(name):
    assert getattr(aurora, name).__name__ == name
    assert name in dir(aurora)


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match="public names: AuroraConfig"):
        _ = aurora.AuroraConfg


def test_top_level_kernels_never_points_here():
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    assert str(ROOT) not in run_python(code)
    assert Path(str(importlib.util.find_spec("aurora.kernels").origin)).parent.resolve() == ROOT / "kernels"


@pytest.mark.parametrize("link", ["kernels", "configs"])
def test_symlinks_are_relative(link):
    assert (ROOT / "aurora" / link).readlink() == Path("..") / link


@pytest.mark.parametrize("file", SOURCES, ids=IDS)
def test_imports_go_one_way(file):
    own = part(module_name(file))
    for imported in imported_modules(file):
        assert imported.split(".")[0] not in ("kernels", "configs"), f"import aurora.{imported} instead"
        other = part(imported)
        if other in (own, *SHARED, "aurora") or own == "aurora":
            continue
        if own == "cli" and other == "__version__":
            continue
        assert own not in SHARED, f"{imported}: {own} imports nothing of Aurora"
        assert level(other) >= level(own), f"{imported} is above {own}"


@pytest.mark.parametrize("file", SOURCES, ids=IDS)
def test_files_are_short_and_named(file):
    assert len(file.read_text().splitlines()) <= 500
    assert "util" not in file.stem
    assert "helper" not in file.stem


@pytest.mark.parametrize("file", SOURCES, ids=IDS)
def test_functions_are_short(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.body[0].lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert lines < 60, f"{node.name} has {lines} lines below its signature and docstring"


@pytest.mark.parametrize("file", SOURCES, ids=IDS)
def test_public_names_have_docstrings(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "the module says what it is"
    assert list(undocumented(tree)) == []


def undocumented(tree: ast.Module | ast.ClassDef):
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        is_override = any(
            isinstance(mark, ast.Name) and mark.id in ("override", "overload") for mark in node.decorator_list
        )
        is_forward = node.name in ("forward", "backward") and len(node.body) <= 3
        if ast.get_docstring(node) is None and not is_override and not is_forward:
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node)


def test_version_is_in_the_changelog():
    assert f"## {aurora.__version__}" in (ROOT / "CHANGELOG.md").read_text()
