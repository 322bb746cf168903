"""`ponder-scale train --nproc 2` as a process of its own, which a test sends signals to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ponder_scale.train.survive import signals
from tests.train.runs import overrides

PATIENCE_SECONDS = 120.0


class Command:
    """`ponder-scale train --nproc 2` as a user runs it."""

    def __init__(self, run_dir: Path, shards: Any, *more: str, held_back: bool = False) -> None:
        settings = [setting for setting in overrides(run_dir, shards) if not setting.startswith("run_dir=")]
        recipe = run_dir.with_suffix(".yaml")
        recipe.write_text(f"run_dir: {run_dir}\n")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.metrics = run_dir / "metrics.jsonl"
        self.pids: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ponder_scale.cli", "train", str(recipe), *settings, "--nproc", "2", *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signals.CAUGHT)) if held_back else None,
        )

    def ranks(self) -> list[int]:
        """Process ids of the ranks, once both train."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.metrics.exists() and '"step"' in self.metrics.read_text()):
            assert time.monotonic() < deadline and self.process.poll() is None, self.output()
            time.sleep(0.1)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.pids = [int(child) for child in children]
        return self.pids

    def output(self) -> str:
        """All that was printed, after the end."""
        return self.process.communicate(timeout=PATIENCE_SECONDS)[0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        for rank in filter(alive, self.pids):  # one that is stopped would keep our pipe open for ever
            os.kill(rank, signal.SIGKILL)
        self.process.communicate()


ENDLESS = ["train.steps=1000000", "checkpoint.every_steps=null", "log.every_steps=1"]


def state(pid: int) -> str:
    """As `ps` gives it; "Z" too for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def alive(pid: int) -> bool:
    return state(pid) != "Z"


def has_signal(pid: int, *masks: str) -> bool:
    """Whether SIGUSR1 waits for a process (ShdPnd, SigPnd) or is held back, as while its handler runs (SigBlk)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(re.findall(rf"{mask}:\s*(\w+)", status)[0], 16) >> signal.SIGUSR1 - 1 & 1 for mask in masks)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
