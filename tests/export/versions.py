"""Versions of packages that are not installed here: pip fills a folder with each once, and Python finds it there."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

OFFLINE = "TESTS_OFFLINE"  # set where there is no package index
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ponder-scale-tests"


def pip(*arguments: str) -> str:
    """What pip printed. Where it fails the test fails: it is left out only where TESTS_OFFLINE is set."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    failed = f"pip {' '.join(arguments)}: {(done.stderr.strip().splitlines() or [''])[-1]}"
    if done.returncode and os.environ.get(OFFLINE):
        pytest.skip(f"{OFFLINE} is set; {failed}")
    assert done.returncode == 0, f"{failed}; without a package index: {OFFLINE}=1 leaves these tests out"
    return done.stdout


@cache
def newest() -> str:
    """The newest release of transformers that the package index has today."""
    found = re.search(r"transformers \((\S+)\)", pip("index", "versions", "transformers"))
    assert found is not None
    return found[1]


def install(target: Path, *arguments: str) -> None:
    """Let pip fill a folder of CACHE, unless it is full; processes that test at the same time wait for each other."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "done").is_file():
            pip("install", "--quiet", "--no-compile", f"--target={target}", *arguments)
            (target / "done").touch()


def environment(version: str, requirements: tuple[str, ...]) -> dict[str, str]:
    """Variables under which Python finds this version of transformers; installed once, and kept."""
    number = newest() if version == "newest" else version
    target = CACHE / f"transformers-{number}"
    if version != "installed":
        # a release that is new to us brings what it needs, the others are known to do with what is here
        options = ["--no-deps"] if version != "newest" else []
        install(target, *options, f"transformers=={number}", *requirements)
    # reading datasets without torch switches it off for this process; older transformers would obey that
    dropped = ("PYTHONPATH", "USE_TORCH", "USE_TF", "USE_JAX")
    variables = {key: value for key, value in os.environ.items() if key not in dropped}
    return variables if version == "installed" else {**variables, "PYTHONPATH": str(target)}
