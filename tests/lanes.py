"""Which tests are for every change: those that start no process. Found from what a test calls, so none is listed.

And in which order the files are tested, so that no worker is left alone with a long one at the end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

FOLDERS = ("benchmarks", "slurm")  # whose subject is processes of others and their time
# what starts a process: of our helpers, of the project and of the standard library
WORKERS = r"\bworkers=[2-9]"  # of a build of data
WORKERS_OF_A_CASE = r"\bworkers=$"  # behind which stands a parameter of the test
SECONDS = {"slow": 20.0, "processes": 4.0}  # of a processor, about; a test with neither mark takes a tenth
STARTERS = {"run_ranks", "run_command", "run_script", "subprocess", "multiprocessing", "fork", "system"}
STARTERS |= {"calibrate", "train_run", "verify_in_fresh_process"}


def starts_processes(test: pytest.Function) -> bool:
    """Whether the test, a fixture that it asks for, or a helper in `tests` that these use starts a process."""
    if test.path.parent.name in FOLDERS:
        return True
    fixtures = (define.func for defines in test._fixtureinfo.name2fixturedefs.values() for define in defines)
    alone = getattr(test, "callspec", None) and test.callspec.params.get("workers") == 1
    return any(starts(function, bool(alone)) for function in (test.function, *fixtures))


def put_long_files_first(items: list[pytest.Item]) -> None:
    """Order the tests by what all those of their file take, by their marks; the tests of a file stay in its order."""
    seconds: Counter[Path] = Counter()
    for item in items:
        marks = (SECONDS[name] for name in SECONDS if item.get_closest_marker(name))
        seconds[item.path] += max(marks, default=0.1)  # type: ignore[assignment]
    items.sort(key=lambda item: (-seconds[item.path], item.path))


@cache
def starts(called: Callable[..., Any], alone: bool = False) -> bool:
    """Whether a function starts a process, itself or through helpers in `tests` and benchmarks.

    alone: it is called with a parameter `workers` of 1.
    """
    todo, seen = [called], set()
    while todo:
        function = todo.pop()
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, type):
            todo += [value for value in vars(function).values() if isinstance(value, FunctionType)]
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        names, texts = set(_names(function.__code__)), list(_texts(function.__code__))
        if names & STARTERS or any(re.search(WORKERS, text) for text in texts):
            return True
        if not alone and any(re.search(WORKERS_OF_A_CASE, text) for text in texts):
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


def _texts(code: CodeType) -> Iterator[str]:
    """All texts that code holds, with those of its tuples and of the functions inside it."""
    todo: list[Any] = [*code.co_consts]
    while todo:
        held = todo.pop()
        if isinstance(held, str):
            yield held
        elif isinstance(held, tuple):
            todo += held
        elif isinstance(held, CodeType):
            todo += held.co_consts
