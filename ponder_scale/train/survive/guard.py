"""A process beside a rank that ends it when its interpreter is blocked: guard.py PID SIGNAL.

When native code keeps the interpreter's lock, no thread of the rank can look at a clock. This process can. About every
second, the rank tells it on its standard input how many seconds of silence are allowed. When they are over, it sends
the signal, which makes the rank write its stacks and end.

It counts only seconds in which both processes ran. So a run that was stopped (SIGSTOP, `scontrol suspend`, a paused
container) continues afterwards. It imports only the standard library, so that it starts at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

TICK_SECONDS = 1.0


def guard(pid: int, number: int) -> None:
    """Watch the rank until it has ended or has been sent the signal."""
    idle, allowed = 0.0, float("inf")
    while os.getppid() == pid:
        began = time.monotonic()
        if select.select([0], [], [], TICK_SECONDS)[0]:
            said = os.read(0, 65536)
            if not said:
                return
            idle, allowed = 0.0, float(said.split()[-1])
            time.sleep(TICK_SECONDS / 10)  # do not spin if the rank writes in quick succession
            continue
        # A longer gap means that this process itself was stopped, so it counts as two ticks at most.
        idle += min(time.monotonic() - began, 2 * TICK_SECONDS) if not is_stopped(pid) else 0.0
        if idle > allowed:
            print(f"Timeout ({idle:.0f} s)! The interpreter is blocked:", file=sys.stderr, flush=True)
            os.kill(pid, number)
            return


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped. False on a system without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in b"Tt"
    except OSError:
        return False


if __name__ == "__main__":
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(caught, signal.SIG_IGN)  # meant for the rank, and this process ends with the rank
    guard(int(sys.argv[1]), int(sys.argv[2]))
