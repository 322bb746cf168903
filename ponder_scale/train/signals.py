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
from typing import Any, NoReturn

AGAIN = (signal.SIGTERM, signal.SIGUSR2)
CAUGHT = (*AGAIN, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Received:
    """What has arrived so far."""

    again: bool = False
    interrupt: bool = False


received = Received()
started = time.monotonic()  # of the process, nearly: this module is its first import


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
    if received.again:
        os.kill(os.getpid(), signal.SIGTERM)
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
