"""Command-line parts that both programs share: one-line errors, types of flags, and output that survives `| head`."""

from __future__ import annotations

import argparse
import difflib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ponder_scale.errors import ConfigError, UserError
from ponder_scale.figures import bound
from ponder_scale.files.places import check_file, check_folder
from ponder_scale.settings import expand_path, meant

COMMANDS = ("COMMAND", "WHAT")  # names for a choice of subcommands


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError with one line and suggests a correction for a typo."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every mistake. Its own version prints the usage over several lines and exits."""
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", " ".join(message.split()))
        message = re.sub(rf"^({'|'.join(COMMANDS)}) is (.*?); ", r"no command \2; ", message)
        raise ConfigError(f"{message}; see {self.prog} --help" if "did you mean" not in message else message)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Like argparse. The returned options also hold `parser`, the parser of the chosen command."""
        options, rest = super().parse_known_args(args, namespace)
        if not hasattr(options, "parser"):
            options.parser = self
        return options, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if action.choices is None or value in action.choices:
            return
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        wanted = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}"
        raise argparse.ArgumentError(action, f"is {value}; {wanted}")


def parse(parser: Parser, arguments: Sequence[str], schema: type, settings: str) -> argparse.Namespace:
    """Parse a command line in which `key=value` may stand before and after flags. argparse alone refuses that.

    Args:
        schema: the dataclass that has the keys.
        settings: the option that collects the `key=value` arguments.

    Raises:
        ConfigError: a flag or a command is unknown. The message names the nearest one.
    """
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if not word.startswith("-"):
            continue
        name, equals, value = word.partition("=")
        flags = [flag for action in options.parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
        key = meant(schema, name.lstrip("-")) if hasattr(options, settings) else ""
        if near:
            raise ConfigError(f"no flag {name}; did you mean {near[0]}?")
        if key:
            after = arguments[arguments.index(word) + 1 :]
            value = value if equals else next(iter(after), "VALUE")
            raise ConfigError(f"no flag {name}: settings are given as key=value; did you mean {key}={value}?")
        options.parser.error(f"no flag {name}")
    if rest and not hasattr(options, settings):
        options.parser.error(f"too many words: {' '.join(rest)}")
    if rest:
        setattr(options, settings, [*getattr(options, settings), *rest])
    return options


def flags(options: argparse.Namespace) -> dict[str, Any]:
    """The parsed options as keyword arguments for the function that runs the command."""
    return {name: value for name, value in vars(options).items() if name not in ("parser", "run")}


def whole(least: int) -> Callable[[str], int]:
    """A flag type: a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; expected a whole number") from None
        if not least <= value < 2**53:
            raise argparse.ArgumentTypeError(f"is {text}; expected at least {least}")
        return value

    return read


def wholes(least: int) -> Callable[[str], list[int]]:
    """A flag type: whole numbers of at least `least`, separated by commas."""
    read = whole(least)
    return lambda text: [read(part) for part in text.split(",")]


def number(*, above: float | None = None, least: float | None = None, most: float = 1e15) -> Callable[[str], float]:
    """A flag type: a finite number within bounds."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; expected a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"is {value}; expected a finite number")
        if value > most:
            raise argparse.ArgumentTypeError(f"is {value}; expected at most {bound(most)}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"is {value}; expected more than {bound(above)}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"is {value}; expected at least {bound(least)}")
        return value

    return read


def path(text: str) -> Path:
    """A flag type: a path, with ~ and $NAMES expanded."""
    return _checked(text, lambda path: None)


def new_file(text: str) -> Path:
    """A flag type: a file to write. Fails before any work is done if the file cannot be written."""
    return _checked(text, lambda path: check_file(path, ""))


def new_folder(text: str) -> Path:
    """A flag type: a folder to create or write into."""
    return _checked(text, lambda path: check_folder(path, ""))


def outlive_readers() -> None:
    """Keep the command running after the reader of its output has left, as in `status | head`."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if type(stream) is io.TextIOWrapper:
            setattr(sys, name, _Outliving(stream))


class _Outliving:
    """A text stream that switches to the null device when its reader has left."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._turn()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._turn()

    def _turn(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        self._stream.flush()  # drop what is still buffered


def _checked(text: str, check: Callable[[Path], None]) -> Path:
    try:
        found = Path(expand_path(text, ""))
        check(found)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error  # argparse puts the flag before it
    return found
