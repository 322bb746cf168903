"""The rules that the tests themselves keep."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lanes import put_long_files_first, starts
from tests.mutants.table import MUTANTS, Mutant
from tests.ranks import REPOSITORY, run_ranks

TESTS = REPOSITORY / "tests"


def imported(code: str, package: str) -> Iterator[str]:
    """Each module that the code imports, and each name that it takes from one, in full."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            levels = package.split(".")
            above = levels[: len(levels) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def taken_from_tests(code: str, package: str = "tests.train") -> list[str]:
    """What the code takes from modules that pytest collects, or from a conftest."""
    found = []
    for name in imported(code, package):
        parts = name.split(".")
        if parts[0] == "tests" and any(part.startswith("test_") or part == "conftest" for part in parts[1:]):
            found.append(name)
    return found


def test_what_tests_share_lies_in_helper_modules() -> None:
    """A test file can be renamed, split or deleted without a look at the others."""
    shared = {}
    for path in sorted([*TESTS.rglob("*.py"), *REPOSITORY.joinpath("benchmarks").rglob("*.py")]):
        package = ".".join(path.relative_to(REPOSITORY).parts[:-1])
        if found := taken_from_tests(path.read_text(), package):
            shared[path.relative_to(REPOSITORY).as_posix()] = found
    assert shared == {}, "move what they share to a module that is no test: see tests/train/runs.py"


@pytest.mark.parametrize(
    "code",
    [
        "from tests.train.test_loop import overrides",
        "from tests.train import runs, test_loop",
        "import tests.train.test_loop",
        "from .test_loop import overrides",
        "from . import test_loop",
        "from .zero.test_gate import check",
        "from ..conftest import shards",
        "from tests import conftest",
        "def late():\n    from tests.conftest import shards",
    ],
)
def test_an_import_from_a_test_is_seen_in_whatever_way_it_is_written(code: str) -> None:
    assert taken_from_tests(code)
    assert not taken_from_tests(code.replace("test_loop", "runs").replace("test_gate", "gate").replace("conftest", "x"))


def plain() -> int:
    return len(REPOSITORY.parts)


def with_ranks() -> Any:
    return run_ranks(plain, [None])


def with_a_late_import() -> Any:
    from tests.ranks import run_ranks as start

    return start(plain, [None])


def inside() -> Any:
    return [(lambda: with_ranks()) for _ in range(2)]


class Command:
    def start(self) -> Any:
        return subprocess.Popen(["true"])


def through_a_class() -> Any:
    return Command()


def of_a_module() -> int:
    return os.fork()


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Any:
    return with_ranks if request.node else with_ranks()


@pytest.mark.parametrize("start", [with_ranks, with_a_late_import, inside, through_a_class, of_a_module])
def test_what_starts_processes_is_found_however_it_is_called(start: Any) -> None:
    assert starts(start) and not starts(plain)


def of_one_worker() -> list[str]:
    return ["build", "workers=1"]


def of_two_workers() -> list[str]:
    return [*of_one_worker(), "workers=2"]


def of_its_workers(workers: int) -> list[str]:
    return ["build", f"workers={workers}"]


def test_a_build_by_several_workers_starts_processes() -> None:
    assert starts(of_two_workers) and starts(of_two_workers, alone=True) and not starts(of_one_worker)
    assert starts(of_its_workers) and not starts(of_its_workers, alone=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_case_of_one_worker_is_in_the_fast_lane(request: pytest.FixtureRequest, workers: int) -> None:
    assert of_its_workers(workers)
    assert bool(request.node.get_closest_marker("processes")) == (workers == 2)


def test_a_test_whose_fixture_starts_ranks_is_not_in_the_fast_lane(request: pytest.FixtureRequest, ranks: Any) -> None:
    assert request.node.get_closest_marker("processes")


def test_a_test_that_starts_nothing_is_in_the_fast_lane(request: pytest.FixtureRequest, tiny_shards: Any) -> None:
    assert not request.node.get_closest_marker("processes")


class Collected:
    """What is asked of a test that pytest has collected."""

    def __init__(self, path: str, name: str, *marks: str) -> None:
        self.path, self.name, self.get_closest_marker = Path(path), name, {mark: mark for mark in marks}.get


def test_files_whose_tests_take_long_come_first_and_stay_whole() -> None:
    """A worker that begins a long file when the others have ended keeps them all waiting."""
    items: Any = [Collected("many", str(number)) for number in range(30)]
    items += [Collected("a commands", "one", "processes"), Collected("a compiler", "whole", "processes", "slow")]
    items += [Collected("z commands", name, "processes") for name in ("b", "a")]
    items.insert(7, items.pop())  # as a file that pytest has been given twice
    put_long_files_first(items)
    assert [str(item.path) for item in items if item.path != Path("many")] == [
        *("a compiler", "z commands", "z commands", "a commands")
    ]
    assert [item.name for item in items[:3]] == ["whole", "a", "b"] and items[-1].name == "29"


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_what_a_mutant_changes_stands_in_its_file_once(mutant: Mutant) -> None:
    assert mutant.applied_to((REPOSITORY / mutant.file).read_text()) and mutant.old != mutant.new
    for test in mutant.tests:
        path, _, name = test.partition("[")[0].partition("::")
        assert f"def {name}(" in (REPOSITORY / path).read_text() if name else (REPOSITORY / path).exists(), test
