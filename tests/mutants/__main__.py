"""Whether the tests notice a slip: `make mutants`, or `python -m tests.mutants [WORD...]` for those that have a word.

Each mutant of `table.py` is put into a copy of the tree, and the tests that it names run there: they have to fail.
First they run on the copy as it is, and have to pass. A mutant is run in a process that is forked from this one, which
has loaded the large libraries and nothing of the project.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mutants.table import MUTANTS, Mutant

REPOSITORY = Path(__file__).parents[2]
OURS = ("ponder_scale", "data_pipeline", "benchmarks", "tests")
MADE = ("runs", "build", "dist", "wandb", "__pycache__")  # by commands, and large
HEAVY = ("torch", "transformers", "numpy", "pyarrow.parquet", "tokenizers", "xxhash", "yaml", "zstandard")
SECONDS = 120  # that a test may take: a slip may be a loop without an end
PASSED, FAILED = 0, 1  # of pytest.main; anything else is no verdict
ENDS = {PASSED: "SURVIVED", FAILED: "killed"}


def main(words: Sequence[str]) -> int:
    """Run the mutants that have one of the words, or all; 1 where one survives."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in str(mutant) for word in words)]
    for name in HEAVY:
        importlib.import_module(name)
    begin = time.monotonic()
    lanes = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place:
        trees = [copy_of_the_tree(Path(place, str(lane))) for lane in range(lanes)]
        if run(trees[0], sorted({test for mutant in chosen for test in mutant.tests})) != PASSED:
            print("the tests fail without a mutant, so they say nothing of one")
            return 1
        with ThreadPoolExecutor(lanes) as pool:
            shares = [chosen[lane::lanes] for lane in range(lanes)]
            ends = [end for some in pool.map(killed, trees, shares) for end in some]
    print(f"{sum(ends)} of {len(ends)} mutants killed in {time.monotonic() - begin:.0f} s")
    return 0 if all(ends) else 1


def killed(tree: Path, mutants: Sequence[Mutant]) -> list[bool]:
    """Whether the tests that each mutant names fail."""
    ends = []
    for mutant in mutants:
        path = tree / mutant.file
        original = path.read_text()
        path.write_text(mutant.applied_to(original))
        code = run(tree, mutant.tests)
        path.write_text(original)
        print(f"{ENDS.get(code, f'no verdict, pytest ended with {code}')}: {mutant}", flush=True)
        ends.append(code == FAILED)
    return ends


def run(tree: Path, tests: Sequence[str]) -> int:
    """What pytest ends with for these tests of a tree."""
    pid = os.fork()
    if not pid:
        os._exit(_run_here(tree, tests))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run_here(tree: Path, tests: Sequence[str]) -> int:
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path) != REPOSITORY)]
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    said = io.StringIO()
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={SECONDS}", f"--basetemp={tree}/temporary"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = int(pytest.main([*options, *tests]))
    if code not in ENDS:
        print(said.getvalue()[-3000:])
    return code


def copy_of_the_tree(place: Path) -> Path:
    """What the tests need of the repository, without compiled files, which could be taken for a mutant's."""
    place.mkdir()
    for source in REPOSITORY.iterdir():
        if source.is_dir() and source.name not in MADE and not source.name.startswith("."):
            shutil.copytree(source, place / source.name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
        elif source.is_file():
            shutil.copy(source, place)
    return place


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
