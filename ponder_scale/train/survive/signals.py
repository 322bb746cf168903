"""Signals to `ponder-scale train`. They are remembered from the first moment and honoured at a step boundary.

    SIGTERM, SIGUSR2    save at the next step boundary and exit with 85, so that a launcher starts the run again
    SIGINT              save at the next step boundary and exit with 130; a second one ends the process at once
    SIGUSR1             write the stacks of all threads to standard error and continue

Importing torch and building an engine take seconds to minutes. In that time the default action of a signal would kill
the process. So the handlers are installed before anything slow is imported, and this module imports only the standard
library.
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
    """The signals that have arrived so far."""

    again: bool = False
    interrupt: bool = False


def process_start() -> float:
    """The monotonic time at which this process began. `start_over` does not change it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since boot: man 5 proc
    except OSError:  # not Linux
        return time.monotonic()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


received = Received()
started, imported = process_start(), time.monotonic()  # far apart if `start_over` was called


def install() -> None:
    """Install the handlers, then let through the signals that a launcher held back. Call it from the main thread."""
    for number in AGAIN:
        signal.signal(number, _remember)
    signal.signal(signal.SIGINT, _interrupt)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)


def start_over() -> NoReturn:
    """Run this command again in this process, from the beginning. Signals that have arrived are not lost."""
    # Blocked signals stay pending across exec, until the new program calls `install`.
    signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
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
    # `print` is safe here, because Python runs this handler between bytecodes and not inside the C handler.
    print("interrupted: saving after this step; interrupt again to end at once", file=sys.stderr, flush=True)
