"""Config files of every layout with values of the wrong kind: a ValueError each time, quickly, and nothing else."""

import copy
import json
import random
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from aurora.checkpoint.layouts import ALL_LAYOUTS, recognise
from aurora.checkpoint.lora import adapter_config
from aurora.checkpoint.store import CheckpointError
from tests.checkpoint.tiny_models import CLIP_TOWER, SIGLIP_TOWER, tiny_config

WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**12, 2**63, -(10**30), 1.5, 1e308, -0.0, "", "x", "3", "\ud800", [], [1], [[1, 2]], {},
    {"a": 1}, {"rows": "x"}, [None] * 3, "../../etc", "1" * 5000,
)  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path to a value, nested objects included."""
    found = [path] if path else []
    for key, value in content.items() if isinstance(content, dict) else ():
        found += places(value, (*path, key))
    return found


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


@pytest.mark.parametrize("name", list(ALL_LAYOUTS))
def test_wrong_values_are_refused_or_read_but_never_crash(name: str) -> None:
    layout = ALL_LAYOUTS[name]
    config = tiny_config(SIGLIP_TOWER if name == "siglip" else CLIP_TOWER)
    good = json.loads(json.dumps(layout.write_config(config, "pad")))
    generator = random.Random(name)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            path = generator.choice([path for path in places(good) if len(path) > 1])
            bad = changed(good, path, generator.choice(WRONG))
            began = time.monotonic()
            try:
                recognise(bad, where="x").read_config(bad)
            except CheckpointError:
                refused += 1
            assert time.monotonic() - began < 5, path
    assert refused > 100


def test_adapters_too(tmp_path: Path) -> None:
    good = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "base_model_name_or_path": "x",
    }  # fmt: skip
    refused = 0
    for key in good:
        for value in WRONG:
            (tmp_path / "adapter_config.json").write_text(json.dumps(good | {key: value}))
            try:
                adapter_config(tmp_path)
            except CheckpointError:
                refused += 1
    assert refused > 80
