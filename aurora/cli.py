"""The command line: `aurora <verb> key=value ...`, and `run`, which every script's main goes through.

Hydra composes the settings. Around it this file lets free text be typed as it is (Hydra's grammar alone refuses commas,
quotes, brackets and `=`), prints `--help` from the schemas, and turns a user's error into one line and exit code 2.
"""

from __future__ import annotations

import importlib
import inspect
import io
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aurora.config import Setting

# Verb -> the module whose `main` it is, and what it does.
VERBS = {
    "caption": ("aurora.captioning", "describe images and videos: a file, a folder or a glob"),
    "corpus": ("aurora.serving.corpus", "caption a large collection with several workers, or on a Ray cluster"),
    "visualize": (
        "aurora.visualization.visualize",
        "draw, animate or explore which patches merged",
    ),
    "evaluate": ("aurora.evaluation.run", "score a checkpoint on TinyVDC, or on VDC with a judge"),
    "sweep": ("aurora.evaluation.sweep", "compare kept ratios, schedules and other ways of dropping tokens"),
    "train": ("aurora.training.run", "train a model by a recipe, such as experiment=aurora_tiny"),
    "benchmark": ("aurora.benchmark.run", "time kernels, the encoder, decoding or training against their alternatives"),
    "web": ("aurora.serving.web", "open a page that captions images and videos"),
    "serve": ("aurora.serving.api", "answer clients of OpenAI's chat completions over HTTP"),
    "convert": ("aurora.conversion", "write a checkpoint in another layout"),
    "prepare": ("aurora.data.prepare", "check a dataset of conversations and tokenise it for training"),
    "tinyworld": ("aurora.data.tinyworld.command", "render clips of the synthetic world with captions and questions"),
}

# Hydra's own options; those in the second set are followed by a value.
_HYDRA_FLAGS = {
    "--multirun",
    "-m",
    "--resolve",
    "--hydra-help",
    "--version",
    "--run",
    "-r",
    "--shell-completion",
    "-sc",
}
_HYDRA_FLAGS_WITH_VALUE = {
    "--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun",
    "--info", "-i", "--package", "-p",
}  # fmt: skip

# No job folder, no log files, no copies of the configuration: results go where the settings say.
_QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")

_UNKNOWN_KEY = re.compile(
    r"Could not override '(?P<key>[^']+)'"
)  # Hydra offers `+key`, which would walk past the schema
_OVERRIDE = re.compile(r"(?P<mark>\+{0,2})(?P<key>[^=+~][^=]*)=(?P<value>.*)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; the console script `aurora` and every file in scripts/.

    Args:
        argv: The verb and its settings; None takes the process's own arguments.

    Raises:
        SystemExit: 2 for a user's error, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    verb, *rest = arguments
    with one_line_errors():
        if verb in ("--version", "version"):
            from aurora import __version__

            print(__version__)
            return
        if verb not in VERBS:
            raise ValueError(f"unknown verb {verb}; want one of: {', '.join(VERBS)}")
        run(importlib.import_module(VERBS[verb][0]).main, rest)


def run(main: Callable[[], Any], argv: Sequence[str] | None = None) -> None:
    """Call a `@hydra.main` function with settings typed as they are meant.

    Values of keys that the schema types as text (prompts, paths) are quoted for Hydra, so they may hold anything. The
    schema is the one registered as `<config_name>_schema`.

    Args:
        main: A function decorated with `@hydra.main(..., config_path="pkg://aurora.configs", config_name=...)`.
        argv: Overrides; None takes the process's own arguments.

    Raises:
        SystemExit: 2 for a user's error, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name, or a character, that cannot be printed
    with one_line_errors():
        from aurora.config import registered_schema

        config_name = str(inspect.getclosurevars(main).nonlocals["config_name"])
        schema = registered_schema(config_name)
        if schema is not None and any(argument in ("-h", "--help") for argument in arguments):
            print(_help(config_name, schema))
            return
        _compose_and_call(main, _with_quotes(arguments, schema), schema)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print what a user did wrong as one line on stderr and leave with code 2; AURORA_DEBUG=1 shows the traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as error:
        _fail(error)


def quote(text: str) -> str:
    """Write a text so that Hydra and OmegaConf read it as it stands, whatever characters it holds."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # not an interpolation
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), text) + '"'


def _compose_and_call(main: Callable[..., Any], arguments: list[str], schema: type | None) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    failures: list[BaseException] = []

    def keep_failure(raw: DictConfig) -> None:  # Hydra prints a line of its own when a job raises
        try:
            main(raw)
        except (ValueError, OSError, KeyboardInterrupt, OmegaConfBaseException) as error:
            failures.append(error)

    settled = {argument.partition("=")[0] for argument in arguments}
    quiet = [setting for setting in _QUIET if setting.partition("=")[0] not in settled]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving
    before = sys.argv
    sys.argv = [before[0], *arguments, *quiet]
    try:
        if {"-m", "--multirun"} & set(arguments):
            main()
        else:
            where = inspect.getclosurevars(main).nonlocals
            hydra.main(where["config_path"], where["config_name"], version_base="1.3")(keep_failure)()
        if failures:
            raise failures[0]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, arguments, schema)) from error
    except AssertionError as error:
        if "Unexpected type for root: NoneType" not in str(error):  # OmegaConf, of a key below one that is null
            raise
        raise ValueError(
            f"{_below_null(arguments, schema)}: a key above is null; want it whole, such as group={{key: value}}"
        ) from error
    finally:
        sys.argv = before


