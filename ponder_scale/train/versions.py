"""Which code computes, for the record in a checkpoint."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess

from ponder_scale.files.shipped import PACKAGE
from ponder_scale.version import __version__


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes, for the record in a checkpoint."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"ponder-scale": __version__, **others}  # of the code that runs, which need not be the one installed


@functools.cache
def code_commit() -> str | None:
    """The git commit of this code, with -dirty where files were changed; None where it is not a checkout."""
    kept = PACKAGE.parent.with_name("commit.txt")  # beside the copy of the code that `ponder-scale submit` makes
    if PACKAGE.parent.name == "code" and kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    # a package installed into a folder of another project's checkout is not among that project's files
    tracked = ["ls-files", "--error-unmatch", "cli.py"]
    for command in (tracked, ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]):
        try:
            done = subprocess.run(["git", *command], cwd=PACKAGE, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
    return done.stdout.strip()
