"""What the commands share: a study's config from the command line, and one line for a user's mistake."""

import argparse
import ast
import errno
import importlib.util
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from lab import watch
from lab.errors import UserError, choose, shown
from lab.options import leaves, set_field
from lab.storage import told

EPILOG = """any field of the config can be set: --config.train.steps=50 --config.model.position.unselected=time
a config takes a scale after a colon:  --config=configs/rope_ablation.py:gpu"""


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command: a user's mistake ends it with one line, code 2 where nothing was run; so does a file that cannot
    be read or written, with code 1. What a terminal has no letter for is shown as ?."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        code = main(sys.argv[1:])
        watch.done(code or 0)
        sys.exit(code)
    except UserError as error:
        _end(getattr(error, "exit_code", 2), told(error))
    except BrokenPipeError:  # who read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            _unexpected(error)
            raise
        said = (
            f"the disk is full ({error}); free space"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else f"{error}; mend that"
        )
        _end(1, f"{told(said)} and run the same command again: it goes on")
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT, "interrupted; run the same command again: it goes on")
    except Exception as error:
        _unexpected(error)
        raise


def _unexpected(error: Exception) -> None:
    """Ends one of several processes; returns for a single one."""
    watch.leave(1, watch.line(error), unexpected=True)


def _end(code: int, text: str) -> None:
    watch.leave(code, text)
    print(f"lab: {text}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Of a command: a mistake in its flags is one line, too."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str):
        raise UserError(f"{message}; {' '.join(self.format_usage().split())}")


def parser(description: str, name: str) -> Parser:
    """A parser with --config; further flags are the command's own. name: of its module."""
    made = Parser(prog=f"python -m {name}", description=description, epilog=EPILOG)
    made.add_argument(
        "--config", required=True, metavar="FILE[:SCALE]", help="the study, such as configs/rope_ablation.py"
    )
    return made


def parse(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict, tuple[str, ...]]:
    """The flags, the study's config with its overrides applied, and the names of the overridden fields."""
    overrides, rest = [], []
    for argument in argv:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            raise UserError(f"--config.{name} needs a value: --config.{name}=VALUE")
        overrides.append((name, text))
    flags = parser.parse_args(rest)
    config = load_config(flags.config)
    for name, text in overrides:
        override(config, name, text)
    return flags, config, tuple(name for name, _ in overrides)


def load_config(spec: str) -> ConfigDict:
    """The config of "path.py" or "path.py:scale"."""
    path, _, scale = spec.partition(":")
    if not pathlib.Path(path).is_file():
        here = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
        raise UserError(
            f"--config: there is no file {path!r}" + (f"; choose one of: {', '.join(here)}" if here else "")
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{pathlib.Path(path).stem}", path)
    if module_spec is None:
        raise UserError(f"--config: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        made = module.get_config(scale) if scale else module.get_config()
        if not isinstance(made, ConfigDict):
            raise UserError(
                f"{path}: get_config returns {shown(made)}, which is no ConfigDict; return what base() made"
            )
        return made
    except UserError:
        raise
    except Exception as error:  # a config is a program: it can fail in every way
        raise UserError(_located(path, error)) from error


def _located(path: str, error: Exception) -> str:
    """What went wrong in a config and in which of its lines, without the listing that ml_collections adds."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    inner = error.args[0] if error.args else ""  # ml_collections puts a KeyError inside its AttributeError
    said = str(inner.args[0] if isinstance(inner, KeyError) else inner).splitlines()
    hint = [text for text in said[1:] if text.startswith("Did you mean")]
    text = " ".join([text.partition(" Other fields present")[0] for text in said[:1]] + hint)
    return f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {text}"


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets one field from text, in the type it has."""
    fields = leaves(config)
    choose("a config field", name, fields)
    try:
        value = _convert(text, fields[name])
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        kind = type(fields[name]).__name__
        raise UserError(f"--config.{name}={text!r} is no {kind}; the default is {fields[name]!r}") from None
    set_field(config, name, value)


_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def _convert(text: str, old):
    if isinstance(old, bool):
        return _TRUTH[text.lower()]
    if isinstance(old, int):
        return int(text)
    if isinstance(old, float):
        return float(text)
    if isinstance(old, tuple):
        text = text.strip().removesuffix(",")
        value = tuple(ast.literal_eval(text if text.startswith(("(", "[")) else f"({text},)"))
        if old and not all(isinstance(item, tuple(map(type, old))) for item in value):
            raise ValueError
        return value
    return text