def _with_quotes(arguments: Iterable[str], schema: type | None) -> list[str]:
    """Check the form of each argument and quote the values of text keys."""
    from aurora.config import settings

    known = {setting.key: setting for setting in settings(schema)} if schema is not None else {}
    prepared: list[str] = []
    is_value = False
    for argument in arguments:
        override = _OVERRIDE.fullmatch(argument)
        if is_value or argument.startswith("~"):
            is_value = False
        elif argument.startswith("-"):
            flag, _, value = argument.partition("=")
            if flag not in _HYDRA_FLAGS | _HYDRA_FLAGS_WITH_VALUE:
                name = flag.lstrip("-").replace("-", "_")
                raise ValueError(
                    f"unknown option {flag}: settings are written key=value, such as {name}={value or '...'}"
                )
            is_value = flag in _HYDRA_FLAGS_WITH_VALUE and not value
        elif override is None:
            raise ValueError(f"{argument}: want key=value" + (f", such as {next(iter(known))}=..." if known else ""))
        elif (setting := known.get(override["key"])) is not None and _is_text(setting, override["value"]):
            argument = f"{override['mark']}{override['key']}={quote(override['value'])}"
        prepared.append(argument)
    return prepared


def _below_null(arguments: Iterable[str], schema: type | None) -> str:
    """Those settings among the arguments whose key is none of the schema's own."""
    from aurora.config import settings

    known = {setting.key for setting in settings(schema)} if schema is not None else set()
    return " ".join(text for text in arguments if "." in (key := text.partition("=")[0]) and key not in known)


def _is_text(setting: Setting, value: str) -> bool:
    """Whether a value of this key is free text; `null` stays null where the key may be empty, as a number may."""
    is_list = typing.get_origin(setting.type) is list
    options = () if is_list else typing.get_args(setting.type) or (setting.type,)
    if int in options and re.fullmatch(r"[+-]?\d+", value):
        return False
    return str in options and not (value == "null" and type(None) in options)


def _explain(error: BaseException, arguments: Iterable[str], schema: type | None) -> str:
    """Say in one line what Hydra or OmegaConf refused."""
    from omegaconf.errors import OmegaConfBaseException, ValidationError

    from aurora.config import settings, unknown_key

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if isinstance(cause, ValidationError) and cause.full_key and schema is not None:
        setting = next((setting for setting in settings(schema) if fnmatchcase(cause.full_key, setting.key)), None)
        typed = next((text for text in arguments if text.lstrip("+").startswith(f"{cause.full_key}=")), cause.full_key)
        if setting is not None:
            return f"{typed.lstrip('+')}: want {_type_name(setting.type)}"
    if schema is not None and (unknown := _UNKNOWN_KEY.match(str(error))):
        return unknown_key(unknown["key"], schema)
    from hydra.errors import OverrideParseException

    if isinstance(error, OverrideParseException):
        return f"{error.override}: want key=value, got a value that Hydra cannot read ({str(error).splitlines()[0]})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("provider=", "See https", "Config search path")))


def _fail(error: Exception) -> NoReturn:
    from aurora.runtime import debug_enabled, describe_error

    if debug_enabled():
        traceback.print_exception(error)
    print(f"error: {describe_error(error)}", file=sys.stderr)
    raise SystemExit(2) from None


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in VERBS.items())
    return f"usage: aurora <verb> key=value ...\n\n{verbs}\n\n`aurora <verb> --help` lists the settings of a verb."


def _help(config_name: str, schema: type) -> str:
    """List every setting with its value and meaning."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from aurora.config import settings

    with initialize_config_module("aurora.configs", version_base="1.3"):
        composed = compose(config_name)
    lines = [f"usage: aurora {config_name} key=value ...", ""]
    if summary := inspect.getdoc(schema):
        lines += [summary, ""]
    lines.append("settings, with their defaults:")
    missing = OmegaConf.missing_keys(composed)
    own_first = sorted(
        settings(schema), key=lambda setting: setting.key.partition(".")[0] not in schema.__annotations__
    )
    for setting in own_first:
        value = OmegaConf.select(composed, setting.key, throw_on_missing=False)
        shown = "(required)" if setting.key in missing else "..." if "*" in setting.key else _shown(value)
        lines += [f"  {setting.key}={shown}", f"      {setting.meaning}"]
    lines += ["", "Text is taken as typed: prompts and paths may hold commas, quotes, brackets and `=`."]
    lines += [f"`aurora {config_name} --cfg job` prints the composed settings; AURORA_DEBUG=1 shows tracebacks."]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """Write a value the way it is typed on the command line."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _type_name(annotation: Any) -> str:
    options = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
    if typing.get_origin(options[0]) is list:
        return "a list in brackets, such as [1,2], each item " + _type_name(typing.get_args(options[0])[0])
    if isinstance(options[0], type) and issubclass(options[0], Enum):
        return "one of " + ", ".join(options[0].__members__)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return " or ".join(names.get(option, str(option)) for option in options)


if __name__ == "__main__":
    main()
