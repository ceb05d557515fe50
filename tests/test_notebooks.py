"""The notebooks: committed clean, and run without an error, a warning or a figure that has no caption."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbmake.nb_run import NotebookRun

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
QUESTIONS = (
    "how_merging_works",
    "inside_the_model",
    "kernels_against_pytorch",
    "train_a_tiny_captioner",
    "the_ratio_ablation",
    "which_ratio_do_i_need",
    "merging_in_someone_elses_tower",
)
LIMIT_S = 120
"""Of one notebook; seven of them stay within fourteen minutes."""
# Runs in the kernel before the first cell: what our code or a cell warns about is an error there.
STRICT = """\
import warnings

for category in (UserWarning, DeprecationWarning, FutureWarning, RuntimeWarning):
    warnings.filterwarnings("error", category=category, module=r"(aurora|__main__)")
"""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def codes(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def test_there_is_one_for_each_question() -> None:
    assert [path.stem[3:] for path in NOTEBOOKS] == list(QUESTIONS)
    assert [int(path.stem[:2]) for path in NOTEBOOKS] == list(range(1, len(QUESTIONS) + 1))


@every_notebook
def test_it_is_committed_without_outputs_and_is_short(path: Path) -> None:
    book = read(path)
    nbformat.validate(book)
    assert len(book.cells) < 15
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        assert not cell.metadata
        assert cell.source.strip()
    assert book.metadata.kernelspec.name == "python3"  # ipykernel's own, which needs no installed kernel
    assert set(book.metadata) == {"kernelspec", "language_info"}


@every_notebook
def test_its_first_cell_says_what_one_will_see_and_how_long_it_takes(path: Path) -> None:
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    for part in ("**The question:**", "**You will see**", "**Time:** about"):
        assert part in first.source


@every_notebook
def test_it_imports_aurora_and_defines_no_model_code(path: Path) -> None:
    trees = [ast.parse(code) for code in codes(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert not [node for node in nodes if isinstance(node, ast.ClassDef)]
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert any(module.startswith("aurora") for module in modules)
    assert not {module for module in modules if module.startswith(("torch.nn", "matplotlib"))}
    assert not [node for node in nodes if isinstance(node, ast.Attribute) and node.attr in ("nn", "savefig")]


@every_notebook
def test_what_it_imports_of_aurora_exists(path: Path) -> None:
    """So that a name that moves is noticed before the slow tests."""
    nodes = [node for code in codes(path) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    for node in nodes:
        if node.module is not None and node.module.startswith("aurora"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    alias.name
                )


@every_notebook
def test_it_names_no_place_of_a_machine(path: Path) -> None:
    for node in [node for code in codes(path) for node in ast.walk(ast.parse(code))]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/", "~", "./", "../", "http")), node.value


@pytest.mark.slow
@pytest.mark.timeout(600)
@every_notebook
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    book = run(path, tmp_path, monkeypatch)
    took_s = time.monotonic() - started
    print(f"{path.stem}: {took_s:.1f} s")
    check_outputs(book)
    assert took_s < LIMIT_S


@pytest.mark.slow
def test_a_warning_an_error_and_a_figure_without_caption_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "import numpy as np\nfrom aurora.visualization.notebook import captioned\nnp.zeros((9, 200, 3), np.uint8)"
    captioned = plain.replace("np.zeros", "captioned(np.zeros").replace("uint8)", "uint8), 'Nothing but black.')")
    image = "from PIL import Image\nImage.new('RGB', (9, 9))"
    for name, code, complaint in (
        ("good", captioned, None),
        ("warns", "import warnings\nwarnings.warn('beware')", "UserWarning"),
        ("printed", "print('FutureWarning: beware')", "FutureWarning: beware"),
        ("fails", "1 / 0", "ZeroDivisionError"),
        ("uncaptioned", image, "without a caption"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        nbformat.write(book, folder / "book.ipynb")
        if complaint is None:
            check_outputs(run(folder / "book.ipynb", folder / "run", monkeypatch))
        else:
            with pytest.raises(AssertionError, match=complaint):
                check_outputs(run(folder / "book.ipynb", folder / "run", monkeypatch))


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a copy in another folder, in a fresh kernel of this environment, and return it with its outputs."""
    here, profile = folder / "here", folder / "ipython" / "profile_default" / "startup"
    here.mkdir(parents=True)
    profile.mkdir(parents=True)
    (profile / "strict.py").write_text(STRICT, encoding="utf-8")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))  # not a kernel that some user has installed
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the notebook that needs it says so itself
    copy = Path(shutil.copy(path, here))
    result = NotebookRun(copy, default_timeout=500).execute()
    assert result.error is None, result.error.trace
    assert list(here.iterdir()) == [copy], "it leaves files where it runs"
    return result.nb


def check_outputs(book: Any) -> None:
    """Refuse warnings, whoever gave them, anything on stderr, and figures without a caption."""
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                assert output.name != "stderr", output.text
                assert "Warning" not in output.text, output.text
                continue
            data = output.data
            for kind, text in data.items():
                assert kind.startswith("image/") or "Warning" not in str(text), text
            if "image/png" in data:
                caption = data.get("text/plain", "")
                assert caption.endswith("."), f"a figure without a caption: {caption}"
