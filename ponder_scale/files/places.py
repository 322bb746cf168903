"""Where something is written: whether it can be, said before any work is done."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ponder_scale.errors import ConfigError


def check_folder(folder: Path, key: str) -> None:
    """Raise ConfigError unless `folder` can be written, or made with the folders above it.

    It is tried, in the nearest folder that is there: permissions alone do not tell of read-only file systems, of
    quotas, nor of /proc. What is tried leaves nothing behind. `key` is for the message.
    """
    said = f"{key} is {folder}"
    place = folder.absolute()
    try:
        while not _is_there(place):
            place = place.parent
        if place.is_symlink() and not place.exists():
            raise ConfigError(
                f"{said}: {place} is a link to {place.readlink()}, which is not there; make that, or remove the link"
            )
        if not place.is_dir():
            what = "which is a file" if place == folder.absolute() else f"but {place} is a file"
            raise ConfigError(f"{said}, {what}; choose another folder")
        os.rmdir(tempfile.mkdtemp(prefix=".tried-", dir=place))  # noqa: PTH106
    except OSError as error:
        raise ConfigError(f"{said}: nothing can be written in {place}: {error.strerror}; choose another") from error


def _is_there(place: Path) -> bool:
    """Whether something is there, a link without an end included; OSError where no such name can be."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    return True


def check_file(file: Path, key: str) -> None:
    """Raise ConfigError unless `file` can be written; its folder has to be there. `key` is for the message."""
    try:
        if file.is_dir():
            raise ConfigError(f"{key} is {file}, which is a folder; expected a file")
        if not file.parent.is_dir():
            raise ConfigError(f"{key} is {file}: there is no folder {file.parent}; make it, or choose another")
        if file.exists() and not os.access(file, os.W_OK):
            raise ConfigError(f"{key} is {file}, which may not be written; choose another")
    except OSError as error:
        raise ConfigError(f"{key} is {file}: it cannot be looked at: {error.strerror}; choose another") from error
    if not file.exists():
        check_folder(file.parent, key)
