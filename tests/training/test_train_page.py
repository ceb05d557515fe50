"""docs/train.md: its commands compose, its records are read, its links lead somewhere, its table is what is printed."""

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from aurora.cli import VERBS, _with_quotes
from aurora.config import load_config, registered_schema
from aurora.data.records import check_record
from aurora.training.config import TrainConfig
from aurora.training.plan import format_plan, memory_plan

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


def split(command: str) -> tuple[str, list[str]]:
    """Verb and settings of a command; torchrun's and Hydra's own options are left out."""
    words = shlex.split(command, comments=True)
    if words[0] == "aurora":
        return words[1], words[2:]
    start = words.index("scripts/train.py")
    assert words[:start] in (["python"], ["torchrun", "--nproc-per-node", "8"])
    return "train", [word for word in words[start + 1 :] if word != "-m"]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_composes(command: str) -> None:
    verb, settings = split(command)
    importlib.import_module(VERBS[verb][0])
    schema = registered_schema(verb)
    assert schema is not None
    own = [setting for setting in settings if not setting.startswith("hydra")]
    with initialize_config_module("aurora.configs", version_base="1.3"):
        config = load_config(compose(verb, overrides=_with_quotes(own, schema)), schema)
    if isinstance(config, TrainConfig):
        assert config.stages


@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None, reason="an extra")
def test_the_slurm_launcher_takes_the_settings() -> None:
    [command] = [command for command in COMMANDS if "submitit" in command]
    verb, settings = split(command)
    with initialize_config_module("aurora.configs", version_base="1.3"):
        config = compose(verb, overrides=settings, return_hydra_config=True)
    assert config.hydra.launcher._target_.endswith("SlurmLauncher")
    assert config.hydra.launcher.tasks_per_node == config.hydra.launcher.gpus_per_node == 8


def test_each_record_is_read() -> None:
    [records] = blocks("json")
    kinds = [check_record(json.loads(line), num_frames=8).kind for line in records.splitlines()]
    assert kinds == ["image", "video", "video", "text"]


def test_the_plan_is_the_one_that_is_printed() -> None:
    [shown] = [block for block in blocks("text") if "expected peak" in block]
    with initialize_config_module("aurora.configs", version_base="1.3"):
        config = load_config(compose("train", overrides=["experiment=auroracap_7b_language"]), TrainConfig)
    assert shown == f"stage language: conversations\n{format_plan(memory_plan(config, config.stages['language']))}\n"


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / "docs" / path).resolve().exists() if path else anchor in anchors, link
