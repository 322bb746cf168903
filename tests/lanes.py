"""Which tests are for every change: those that start no process. Found from what a test calls, so none is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import pytest

FOLDERS = ("benchmarks", "slurm")  # whose subject is processes of others and their time
# what starts a process: of our helpers, of the standard library and of pytest
STARTERS = {"run_ranks", "run_command", "run_script", "subprocess", "multiprocessing", "fork", "system"}


def starts_processes(test: pytest.Function) -> bool:
    """Whether the test, a fixture that it asks for, or a helper in `tests` that these use starts a process."""
    if test.path.parent.name in FOLDERS:
        return True
    fixtures = (define.func for defines in test._fixtureinfo.name2fixturedefs.values() for define in defines)
    return any(starts(function) for function in (test.function, *fixtures))


@cache
def starts(called: Callable[..., Any]) -> bool:
    """Whether a function starts a process, itself or through helpers in `tests` and benchmarks."""
    todo, seen = [called], set()
    while todo:
        function = todo.pop()
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, type):
            todo += [value for value in vars(function).values() if isinstance(value, FunctionType)]
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        names = set(_names(function.__code__))
        if names & STARTERS:
            return True
        used = (function.__globals__.get(name) for name in names)
        todo += [value for value in used if callable(value) and _is_ours(value)]
    return False


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).split(".")[0] in ("tests", "benchmarks")


def _names(code: CodeType) -> Iterator[str]:
    """All names that code uses, with those of the functions inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
