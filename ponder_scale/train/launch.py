"""Start the ranks of one machine: what `ponder-scale train --nproc N` does. Under Slurm or torchrun it is not used."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ponder_scale.config import RunConfig
from ponder_scale.errors import AGAIN, INTERRUPTED, UserError
from ponder_scale.settings import to_yaml
from ponder_scale.train.survive import signals

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # that every launcher sets
GRACE_SECONDS = 30.0  # for the other ranks to end after one has failed
ORDERLY = (0, AGAIN, INTERRUPTED)  # all ranks have agreed to end
SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)


def free_port() -> str:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def default_processes() -> int:
    """One rank a GPU; one rank where there is none."""
    import torch  # slow to import, and not needed when the user says how many

    return max(1, torch.cuda.device_count())


def train_run(config: RunConfig, processes: int | None = None) -> None:
    """Train a run, or go on with it, in processes of its own on this machine: what `ponder-scale train` does.

    What the ranks print goes where this process prints.

    Args:
        processes: ranks; default: one a GPU, or one.

    Raises:
        UserError: it did not end trained. Its message has the exit code; what is wrong has been printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(to_yaml(config), encoding="utf-8")
        number = [] if processes is None else ["--nproc", str(processes)]
        code = subprocess.run([sys.executable, "-m", "ponder_scale.cli", "train", str(recipe), *number]).returncode
    if code:
        meaning = {AGAIN: "; it has saved, and goes on when it is trained again"}.get(code, "; see what it printed")
        raise UserError(f"run {config.run_dir}: training ended with exit code {code}{meaning}")


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `ponder-scale ARGUMENTS` as `processes` ranks and return the exit code.

    That is the code of the first rank that fails, as a shell gives it (128 + n for one that signal n killed); the
    other ranks are then ended, with SIGTERM and later SIGKILL. If none fails, it is what they agreed on.
    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on to every rank.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.CAUGHT)  # ranks inherit it, until their handlers are there
    if signals.received.again or signals.received.interrupt:
        return AGAIN if signals.received.again else INTERRUPTED
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
    }
    command = [sys.executable, "-m", "ponder_scale.cli", *arguments]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # else a terminal's Ctrl-C reaches them twice, once through us
            preexec_fn=_end_with_parent,
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, _: Any) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in signals.CAUGHT:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.CAUGHT)
    failed = _wait(ranks)
    if failed:
        _end(ranks)
    code = failed or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - code if code < 0 else code


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The code of the first rank that fails; 0 once all have ended in order."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((code for code in codes if code is not None and code not in ORDERLY), 0)
        if failed or None not in codes:
            return failed
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


def _end_with_parent() -> None:
    """In a rank before it runs: a launcher that is killed must not leave ranks behind. Linux has a call for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
