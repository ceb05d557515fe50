"""Typed configuration: registers dataclass schemas with Hydra and turns a composed config into plain dataclasses.

Values live in `configs/*.yaml`, types and checks in the dataclass that stands beside the code it configures. Below
the scripts there is no `DictConfig`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

T = TypeVar("T")


class Setting(NamedTuple):
    """One key a user can set: dotted name, type as annotated, and its meaning (may be empty)."""

    key: str
    type: Any
    meaning: str


def register_schema(name: str, schema: type, *, group: str | None = None) -> None:
    """Make a dataclass known to Hydra, so that a YAML file can list it first in its defaults.

    Args:
        name: Name in a defaults list; the root schema of `caption.yaml` is `caption_schema`.
        schema: A `@dataclass(kw_only=True)`, not frozen.
        group: Config group of the schema; None for a root schema.
    """
    ConfigStore.instance().store(name=name, node=schema, group=group, provider="aurora")


def registered_schema(config_name: str) -> type | None:
    """Return the root schema of a config file, the one registered as `<config_name>_schema`, or None."""
    file = f"{config_name}_schema.yaml"
    store = ConfigStore.instance()
    if file not in store.list(""):
        return None
    return OmegaConf.get_type(store.load(file).node)


def load_config(raw: DictConfig, schema: type[T]) -> T:
    """Turn what Hydra composed into plain dataclasses, refusing every key the schema does not have.

    Hydra's `+key=value` walks past a schema, and `slots` alone would answer with a bare AttributeError, so the keys
    are compared with the dataclass fields here. The dataclasses' own `__post_init__` checks run last.

    Args:
        raw: The composed config, structured or plain.
        schema: Dataclass of the root.

    Returns:
        An instance of `schema`; nested configs are dataclasses, too.

    Raises:
        ValueError: if a key is unknown (with the nearest name) or a required one has no value.
    """
    _refuse_unknown_keys(raw, schema, prefix="", root=schema)
    if OmegaConf.get_type(raw) is not schema:
        raw = typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(schema), raw))
    missing = sorted(OmegaConf.missing_keys(raw))
    if missing:
        meanings = {setting.key: setting.meaning for setting in settings(schema)}
        meaning = meanings.get(missing[0], "")
        raise ValueError(f"{missing[0]}: no value given; want {missing[0]}=..." + (f" ({meaning})" if meaning else ""))
    config = OmegaConf.to_object(raw)
    assert isinstance(config, schema)
    return config


def settings(schema: type, prefix: str = "") -> Iterator[Setting]:
    """Walk every key of a schema, nested dataclasses included, in the order of the fields.

    Args:
        schema: Dataclass to walk.
        prefix: Dotted name before each key, with its dot.

    Yields:
        One `Setting` for each key that is not itself a nested config; `*` is any name in a dictionary.
    """
    hints = typing.get_type_hints(schema)
    meanings = field_meanings(schema)
    for field in fields(schema):
        nested = _nested_schema(hints[field.name])
        values = _nested_schema((typing.get_args(hints[field.name]) or (None,))[-1])
        if nested is not None:
            yield from settings(nested, f"{prefix}{field.name}.")
        elif typing.get_origin(hints[field.name]) is dict and values is not None:
            yield from settings(values, f"{prefix}{field.name}.*.")
        else:
            yield Setting(prefix + field.name, hints[field.name], meanings.get(field.name, ""))


def field_meanings(schema: type) -> dict[str, str]:
    """Read the docstring line under each field of a dataclass, of its bases, too.

    Args:
        schema: Dataclass whose source can be read.

    Returns:
        Field name to its meaning, on one line.
    """
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not is_dataclass(cls):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
        for field, following in itertools.pairwise(body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[field.target.id] = " ".join(str(following.value.value).split())
    return found


def unknown_key(key: str, schema: type) -> str:
    """Say that a key does not exist and which one was probably meant.

    Args:
        key: Dotted key as typed.
        schema: Root dataclass.

    Returns:
        One line, such as `unknown key num_frn; did you mean num_frm?`.
    """
    known = [setting.key for setting in settings(schema)]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    leaf = key.rpartition(".")[2]
    if leaf in by_leaf:
        return f"unknown key {key}; did you mean {by_leaf[leaf]}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    if near:
        return f"unknown key {key}; did you mean {near[0]}?"
    parent = key.rpartition(".")[0]
    siblings = [name for name in known if fnmatchcase(parent, name.rpartition(".")[0])]
    return (
        f"unknown key {key}; known keys: {', '.join(siblings or dict.fromkeys(name.split('.')[0] for name in known))}"
    )


def _nested_schema(annotation: Any) -> type | None:
    """Return the dataclass behind `X` or `X | None`, or None for a leaf."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(annotation) if option is not type(None)]
        annotation = inner[0] if len(inner) == 1 else None
    return annotation if isinstance(annotation, type) and is_dataclass(annotation) else None


def _refuse_unknown_keys(node: DictConfig | ListConfig, schema: Any, *, prefix: str, root: type) -> None:
    """Compare every key below `node` with the fields of the dataclass it stands for; `schema` is the annotation."""
    own = OmegaConf.get_type(node)  # may be a variant of the annotated schema, where a group has several
    schema = own if own is not None and is_dataclass(own) else _nested_schema(schema)
    hints = typing.get_type_hints(schema) if schema is not None else None
    for name in hints or ():
        if own is schema and name not in node.keys():  # noqa: SIM118 - `in node` is false for missing values
            raise ValueError(f"{prefix}{name}: was removed; want a value")
    keys: list[Any] = list(range(len(node))) if isinstance(node, ListConfig) else list(node.keys())
    for key in keys:
        if hints is not None and key not in hints:
            raise ValueError(unknown_key(f"{prefix}{key}", root))
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        child = node[key]
        if isinstance(child, DictConfig | ListConfig):
            annotation = hints[str(key)] if hints is not None else None
            _refuse_unknown_keys(child, annotation, prefix=f"{prefix}{key}.", root=root)
