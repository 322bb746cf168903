"""Decide which process owns a run. Each start is an attempt with a number, and the highest number owns the run.

RUN/attempt holds the number of the owner, and RUN/attempts.jsonl has a line for each start. An older process may still
write, because its node was cut off or because it was started by mistake. It finds a higher number there and must stop.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ponder_scale.errors import CheckpointError, FencedError
from ponder_scale.files.write import sync, write_whole

OWNER, RECORD = "attempt", "attempts.jsonl"


def owner(run_dir: Path) -> int:
    """The number of the attempt that owns the run, or 0 before the first attempt."""
    try:
        return int((run_dir / OWNER).read_text())
    except FileNotFoundError:
        return 0
    except ValueError as error:
        raise CheckpointError(
            f"{run_dir / OWNER}: expected the number of an attempt; write the last number of {RECORD} into it"
        ) from error


def claim(run_dir: Path, **facts: Any) -> int:
    """Take the run over and return this attempt's number, from 1. `facts` go into its line of attempts.jsonl."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with _locked(run_dir / f".{OWNER}.lock"):
        number = owner(run_dir) + 1
        write_whole(run_dir / OWNER, f"{number}\n")
        line = {"attempt": number, "time": time.time(), "job_id": os.environ.get("SLURM_JOB_ID"), **facts}
        with (run_dir / RECORD).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            sync(stream)
    return number


class Attempt:
    """The attempt that this process is part of. It owns nothing until `claim` or `join` gives it a number."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.number = 0

    def claim(self, **facts: Any) -> None:
        """Take the run over, like the function `claim`."""
        self.number = claim(self._run_dir, **facts)

    def join(self, number: int) -> None:
        """Become part of the attempt that another process has claimed."""
        self.number = number

    def check_owned(self) -> None:
        """Raise FencedError if another attempt has taken the run over since."""
        if self.number:
            check_owned(self._run_dir, self.number)


def check_owned(run_dir: Path, number: int) -> None:
    """Raise FencedError unless attempt `number` still owns the run."""
    now = owner(run_dir)
    if now != number:
        raise FencedError(
            f"{run_dir}: attempt {now} has taken the run over; this process (attempt {number} on "
            f"{socket.gethostname()}) ends here and writes nothing more"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        with suppress(OSError):  # on file systems without locks, two starts in the same instant are not told apart
            fcntl.lockf(stream, fcntl.LOCK_EX)
        yield
