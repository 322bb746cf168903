"""The lock under which torch compiles an extension, such as DeepSpeed's CPU Adam. Locks of dead owners are removed.

torch's own lock is a file named `lock` that its owner keeps open. A process that is killed while it compiles leaves the
file behind, and every later start would wait for it forever. How we know that the owner is gone:

    this module's lock   it holds flock(2) on the file and writes the machine into it, so nobody holds flock any more
    torch's own lock     no process of this machine has the file open or works in its folder, and no other machine or
                         container can have made it
    either               if this cannot be known from here: nothing in the folder has changed for QUIET_SECONDS

Until then, the log names the lock that the start is waiting for, and its age. A signal ends the wait.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from ponder_scale.errors import SignalledError
from ponder_scale.figures import duration
from ponder_scale.train.survive import signals

logger = logging.getLogger(__name__)

LOOK_SECONDS, TELL_SECONDS, FIRST_TELL_SECONDS = 0.5, 30.0, 3.0
SETTLED_SECONDS = 1.0  # torch closes its lock just before it removes it
QUIET_SECONDS = 1800.0  # no file of an extension takes so long to compile
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay")  # only one machine writes to these
ALL_PROCESSES = "pid:[4026531836]"  # PROC_PID_INIT_INO, the namespace that sees the processes of all containers


def install() -> None:
    """Replace torch's lock with `Baton`."""
    cpp_extension.FileBaton = Baton  # type: ignore[misc]


class Baton(FileBaton):
    """Replaces torch's lock. `try_acquire` waits for the lock, so torch then finds what another process has built."""

    def try_acquire(self) -> bool:
        """Wait for the lock, take it and return True.

        Raises:
            SignalledError: a signal came while another run held the lock.
        """
        path, tell_at = Path(self.lock_file_path), time.monotonic() + FIRST_TELL_SECONDS
        while True:
            with suppress(FileExistsError):
                self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
                with suppress(OSError):  # on a file system without flock, this is a lock like torch's own
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                    os.write(self._descriptor, f"{_machine()} {_run()}\n".encode())
                return True
            if _is_gone(path):
                _remove(path)
                continue
            if time.monotonic() >= tell_at and os.environ.get("LOCAL_RANK", "0") == "0":
                tell_at = time.monotonic() + TELL_SECONDS
                logger.warning("%s", _waiting(path))
            received = signals.received
            # If this run itself compiles, that ends soon, and all ranks then honour the signal together.
            if (received.again or received.interrupt) and _note(path)[1:] != [_run()]:
                raise SignalledError(f"a signal came while {_waiting(path)}", interrupted=received.interrupt)
            time.sleep(LOOK_SECONDS)

    def release(self) -> None:
        """Remove the lock before closing it, so that nobody finds a lock file without an owner."""
        Path(self.lock_file_path).unlink(missing_ok=True)
        os.close(self._descriptor)


def _waiting(path: Path) -> str:
    try:
        age = duration(time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        age = "0s"
    return (
        f"waiting for the lock {path}, {age} old: another process compiles {path.parent.name} there, or was killed "
        "while it compiled; if no such process runs, remove this file"
    )


def _is_gone(path: Path) -> bool:
    """Whether the owner of a lock is certainly gone."""
    try:
        note, owner = _note(path), path.stat().st_uid
        quiet = time.time() - max(file.stat().st_mtime for file in (path, *path.parent.iterdir())) > QUIET_SECONDS
        local = _file_system(path.parent) in LOCAL
        if note and note[0] == _machine():
            return _is_free(path)
        if note:  # written by another machine, or before this one was rebooted
            return local or quiet
        seen = local and os.geteuid() in (0, owner) and Path("/proc/self/ns/pid").readlink() == Path(ALL_PROCESSES)
        return (seen or quiet) and not _is_used(path)
    except OSError:  # the lock has just been removed, or there is no /proc
        return False


def _remove(path: Path) -> None:
    """Remove the lock of an owner that is gone, unless another process has made a new lock by now."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        before = path.stat()
        time.sleep(SETTLED_SECONDS)
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)  # several ranks may try to remove it
        after = path.stat()
        if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns) and _is_gone(path):
            path.unlink()
            age = duration(time.time() - after.st_mtime)
            logger.warning("removed the lock %s, %s old, because the process that compiled there was killed", path, age)
    except FileNotFoundError:
        pass
    finally:
        os.close(folder)


def _note(path: Path) -> list[str]:
    """The owner's machine and run, as written in the lock. Empty if torch's own code has made the lock."""
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def _run() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _is_free(path: Path) -> bool:
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _is_used(path: Path) -> bool:
    """Whether a visible process has the file open, or works in its folder as compilers do."""
    lock, folder = path.stat(), path.parent.stat()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process belongs to another user or has ended
            if os.path.samestat((process / "cwd").stat(), folder):
                return True
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.path.samestat(link.stat(), lock):
                        return True
    return False


def _file_system(folder: Path) -> str:
    """The type of the file system of a folder, by the kernel's name."""
    found, kind = Path("/"), ""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        place = Path(words[1].replace("\\040", " "))
        if folder.resolve().is_relative_to(place) and len(place.parts) >= len(found.parts):
            found, kind = place, words[2]
    return kind
