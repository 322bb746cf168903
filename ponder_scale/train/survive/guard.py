"""A process beside a rank that ends it when its interpreter is blocked: guard.py PID SIGNAL.

Where native code keeps the interpreter's lock, no thread of the rank can look at a clock. This process can: it is
told on its standard input, every second or so, for how many seconds it may hear nothing. It counts only the seconds
in which both ran, so that a run which was stopped (SIGSTOP, `scontrol suspend`, a paused container) goes on afterwards.
The signal makes the rank write its stacks and end. Nothing but the standard library here, so that it starts at once.
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
    """Return when the rank has ended, or has been ended."""
    idle, allowed = 0.0, float("inf")
    while os.getppid() == pid:
        began = time.monotonic()
        if select.select([0], [], [], TICK_SECONDS)[0]:
            said = os.read(0, 65536)
            if not said:
                return
            idle, allowed = 0.0, float(said.split()[-1])
            time.sleep(TICK_SECONDS / 10)  # where it is told in quick succession
            continue
        # after a gap this process itself was stopped
        idle += min(time.monotonic() - began, 2 * TICK_SECONDS) if not is_stopped(pid) else 0.0
        if idle > allowed:
            print(f"Timeout ({idle:.0f} s)! The interpreter is blocked:", file=sys.stderr, flush=True)
            os.kill(pid, number)
            return


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped; False where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in b"Tt"
    except OSError:
        return False


if __name__ == "__main__":
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(caught, signal.SIG_IGN)  # meant for the rank; the end of that is the end of this
    guard(int(sys.argv[1]), int(sys.argv[2]))
