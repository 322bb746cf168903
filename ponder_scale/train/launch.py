"""Start the ranks of one machine for `ponder-scale train --nproc N`. Slurm and torchrun start ranks themselves."""

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

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # every launcher sets these
GRACE_SECONDS = 30.0  # after one rank has failed, the others may take this long to end
ORDERLY = (0, AGAIN, INTERRUPTED)  # exit codes of ranks that have agreed to end
SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)


def free_port() -> str:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def default_processes() -> int:
    """One rank for each GPU, or one rank without a GPU."""
    import torch  # slow to import, and not needed if --nproc is given

    return max(1, torch.cuda.device_count())


def train_run(config: RunConfig, processes: int | None = None) -> None:
    """Train a run or resume it, in new processes on this machine, like `ponder-scale train`.

    The ranks print to the output of this process.

    Args:
        processes: number of ranks. The default is one for each GPU, or one without a GPU.

    Raises:
        UserError: the run did not end trained. The message has the exit code. The ranks have printed the cause.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(to_yaml(config), encoding="utf-8")
        number = [] if processes is None else ["--nproc", str(processes)]
        code = subprocess.run([sys.executable, "-m", "ponder_scale.cli", "train", str(recipe), *number]).returncode
    if code:
        meaning = {AGAIN: "; it has saved a checkpoint, and continues when it is trained again"}.get(
            code, "; see what it printed"
        )
        raise UserError(f"run {config.run_dir}: training ended with exit code {code}{meaning}")


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `ponder-scale ARGUMENTS` as `processes` ranks and return the exit code.

    If a rank fails, its exit code is returned, as a shell gives it (128 + n if signal n killed it). The other ranks
    are ended with SIGTERM and later SIGKILL. If no rank fails, the code is the one that the ranks agreed on. SIGINT,
    SIGTERM, SIGUSR1 and SIGUSR2 are passed on to every rank.
    """
    # ranks inherit the block, so no signal can hit them before they have installed their handlers
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.CAUGHT)
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
            start_new_session=True,  # otherwise Ctrl-C reaches them twice: from the terminal and from this process
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
    """Wait for all ranks. Returns the code of the first rank that fails, or 0 once all have ended in order."""
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
    """Runs in a rank before its program. On Linux, it has the kernel end the rank if the launcher is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
