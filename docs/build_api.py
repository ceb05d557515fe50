"""Render docs/api.md from the docstrings of the public names: `make docs`, or `python docs/build_api.py`."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints, is_typeddict

import aurora
from aurora.config import field_meanings

TARGET = Path(__file__).with_name("api.md")
HEADER = """\
# API

Rendered from the docstrings by `make docs`; a test keeps it up to date. `from aurora import ...` gives the names of the
first part. Shapes: B rows of a batch, F frames, H and W pixels, T text positions, L positions with visual tokens, V
vocabulary.
"""
# What the public classes take and return, "module:name".
TYPES = (
    "aurora.model.vision:VisionConfig",
    "aurora.model.projector:ProjectorConfig",
    "aurora.model.llama:LlamaConfig",
    "aurora.model.llama:RopeScaling",
    "aurora.model.merge:MergeConfig",
    "aurora.model.merge:MergePlan",
    "aurora.model.cache:KVCache",
    "aurora.generation.sampling:SamplingConfig",
    "aurora.generation.options:GenerateOptions",
    "aurora.generation.options:MergeOptions",
    "aurora.generation.options:SamplingOptions",
    "aurora.modeling:ForwardOutput",
    "aurora.modeling:GenerateOutput",
    "aurora.modeling:VisualPrefix",
    "aurora.processing.image:ImageConfig",
    "aurora.processing.processor:Batch",
    "aurora.processing.text:Tokenizer",
    "aurora.processing.text:StreamDecoder",
)
PARTS = (
    "aurora.checkpoint.pretrained:load_language_model",
    "aurora.checkpoint.pretrained:load_vision_tower",
    "aurora.checkpoint.gguf:load_llama",
    "aurora.processing.gguf_tokenizer:load_gguf_tokenizer",
)
_SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$")
_TITLES = {"Args": "Arguments", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
_MODULE_PREFIX = re.compile(r"\b[a-z_][\w.]*\.(?=[A-Z])")


def render() -> str:
    """Return the whole page."""
    pieces = [HEADER]
    for name in aurora.__all__:
        pieces += _entry(name, getattr(aurora, name))
    for title, names in (("Types they use", TYPES), ("Parts alone", PARTS)):
        pieces.append(f"# {title}\n")
        for path in names:
            module, _, name = path.partition(":")
            pieces += [*_entry(name, getattr(importlib.import_module(module), name), f"`{module}.{name}`\n")]
    return "\n".join(pieces)


def _entry(name: str, item: Any, place: str = "") -> Iterator[str]:
    """One class or function, with its public methods."""
    yield f"## {name}\n"
    if place:
        yield place
    if not inspect.isclass(item):
        yield _code(name, item)
        yield _prose(item)
        return
    if dataclasses.is_dataclass(item):
        yield _prose(item)
        yield _fields(item)
    elif is_typeddict(item):
        yield _prose(item)
        yield "".join(f"- `{key}: {_type(kind)}`\n" for key, kind in get_type_hints(item).items())
    else:
        if "__init__" in vars(item):
            yield _code(name, item.__init__, skip_self=True)
        yield _prose(item)
        if "__init__" in vars(item):
            yield _prose(item.__init__)
    for method, kind, function in _methods(item):
        yield f"### {name}{'()' if method == '__call__' else '.' + method}\n"
        if kind == "property":
            yield f"Property, `{_type(inspect.signature(function).return_annotation)}`.\n"
        else:
            shown = "processor" if method == "__call__" else method
            yield _code(shown, function, skip_self=kind != "static", before="@classmethod\n" * (kind == "class"))
        yield _prose(function)


def _methods(item: type) -> Iterator[tuple[str, str, Any]]:
    """Public methods that the class itself defines and documents: name, kind, function."""
    for name, member in vars(item).items():
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(member, property):
            yield name, "property", member.fget
        elif isinstance(member, classmethod):
            yield name, "class", member.__func__
        elif isinstance(member, staticmethod):
            yield name, "static", member.__func__
        elif inspect.isfunction(member):
            yield name, "plain", member


def _code(name: str, function: Any, *, skip_self: bool = False, before: str = "") -> str:
    """The signature, on one line or with one parameter a line."""
    signature = inspect.signature(function)
    shown: list[str] = []
    starred = False
    for index, parameter in enumerate(signature.parameters.values()):
        if index == 0 and skip_self:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {_type(parameter.annotation)}"
        spaced = " = " if annotation else "="
        default = "" if parameter.default is parameter.empty else f"{spaced}{_value(parameter.default)}"
        shown.append(f"{stars}{parameter.name}{annotation}{default}")
    result = "" if signature.return_annotation in (signature.empty, None, "None") else signature.return_annotation
    arrow = f" -> {_type(result)}" if result else ""
    line = f"{name}({', '.join(shown)}){arrow}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {text},\n" for text in shown) + f"){arrow}"
    return f"```python\n{before}{line}\n```\n"


def _fields(item: type) -> str:
    """The fields of a dataclass as a table."""
    meanings = field_meanings(item)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(item):
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"`{_value(field.default)}`"
        elif field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            default = f"`{type(made).__name__}()`" if dataclasses.is_dataclass(made) else f"`{_value(made)}`"
        cells = (f"`{field.name}`", f"`{_type(field.type)}`", default, meanings.get(field.name, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _prose(item: Any) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines = (inspect.getdoc(item) or "").splitlines()
    if inspect.isclass(item) and dataclasses.is_dataclass(item) and lines and lines[0].startswith(f"{item.__name__}("):
        lines = []  # what dataclasses write where there is no docstring
    out: list[str] = []
    section = ""
    for line in lines:
        found = _SECTION.match(line)
        if found:
            section = found[1]
            out += [f"**{_TITLES[section]}**", ""]
        elif not section or not line.strip():
            out.append(line)
        else:
            text = line.removeprefix("    ")
            entry = re.match(r"(\*{0,2}\w+): (.*)", text) if section in ("Args", "Raises") else None
            if entry:
                out.append(f"- `{entry[1]}`: {entry[2]}")
            else:
                out.append(f"  {text.strip()}" if section in ("Args", "Raises") else text)
    return "\n".join(out).strip() + "\n"


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _MODULE_PREFIX.sub("", text.replace("typing.", ""))


def _value(value: Any) -> str:
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
