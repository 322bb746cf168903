"""Check that a place can be written before any work is done."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ponder_scale.errors import ConfigError


def check_folder(folder: Path, key: str) -> None:
    """Raise ConfigError unless `folder` can be written, or created together with its parents.

    It creates and removes a folder in the nearest parent that exists. Permissions alone do not reveal read-only file
    systems, quotas, or /proc. `key` is for the message.
    """
    said = f"{key} is {folder}"
    place = folder.absolute()
    try:
        while not _is_there(place):
            place = place.parent
        if place.is_symlink() and not place.exists():
            raise ConfigError(
                f"{said}: {place} is a link to {place.readlink()}, which does not exist; create it, or remove the link"
            )
        if not place.is_dir():
            what = "which is a file" if place == folder.absolute() else f"but {place} is a file"
            raise ConfigError(f"{said}, {what}; choose another folder")
        os.rmdir(tempfile.mkdtemp(prefix=".tried-", dir=place))  # noqa: PTH106
    except OSError as error:
        raise ConfigError(f"{said}: nothing can be written in {place}: {error.strerror}; choose another") from error


def _is_there(place: Path) -> bool:
    """Whether something exists at a place, including a broken link. Raises OSError if no such name is possible."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    return True


def check_file(file: Path, key: str) -> None:
    """Raise ConfigError unless `file` can be written. Its folder must exist. `key` is for the message."""
    try:
        if file.is_dir():
            raise ConfigError(f"{key} is {file}, which is a folder; expected a file")
        if not file.parent.is_dir():
            raise ConfigError(f"{key} is {file}: there is no folder {file.parent}; make it, or choose another")
        if file.exists() and not os.access(file, os.W_OK):
            raise ConfigError(f"{key} is {file}, which may not be written; choose another")
    except OSError as error:
        raise ConfigError(f"{key} is {file}: it cannot be checked: {error.strerror}; choose another") from error
    if not file.exists():
        check_folder(file.parent, key)
