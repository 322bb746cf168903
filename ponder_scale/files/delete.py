"""The one place that deletes: what this program has made, name by name, and never a whole tree.

A folder is ours by what our own files in it say: one that is not finished holds `MARK`. Everything in it has to be
named by `ours`, a function of a path in the folder, of folders with a slash at their end; anything else stops the work
with its name, before anything is touched. Links are never followed.

Deletions do not depend on modes, as copies do not: see write.py.
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
_SAYS = "This folder is not finished. The command that makes it may delete it. Put nothing of yours here.\n"
_NAMES_SHOWN = 3
_TRIES = 4  # files of processes that are just ending may appear while a folder is emptied
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of file systems that are mounted without them


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is empty, or says that it may be deleted."""
    return (folder / MARK).is_file() or not any(folder.iterdir())


def mark(folder: Path) -> None:
    """Say in a folder that it may be deleted."""
    (folder / MARK).write_text(_SAYS, encoding="utf-8")


def check_ours(folder: Path, ours: Ours, proven: Callable[[Path], bool] = is_unfinished) -> None:
    """Raises ConfigError, with the name, for a folder that is not `proven` to be ours or holds anything else."""
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{folder} is no folder that this program has made; move it, or choose another name")
    known = proven(folder)
    strange = [name for name in _inside(folder) if not (known and ours(name))]
    if strange:
        raise ConfigError(
            f"{folder} holds {_listed(strange)}, which this program has not made; move what is yours, or choose "
            f"another name; nothing was deleted"
        )


@contextmanager
def held(folder: Path, ours: Ours, proven: Callable[[Path], bool] = is_unfinished) -> Iterator[None]:
    """Have an unfinished folder for this process alone, with what an earlier, killed one has left in it.

    It is made if there is none, and goes away with the block if nothing is in it then. Raises ConfigError, before
    anything is touched, where it is not ours, and while another process of this machine has it.
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
    """Delete what is in a folder, the files `first` before all others, and all but the files `keep`.

    Raises ConfigError, before anything is deleted, when something in it is not ours; OSError when it cannot be deleted.
    """
    for attempt in range(_TRIES):
        names = [name for name in _inside(folder, folders=True) if not any(one.startswith(name) for one in keep)]
        if strange := [name for name in _inside(folder) if not ours(name)]:
            raise ConfigError(
                f"{folder} holds {_listed(strange)}, which this program has not made; move what is yours away; "
                f"nothing was deleted"
            )
        try:
            for name in first:
                delete_file(folder / name)
            for name in reversed(names):  # a folder comes before what is in it
                with suppress(FileNotFoundError):
                    (folder / name).rmdir() if name.endswith("/") else (folder / name).unlink()
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EACCES) or attempt == _TRIES - 1:
                raise
            if error.errno == errno.EACCES:
                _open([folder, *(folder / name for name in names if name.endswith("/"))])


def _open(folders: Sequence[Path]) -> None:
    """Let their owner delete in folders that were made read-only, as copies of read-only folders once were."""
    for folder in folders:
        with suppress(OSError):
            folder.chmod(folder.stat().st_mode | stat.S_IRWXU)


def delete_made(folder: Path, ours: Ours, last: str = MARK) -> None:
    """Delete a folder and what is in it, the file `last`, which proves that it is ours, after all others.

    Raises as `delete_contents`.
    """
    delete_contents(folder, ours, keep=[last])
    delete_file(folder / last)
    folder.rmdir()


def delete_file(path: Path) -> None:
    """Delete a file that this program has made, if it is there."""
    path.unlink(missing_ok=True)


def delete_if_empty(folder: Path) -> None:
    """Delete a folder if it is there and nothing is in it."""
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def shown(name: str) -> str:
    """A file name as text that can be printed and stored: bytes that are no UTF-8 as \\xff."""
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
    """What is in a folder: everything but folders that hold something, or those too, before what is in them."""
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
