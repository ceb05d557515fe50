"""The command line: free text as typed, one-line errors, exit codes, nothing left behind."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import MISSING, DictConfig, OmegaConf

from aurora import cli
from aurora.config import load_config, register_schema
from aurora.runtime import describe_error


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass(kw_only=True, slots=True)
class PaintConfig:
    """Paint something."""

    colour: Colour = Colour.red
    """Colour of the paint."""
    coats: int = 1
    """Number of coats."""

    def __post_init__(self) -> None:
        if self.coats < 1:
            raise ValueError(f"paint.coats={self.coats}: want at least 1")


@dataclass(kw_only=True, slots=True)
class EchoConfig:
    """Echo what was typed."""

    target: str = MISSING
    """What to echo."""
    prompt: str = "hello"
    """Free text."""
    output: str | None = None
    """Path, or none."""
    count: int = 1
    """How often."""
    ratio: float = 0.5
    """A share."""
    paint: PaintConfig = field(default_factory=PaintConfig)
    """Nested."""


SEEN: list[EchoConfig] = []


@pytest.fixture(scope="module", autouse=True)
def echo_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "echo.yaml").write_text("defaults: [echo_schema, paint: plain, _self_]\ncount: 2\n")
    (folder / "paint").mkdir()
    (folder / "paint" / "plain.yaml").write_text("coats: 1\n")
    (folder / "paint" / "thick.yaml").write_text("coats: 3\n")
    register_schema("echo_schema", EchoConfig)

    @hydra.main(version_base="1.3", config_path=str(folder), config_name="echo")
    def main(raw: DictConfig) -> None:
        SEEN.append(load_config(raw, EchoConfig))

    globals()["echo_main"] = main


def echo(*arguments: str) -> EchoConfig:
    SEEN.clear()
    cli.run(globals()["echo_main"], list(arguments))
    return SEEN.pop()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, want exit code 2 and exactly one line on stderr, return that line."""
    with pytest.raises(SystemExit) as left:
        echo(*arguments)
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err[len("error: ") : -1]


TYPED = [
    "a, b, c",
    'say "hi"',
    "it's [one] {two} (three)",
    "x=y, z==w",
    "描述这个视频，详细一点。",
    "  leading and trailing  ",
    "two\nlines\n",
    "tab\tand \\ backslash \\\\",
    "ends with \\",
    'ends with \\"',
    "\\\\\"'",
    "${prompt} and \\${prompt} and \\\\${oc.env:HOME}",
    "null",
    "true",
    "12",
    "",
    "# not a comment: @ % & ! ~ + ?",
    "$",
    "$ {x} }",
]


@pytest.mark.parametrize("text", TYPED)
def test_text_arrives_as_typed(text):
    assert echo(f"prompt={text}", "target=x").prompt == text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("\\\"'${},=[]() \n"), max_size=12)
)
@example(text='\\${"}')
def test_quoting_is_undone_by_the_parsers(text):
    override = OverridesParser.create().parse_override(f"key={cli.quote(text)}")
    config = OmegaConf.create({"key": ""})
    OmegaConf.update(config, "key", override.value())
    if text != "???":  # OmegaConf's mark of a missing value
        assert config.key == text


def test_the_mark_of_a_missing_value_is_named(capsys):
    assert "target" in refused(capsys, "target=???")


def test_paths_with_blanks_and_parentheses_and_null():
    config = echo("target=my clips (1), take=2/a b.mp4", "output=null")
    assert config.target == "my clips (1), take=2/a b.mp4"
    assert config.output is None
    assert echo("target=x", "output=a,b.jsonl").output == "a,b.jsonl"


def test_values_come_from_yaml_then_overrides():
    config = echo("target=x", "paint=thick", "paint.colour=blue", "++prompt=a,b")
    assert (config.count, config.paint.coats, config.paint.colour) == (2, 3, Colour.blue)
    assert config.prompt == "a,b"


