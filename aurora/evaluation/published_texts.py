"""Prompts and judge wording of others: our JSON, or the authors' Python files, which are read and never run.

`process_vdc_result.py` and lmms-eval's `tasks/vdc/utils.py` hold lists named `<category>_caption_prompts`, and two
functions whose system and user texts are the requests to the judge. Both are found in the syntax tree.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from aurora.data.tinyworld.language import caption_prompts
from aurora.evaluation.judge import Wording
from aurora.evaluation.tinyvdc import CATEGORIES

_NAMES = {
    "pred_cap": "caption",
    "caption": "caption",
    "q": "question",
    "question": "question",
    "answer": "answer",
    "response": "prediction",
    "pred_answer": "prediction",
}
"""What stands in their texts, and what it is."""


def read_prompts(path: str | None, categories: Sequence[str]) -> dict[str, list[str]]:
    """Read the prompts that ask for each caption.

    Args:
        path: JSON of category -> texts, or a published .py; None gives one prompt of our own for each category.
        categories: Those wanted.

    Returns:
        Category -> at least one prompt.

    Raises:
        ValueError: if the file cannot be read, or has no prompts for a category.
    """
    if path is None:
        return {name: caption_prompts(name)[:1] for name in categories}
    key = "data.prompts_file"
    lists = _lists_in_python(_parse(path, key)) if path.endswith(".py") else _read_json(path, key)
    prompts = {}
    for name in categories:
        texts = lists.get(name)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{key}={path}: found no list of prompts for {name}, want one of texts")
        prompts[name] = [str(text) for text in texts]
    return prompts


def choose_prompts(prompts: Mapping[str, Sequence[str]], video: str, seed: int) -> dict[str, str]:
    """Choose one prompt of each category for a video; other videos and categories do not change the choice.

    Args:
        prompts: Category -> texts.
        video: Its name.
        seed: Of the run.

    Returns:
        Category -> prompt.
    """
    chosen = {}
    for name, texts in prompts.items():
        digest = int.from_bytes(sha256(f"{name}/{video}".encode()).digest()[:8], "little")
        chosen[name] = texts[int(np.random.default_rng([seed, digest]).integers(len(texts)))]
    return chosen


def read_wording(path: str | None) -> Wording:
    """Read the words of the requests to the judge.

    Args:
        path: JSON of `Wording`'s fields, those left out staying ours, or a published .py; None gives ours.

    Raises:
        ValueError: if the file cannot be read, or is no wording.
    """
    if path is None:
        return Wording()
    key = "judge.wording_file"
    texts = _wording_in_python(_parse(path, key)) if path.endswith(".py") else _read_json(path, key)
    known = [field.name for field in fields(Wording)]
    if not texts or any(name not in known or not isinstance(text, str) for name, text in texts.items()):
        raise ValueError(f"{key}={path}: got {', '.join(texts) or 'nothing'}, want texts for {', '.join(known)}")
    wording = replace(Wording(), **{name: str(text) for name, text in texts.items()})
    for name, needed in (("answer_user", ("caption", "question")), ("verdict_user", ("answer", "prediction"))):
        if missing := [field for field in needed if f"{{{field}}}" not in getattr(wording, name)]:
            raise ValueError(f"{key}={path}: {name} has no {{{missing[0]}}}, want it in the text")
    return wording


def _read_json(path: str, key: str) -> dict[str, object]:
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{key}={path}: {error}; want a JSON object or a .py file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{key}={path}: want a JSON object")
    return content


def _parse(path: str, key: str) -> ast.Module:
    try:
        return ast.parse(Path(path).expanduser().read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{key}={path}: {error}; want Python as published") from None


def _lists_in_python(tree: ast.Module) -> dict[str, object]:
    lists: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.List):
            name = node.targets[0].id.lower().removesuffix("_caption_prompts")
            if name in CATEGORIES:
                lists[name] = [item.value if isinstance(item, ast.Constant) else None for item in node.value.elts]
    return lists


def _wording_in_python(tree: ast.Module) -> dict[str, object]:
    """The texts of the two functions: one fills in a caption, the other an answer."""
    wording: dict[str, object] = {}
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        texts: dict[str, str] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
                texts.setdefault(node.func.id, _text(node.args[0]))
            elif isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
                entry = {str(k.value): v for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant)}
                if {"role", "content"} <= set(entry) and isinstance(entry["role"], ast.Constant):
                    texts.setdefault(str(entry["role"].value), _text(entry["content"]))
        user = texts.get("user", "")
        kind = "answer" if "{caption}" in user else "verdict" if "{prediction}" in user else None
        if kind is not None:
            wording[f"{kind}_user"] = user
            wording[f"{kind}_system"] = texts.get("system", "")
    return wording


def _text(node: ast.expr) -> str:
    """A text or f-string, with our names for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if not isinstance(node, ast.JoinedStr):
        return ""
    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            value = part.value
            if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Constant):
                name = str(value.slice.value)
            else:
                name = value.id if isinstance(value, ast.Name) else ""
            parts.append(f"{{{_NAMES.get(name, name)}}}")
        else:
            parts.append(_text(part))
    return "".join(parts)
