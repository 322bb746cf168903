"""Versions of the code that computes, for the record in a checkpoint."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess

from ponder_scale.files.shipped import PACKAGE
from ponder_scale.version import __version__


@functools.cache
def versions() -> dict[str, str]:
    """The versions of ponder-scale, torch, DeepSpeed and transformers."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"ponder-scale": __version__, **others}  # of the running code, which may not be the installed one


@functools.cache
def code_commit() -> str | None:
    """The git commit of this code, with -dirty if files were changed. None if the code is not in a checkout."""
    kept = PACKAGE.parent.with_name("commit.txt")  # `ponder-scale submit` writes this beside its copy of the code
    if PACKAGE.parent.name == "code" and kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    # If this package is installed into another project's checkout, git does not track it there.
    tracked = ["ls-files", "--error-unmatch", "cli.py"]
    for command in (tracked, ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]):
        try:
            done = subprocess.run(["git", *command], cwd=PACKAGE, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
    return done.stdout.strip()
