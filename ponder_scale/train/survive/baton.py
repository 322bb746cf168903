"""The lock under which torch compiles an extension, such as DeepSpeed's CPU Adam: one whose owner is gone is removed.

torch's own is a file named `lock` that its owner keeps open. A process that is killed while it compiles leaves the
file, and every later start would wait for it for ever. The owner is gone

    if it was this module, which holds flock(2) on the file and notes the machine in it: when nobody holds that
    if it was torch's own: when no process of this machine has the file open or works in its folder, and no other
        machine or container can have made it
    in either case, if that cannot be known from here: when nothing in the folder has changed for QUIET_SECONDS

Until then the wait says for which lock, and how old it is; a signal ends it.
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
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay")  # that one machine writes to
ALL_PROCESSES = "pid:[4026531836]"  # the namespace in which those of all containers are seen, PROC_PID_INIT_INO


def install() -> None:
    """Let torch use `Baton`."""
    cpp_extension.FileBaton = Baton  # type: ignore[misc]


class Baton(FileBaton):
    """In place of torch's. `try_acquire` waits until it has the lock: what another has built is then found built."""

    def try_acquire(self) -> bool:
        """True.

        Raises:
            SignalledError: a signal came while the lock was not in the hands of this run.
        """
        path, tell_at = Path(self.lock_file_path), time.monotonic() + FIRST_TELL_SECONDS
        while True:
            with suppress(FileExistsError):
                self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
                with suppress(OSError):  # a file system without locks: then it is as torch's
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
            # this run's own compilation ends soon, after which all ranks honour the signal together
            if (received.again or received.interrupt) and _note(path)[1:] != [_run()]:
                raise SignalledError(f"a signal came while {_waiting(path)}", interrupted=received.interrupt)
            time.sleep(LOOK_SECONDS)

    def release(self) -> None:
        """Remove the lock, and only then stop holding it."""
        Path(self.lock_file_path).unlink(missing_ok=True)
        os.close(self._descriptor)


def _waiting(path: Path) -> str:
    try:
        age = duration(time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        age = "0s"
    return (
        f"waiting for the lock {path}, {age} old: another process compiles {path.parent.name} there, or was killed "
        "while it did; if none does, remove that file"
    )


def _is_gone(path: Path) -> bool:
    """Whether the owner of a lock is gone for sure."""
    try:
        note, owner = _note(path), path.stat().st_uid
        quiet = time.time() - max(file.stat().st_mtime for file in (path, *path.parent.iterdir())) > QUIET_SECONDS
        local = _file_system(path.parent) in LOCAL
        if note and note[0] == _machine():
            return _is_free(path)
        if note:  # of another machine, or from before this one was started
            return local or quiet
        seen = local and os.geteuid() in (0, owner) and Path("/proc/self/ns/pid").readlink() == Path(ALL_PROCESSES)
        return (seen or quiet) and not _is_used(path)
    except OSError:  # it has just been removed; or there is no /proc
        return False


def _remove(path: Path) -> None:
    """Remove the lock of an owner that is gone, unless it is another one by now."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        before = path.stat()
        time.sleep(SETTLED_SECONDS)
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)  # several ranks may be here
        after = path.stat()
        if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns) and _is_gone(path):
            path.unlink()
            age = duration(time.time() - after.st_mtime)
            logger.warning("removed the lock %s, %s old: whoever compiled there was killed", path, age)
    except FileNotFoundError:
        pass
    finally:
        os.close(folder)


def _note(path: Path) -> list[str]:
    """What the owner has written: its machine and its run; empty where torch's own has made the lock."""
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
    """Whether a process that can be seen has the file open, or has its folder as its own, as compilers have."""
    lock, folder = path.stat(), path.parent.stat()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or one that has ended
            if os.path.samestat((process / "cwd").stat(), folder):
                return True
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.path.samestat(link.stat(), lock):
                        return True
    return False


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, as the kernel calls it."""
    found, kind = Path("/"), ""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        place = Path(words[1].replace("\\040", " "))
        if folder.resolve().is_relative_to(place) and len(place.parts) >= len(found.parts):
            found, kind = place, words[2]
    return kind
