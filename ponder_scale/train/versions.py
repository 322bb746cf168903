"""Which code computes, for the record in a checkpoint."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from pathlib import Path


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes, for the record in a checkpoint."""
    names = ("ponder-scale", "torch", "deepspeed", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


@functools.cache
def code_commit() -> str | None:
    """The git commit of this code, with -dirty where files were changed; None where it is not a checkout."""
    package = Path(__file__).parents[1]
    kept = package.parents[1] / "commit.txt"  # beside the copy of the code that `ponder-scale submit` makes
    if package.parent.name == "code" and kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    # a package installed into a folder of another project's checkout is not among that project's files
    tracked = ["ls-files", "--error-unmatch", "cli.py"]
    for command in (tracked, ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]):
        try:
            done = subprocess.run(["git", *command], cwd=package, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
    return done.stdout.strip()
