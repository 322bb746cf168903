"""The one place that deletes. It deletes what this program has made, name by name, and never a whole tree.

A folder counts as ours only if our own files in it say so. An unfinished folder holds `MARK`. `ours` is a function that
says of a path in the folder whether this program made it. Paths of folders end with a slash. Any other path stops the
work with an error that names it, before anything is touched. Links are never followed.

A read-only folder does not stop a deletion, just as it does not stop a copy (see write.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ponder_scale.errors import ConfigError

Ours = Callable[[str], bool]

MARK = ".unfinished-ponder-scale"
_SAYS = "This folder is not finished. The command that makes it may delete it. Put none of your files here.\n"
_NAMES_SHOWN = 3
_TRIES = 4  # processes that are just ending may add files while a folder is emptied
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # for file systems mounted without locks


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is empty or is marked as one that may be deleted."""
    return (folder / MARK).is_file() or not any(folder.iterdir())


def mark(folder: Path) -> None:
    """Mark a folder as one that may be deleted."""
    (folder / MARK).write_text(_SAYS, encoding="utf-8")


def check_ours(folder: Path, ours: Ours, proven: Callable[[Path], bool] = is_unfinished) -> None:
    """Raise ConfigError, with the name, for a folder that is not `proven` to be ours or that holds anything else."""
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder that this program has made; move it, or choose another name")
    known = proven(folder)
    strange = [name for name in _inside(folder) if not (known and ours(name))]
    if strange:
        raise ConfigError(
            f"{folder} holds {_listed(strange)}, which this program has not made; nothing was deleted; move your files "
            f"away, or choose another name"
        )


@contextmanager
def held(folder: Path, ours: Ours, proven: Callable[[Path], bool] = is_unfinished) -> Iterator[None]:
    """Reserve an unfinished folder for this process, with what an earlier process that was killed has left in it.

    Creates the folder if needed. When the block ends, a folder that is empty but for its mark is deleted.
    Raises ConfigError, before anything is touched, if the folder is not ours or another process of this machine has it.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        check_ours(folder, ours, proven)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder)
        check_ours(folder, ours, proven)
        mark(folder)
        try:
            yield
        finally:
            if folder.is_dir() and {path.name for path in folder.iterdir()} <= {MARK}:
                delete_file(folder / MARK)
                delete_if_empty(folder)
    finally:
        os.close(lock)


def delete_contents(folder: Path, ours: Ours, first: Collection[str] = (), keep: Collection[str] = ()) -> None:
    """Delete the contents of a folder except the files in `keep`. The files in `first` go before all others.

    Raises ConfigError, before anything is deleted, if something in it is not ours. Raises OSError if it cannot be
    deleted.
    """
    for attempt in range(_TRIES):
        names = [name for name in _inside(folder, folders=True) if not any(one.startswith(name) for one in keep)]
        if strange := [name for name in _inside(folder) if not ours(name)]:
            raise ConfigError(
                f"{folder} holds {_listed(strange)}, which this program has not made; nothing was deleted; move your "
                f"files away"
            )
        try:
            for name in first:
                delete_file(folder / name)
            for name in reversed(names):  # a folder is listed before its contents
                with suppress(FileNotFoundError):
                    (folder / name).rmdir() if name.endswith("/") else (folder / name).unlink()
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EACCES) or attempt == _TRIES - 1:
                raise
            if error.errno == errno.EACCES:
                _open([folder, *(folder / name for name in names if name.endswith("/"))])


def _open(folders: Sequence[Path]) -> None:
    """Let the owner delete in folders that are read-only. Older versions copied read-only folders with their mode."""
    for folder in folders:
        with suppress(OSError):
            folder.chmod(folder.stat().st_mode | stat.S_IRWXU)


def delete_made(folder: Path, ours: Ours, last: str = MARK) -> None:
    """Delete a folder and its contents. The file `last` goes after all others, because it proves that the folder is
    ours.

    Raises the errors of `delete_contents`.
    """
    delete_contents(folder, ours, keep=[last])
    delete_file(folder / last)
    folder.rmdir()


def delete_file(path: Path) -> None:
    """Delete a file that this program has made, if it exists."""
    path.unlink(missing_ok=True)


def delete_if_empty(folder: Path) -> None:
    """Delete a folder if it exists and is empty."""
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def shown(name: str) -> str:
    """A file name as text that you can print and store. Bytes that are not UTF-8 appear as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _lock(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == folder.stat().st_ino:
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        raise
    raise ConfigError(f"another build is writing {folder}; wait for it or choose another name")


def _inside(folder: Path, folders: bool = False, prefix: str = "") -> Iterator[str]:
    """Yield all paths in a folder, except folders that hold something. With `folders`, yield those too, before their
    contents.
    """
    try:
        entries = sorted(os.scandir(folder / prefix), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            yield prefix + entry.name
            continue
        name = f"{prefix}{entry.name}/"
        within = list(_inside(folder, folders, name))
        if folders or not within:
            yield name
        yield from within


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(map(shown, names[:_NAMES_SHOWN])) + (f" and {more:,} more" if more > 0 else "")
