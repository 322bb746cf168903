"""Locks of compilations that were killed: removed where nobody can hold them any more, and named where somebody may."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from ponder_scale.errors import AGAIN, SignalledError
from ponder_scale.train.survive import baton, signals
from ponder_scale.train.survive.baton import Baton
from tests.faults import Fault
from tests.train.survive.commands import ENDLESS, Command

pytestmark = pytest.mark.faults


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    return folder / "lock"


def hold(kind: type[FileBaton], path: Path) -> int:
    """The number of a process that has taken a lock and compiles for ever."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            kind(str(path)).try_acquire()
            os.write(tell, b".")
            time.sleep(3600)
        finally:
            os._exit(1)
    assert os.read(told, 1) == b"."
    return child


def waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of a lock that somebody may hold, to one whom a signal reaches."""
    with monkeypatch.context() as patch:
        patch.setattr(signals, "received", signals.Received(again=True))
        with pytest.raises(SignalledError) as raised:
            Baton(str(path)).try_acquire()
    assert raised.value.exit_code == AGAIN
    return str(raised.value)


@pytest.mark.parametrize("kind", [FileBaton, Baton])
def test_a_lock_is_kept_while_its_owner_lives_and_removed_once_it_is_killed(
    kind: type[FileBaton], lock: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    owner = hold(kind, lock)
    monkeypatch.setenv("MASTER_PORT", "2")  # of another run
    assert re.search(
        rf"a signal came while waiting for the lock {lock}, \d+s old: another process", waits(lock, monkeypatch)
    )
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    own = Baton(str(lock))
    assert own.try_acquire()
    own.release()
    assert not lock.exists()
    name = "torch's" if kind is FileBaton else "our"
    fault(f"SIGKILL of {name} compilation", "start-up", detected="nobody holds its lock", after="removed", lost="-")


def test_ranks_wait_for_each_other_and_find_what_the_first_has_built(lock: Path) -> None:
    first, done = Baton(str(lock)), threading.Event()
    assert first.try_acquire()

    def second() -> None:
        other = Baton(str(lock))
        other.try_acquire()
        other.release()
        done.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    assert not done.wait(3 * baton.LOOK_SECONDS)
    first.release()
    assert done.wait(60)
    waiting.join()


def test_a_compiler_that_outlived_its_owner_keeps_the_lock(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    compiler = subprocess.Popen(["sleep", "3600"], cwd=lock.parent)
    assert "another process compiles" in waits(lock, monkeypatch)
    compiler.kill()
    compiler.wait()
    assert Baton(str(lock)).try_acquire()


@pytest.mark.parametrize("note", ["", "another-machine 10.0.0.1:29500\n"])
def test_what_another_machine_may_hold_is_removed_only_after_a_long_silence(
    note: str, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.write_text(note)
    (lock.parent / "cpu_adam.o").touch()
    monkeypatch.setattr(baton, "_file_system", lambda _: "nfs4")
    assert "if no such process runs, remove this file" in waits(lock, monkeypatch)
    for path in (lock, lock.parent / "cpu_adam.o"):
        os.utime(path, (0, time.time() - baton.QUIET_SECONDS - 5))
        if path == lock:
            waits(lock, monkeypatch)  # something in the folder is younger
    assert Baton(str(lock)).try_acquire()


def test_a_signal_ends_a_start_that_waits_for_a_lock_and_the_log_names_it(
    command: Callable[..., Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    with path.open("w"):  # as torch's own owner has it
        os.utime(path, (0, time.time() - 3 * 3600))
        started = command(*ENDLESS, "train.deepspeed=zero3_offload")
        assert started.process.stdout is not None
        said = ""
        while "waiting for the lock" not in said:
            said = started.process.stdout.readline()
            assert said, "it ended"
        assert f"{path}, 3h00m old: another process compiles cpu_adam there" in said
        started.process.send_signal(signal.SIGTERM)
        printed = started.output()
    assert started.process.returncode == AGAIN, printed
    assert "error: a signal came while waiting for the lock" in printed and "Traceback" not in printed
    fault("SIGTERM", "wait for a compilation's lock", detected="at once", after="exit code 85", lost="nothing")
