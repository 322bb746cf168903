"""The rules that the tests themselves keep."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.ranks import REPOSITORY

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