def test_multirun_runs_each_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SEEN.clear()
    cli.run(globals()["echo_main"], ["-m", "target=a,b", "count=1,2"])
    assert [(config.target, config.count) for config in SEEN] == [("a,b", 1), ("a,b", 2)]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["target=x", "promt=hi"], "unknown key promt; did you mean prompt?"),
        (["target=x", "+promt=hi"], "unknown key promt; did you mean prompt?"),
        (["target=x", "++promt=hi"], "unknown key promt; did you mean prompt?"),
        (["target=x", "coats=2"], "unknown key coats; did you mean paint.coats?"),
        (["target=x", "paint.coat=2"], "unknown key paint.coat; did you mean paint.coats?"),
        (["target=x", "+paint.coat=2"], "unknown key paint.coat; did you mean paint.coats?"),
        (["target=x", "count=many"], "count=many: want a whole number"),
        (["target=x", "ratio=half"], "ratio=half: want a number"),
        (["target=x", "paint.colour=green"], "paint.colour=green: want one of red, blue"),
        (["target=x", "paint.coats=0"], "paint.coats=0: want at least 1"),
        ([], "target: no value given; want target=... (What to echo.)"),
        (["clip.mp4"], "clip.mp4: want key=value, such as target=..."),
        (["--prompt", "hi"], "unknown option --prompt: settings are written key=value, such as prompt=..."),
        (["--num-frm=8"], "unknown option --num-frm: settings are written key=value, such as num_frm=8"),
    ],
)
def test_a_mistake_gets_one_line(capsys, arguments, wanted):
    assert refused(capsys, *arguments) == wanted


@pytest.mark.parametrize("argument", ["zebra=1", "paint=thin", "count=[1", "count=1,2", "=x", "~target", "+count=3"])
def test_other_mistakes_name_what_was_typed(capsys, argument):
    line = refused(capsys, "target=x", argument)
    assert argument.strip("+~").partition("=")[0] in line
    assert "Traceback" not in line


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    echo("target=x")
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


def test_arguments_of_the_process_are_restored():
    before = list(sys.argv)
    echo("target=x")
    assert sys.argv == before


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("AURORA_DEBUG", "1")
    with pytest.raises(SystemExit) as left:
        echo("target=x", "paint.coats=0")
    assert left.value.code == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_one_line_and_130(capsys):
    with pytest.raises(SystemExit) as left, cli.one_line_errors():
        raise KeyboardInterrupt
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_is_not_a_users_error():
    with pytest.raises(KeyError), cli.one_line_errors():
        raise KeyError("ours")


def test_operating_system_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "gone").read_bytes()
    assert describe_error(caught.value) == f"{tmp_path / 'gone'}: no such file or directory"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_overview_lists_every_verb(capsys, arguments):
    cli.main(arguments)
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_has_a_script(verb):
    source = (Path(__file__).parents[1] / "scripts" / f"{verb}.py").read_text()
    assert f'main(["{verb}", *sys.argv[1:]])' in source or f"from {cli.VERBS[verb][0]} import main" in source


def test_unknown_verb(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["captoin"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown verb captoin; want one of: caption")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_explains_each_setting(capsys, verb):
    wanted = {
        "caption": ("  visual_input=(required)", "  merge.schedule=constant"),
        "train": ("  stages.*.num_steps=...",),
    }
    cli.main([verb, "--help"])
    printed = capsys.readouterr().out
    assert all(line in printed for line in wanted.get(verb, ()))
    after_setting = [
        meaning for line, meaning in itertools.pairwise(printed.splitlines()) if line[:3].strip() and line[0] == " "
    ]
    assert len(after_setting) > 3
    assert all(meaning.strip() for meaning in after_setting)


def test_a_key_below_one_that_is_null_gets_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "experiment=finetune", "data.path=x.jsonl", "stages.finetune.lora.rank=3"])
    assert stop.value.code == 2
    wanted = "error: stages.finetune.lora.rank=3: a key above is null; want it whole, such as group={key: value}\n"
    assert capsys.readouterr().err == wanted


def test_a_number_where_a_list_is_wanted_gets_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["visualize", "visual_input=x.png", "token_kept_ratio=0.2"])
    assert stop.value.code == 2
    wanted = "error: token_kept_ratio=0.2: want a list in brackets, such as [1,2], each item a number\n"
    assert capsys.readouterr().err == wanted
