"""The Python of docs/evaluate.md runs and prints what it says."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"


def test_the_examples_of_the_page_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert "CIDEr-D" in printed
    assert "ours: " in printed
    assert "kendall=1.0" in printed


def test_every_setting_on_the_page_exists():
    from aurora.config import settings
    from aurora.evaluation.config import EvaluateConfig

    known = {setting.key for setting in settings(EvaluateConfig)}
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:judge|data)\.[a-z_]+(?==|`)", text))
    assert len(named) > 8
    assert named <= known
