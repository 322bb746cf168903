"""Copies and deletions that do not depend on the modes of what they find.

What a run reads may be read-only, to its user too: shards of a group, a checkout by an administrator. What it writes is
its own: new files and folders get the modes that new ones get here (umask, setgid of shared folders).
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

_READ, _EXECUTE = 0o444, 0o111


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file; of its modes only whether it can be executed."""
    shutil.copyfile(source, target)
    if source.stat().st_mode & _EXECUTE:
        mode = target.stat().st_mode
        target.chmod(mode | (mode & _READ) >> 2)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder and all in it to a new one, links as what they point to."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        (copy_folder if path.is_dir() else copy_file)(path, target / path.name)


def delete_folder(folder: Path) -> None:
    """Delete a folder and all in it, as far as that can be done; read-only folders of our own are no hindrance."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_dir() and not folder.is_symlink():
        _open(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _open(folder: Path) -> None:
    with suppress(OSError):
        folder.chmod(0o700)
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                _open(Path(entry.path))
