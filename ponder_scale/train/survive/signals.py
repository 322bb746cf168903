"""Signals to `ponder-scale train`, remembered from its first moment until a step boundary honours them.

    SIGTERM, SIGUSR2    save at the next step boundary, exit 85: a launcher starts the run again
    SIGINT              save at the next step boundary, exit 130; a second one ends at once
    SIGUSR1             stacks of all threads to standard error, and on with it

Importing torch and building an engine take seconds to minutes, in which the default action of a signal would kill
the process. So the handlers are installed before anything slow is imported: nothing but the standard library here.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

AGAIN = (signal.SIGTERM, signal.SIGUSR2)
CAUGHT = (*AGAIN, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Received:
    """What has arrived so far."""

    again: bool = False
    interrupt: bool = False


def process_start() -> float:
    """When this process began, on the monotonic clock; `start_over` does not change it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since boot: man 5 proc
    except OSError:  # not Linux
        return time.monotonic()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


received = Received()
started, imported = process_start(), time.monotonic()  # they differ where `start_over` was called


def install() -> None:
    """Install the handlers and let through what a launcher held back until now. For the main thread."""
    for number in AGAIN:
        signal.signal(number, _remember)
    signal.signal(signal.SIGINT, _interrupt)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)


def start_over() -> NoReturn:
    """Run this command again in this process, from the beginning; what has arrived is not forgotten by it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)  # what is pending stays so, until `install` there
    for number, arrived in ((signal.SIGTERM, received.again), (signal.SIGINT, received.interrupt)):
        if arrived:
            os.kill(os.getpid(), number)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


def _remember(*_: Any) -> None:
    received.again = True


def _interrupt(*_: Any) -> None:
    if received.interrupt:
        raise KeyboardInterrupt
    received.interrupt = True
    # os.write would be the safe call within a C handler; Python runs this one between bytecodes
    print("interrupted: saving after this step; interrupt again to end at once", file=sys.stderr, flush=True)
