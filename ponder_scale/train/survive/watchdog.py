"""Watch one rank: publish where it is, measure how long its phases take, and end it when it hangs.

A rank that hangs usually waits in a collective for a rank that failed elsewhere, so all ranks stop. Each rank finds
this out by itself. It writes the stacks of its threads to its log, gives the others time to do the same, and leaves
with exit code 86. Three things watch:

    watchdog thread    looks at the clock
    heartbeat thread   writes RUN/heartbeat/rank-00000.json; if a sick file system blocks it, the watchdog still runs
    `guard` process    acts when native code holds the interpreter's lock, so that no thread can run. It sends the
                       signal BLOCKED. faulthandler, which needs no interpreter, writes the stacks, and the rank ends

Only seconds in which this process ran count as idle, so a run that was stopped and continued is not taken for hung.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ponder_scale.config import HealthConfig
from ponder_scale.errors import HUNG, FencedError, UserError
from ponder_scale.files.write import write_whole
from ponder_scale.runs.records import ENDED, FAILED, REFUSED
from ponder_scale.train.survive import guard

HEARTBEATS = "heartbeat"
HEARTBEAT_SECONDS = 5.0
GRACE_SECONDS = 10.0  # the other ranks get this long to write their stacks before the first one leaves
BLOCKED = signal.SIGVTALRM  # nothing else uses it, and its default action ends the process
SUSPENDED_SECONDS = 5.0  # a longer gap between two looks at the clock means a suspension, or a very busy machine
SLOW = ("start", "save", "evaluate")  # these phases and the whole first step may take `slow_seconds`
# The other phases include the wait for the slowest rank, so their seconds say nothing about this rank. Under ZeRO-3
# that is true of forward, too, because it gathers weights.
TIMED = ("data", "forward")
WHY = 300  # letters of an error that a heartbeat keeps
NEGLIGIBLE = 0.05  # a rank that loses less than this share of the time is not worth naming


class Watch:
    """Watches from its construction until the end of its `with` block. The main thread calls `enter` as a sign of life.

    Each phase costs the main thread two looks at the clock.

    Args:
        check_owned: raises FencedError once another attempt has taken the run over. Called before each heartbeat.
    """

    def __init__(
        self, run_dir: Path, health: HealthConfig, *, rank: int, check_owned: Callable[[], None] = lambda: None
    ) -> None:
        self._health = health
        self._rank = rank
        self._path = run_dir / HEARTBEATS / f"rank-{rank:05d}.json"
        self._where: tuple[str, int | None] = ("start", None)
        self._since, self._since_date = time.monotonic(), time.time()
        self._first_step: int | None = None
        self._why: str | None = None  # the error that ended the rank
        self._seconds, self._compared = dict.fromkeys(TIMED, 0.0), self._since
        self._closed = threading.Event()
        self._pause = heartbeat_seconds(int(os.environ.get("WORLD_SIZE", "1")))
        self._leaving = False
        self._broken = False  # by a rank that hung and left first
        self._looked, self._suspended = self._since, 0.0
        self._check_owned = check_owned
        self._threads = [threading.Thread(target=self._beat, name="heartbeat", daemon=True)]
        if health.hang_seconds is not None:
            self._threads.append(threading.Thread(target=self._guard, name="watchdog", daemon=True))
        for thread in self._threads:
            thread.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Note that this rank has reached `phase` of step `step`. None is the step of the last call."""
        now, (before, known) = time.monotonic(), self._where
        if before in self._seconds:
            self._seconds[before] += now - self._since
        step = known if step is None else step
        if self._first_step is None:
            self._first_step = step
        self._where, self._since, self._since_date = (phase, step), now, time.time()

    def alive(self) -> None:
        """Note progress in the phase that was entered last."""
        self.enter(self._where[0])

    def failing(self) -> None:
        """Note that the main thread ends with an error. If this rank is leaving as hung, the error is no progress."""
        self._broken = self._leaving
        self.enter("save")

    def clock(self) -> float:
        """Monotonic seconds without those in which this process was stopped. Needs the watchdog to know them."""
        suspended, unseen = self._suspended, time.monotonic() - self._looked
        if len(self._threads) > 1 and unseen > SUSPENDED_SECONDS:  # the process has just been continued
            suspended += unseen
        return time.monotonic() - suspended

    def phase_seconds(self) -> list[float]:
        """The seconds since the last call that were spent in each of `TIMED`, and all seconds since then."""
        now = time.monotonic()
        spent = [*self._seconds.values(), now - self._compared]
        self._seconds, self._compared = dict.fromkeys(TIMED, 0.0), now
        return spent

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if kind is not None and (self._broken or self._leaving):
            # Another rank left as hung while this one was about to, and that broke a collective here.
            print(f"rank {self._rank}: ends as hung, like its peers: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(HUNG)
        self._why = None if error is None else " ".join((str(error) or type(error).__name__).split())[:WHY]
        refused = isinstance(error, UserError) and self._first_step is None
        self.enter(ENDED if error is None else REFUSED if refused else FAILED)
        self._closed.set()
        for thread in self._threads:
            thread.join(HEARTBEAT_SECONDS)

    def _limit(self) -> float:
        assert self._health.hang_seconds is not None
        phase, step = self._where
        slow = phase in SLOW or step is None or step == self._first_step
        return max(self._health.hang_seconds, self._health.slow_seconds) if slow else self._health.hang_seconds

    def _guard(self) -> None:
        assert self._health.hang_seconds is not None
        pause = min(1.0, self._health.hang_seconds / 10)
        idle, since = 0.0, self._since
        beside = _Beside()
        while not self._closed.wait(pause):
            awake = self._look(pause)
            idle, since = (idle + awake if since == self._since else 0.0), self._since
            beside.allow(1.25 * self._limit() + GRACE_SECONDS)
            if idle > self._limit():
                self._alarm(idle)
        beside.close()

    def _look(self, pause: float) -> float:
        """Look at the clock. Returns the seconds since the last look that count as idle, at most twice `pause`."""
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        if gap > SUSPENDED_SECONDS:
            self._suspended += gap
        return min(gap, 2 * pause)

    def _alarm(self, idle: float) -> None:
        """Write the stacks, then leave unless there is progress after all."""
        since, (phase, step) = self._since, self._where
        when = "before the first step" if step is None else f"of step {step}"
        print(
            f"rank {self._rank}: no progress for {idle:.0f} s in {phase} {when}; stacks:", file=sys.stderr, flush=True
        )
        faulthandler.dump_traceback(all_threads=True)
        self._leaving = True
        assert self._health.hang_seconds is not None
        waited, grace = 0.0, min(GRACE_SECONDS, self._health.hang_seconds)
        while waited < grace and self._since == since and not self._closed.wait(pause := min(0.5, grace)):
            waited += self._look(pause)
        if waited >= grace and self._since == since:
            sys.stdout.flush()
            os._exit(HUNG)
        self._leaving = False
        print(f"rank {self._rank}: progress again, after {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        written: Any = None
        while True:
            closed = self._closed.wait(0.5 if written is None else self._pause)
            where = (self._where, self._since_date)
            # Rank 0 makes the run folder once it knows that the run can begin.
            if where != written and self._path.parent.parent.is_dir():
                self._write(*where)
                written = where
            if closed:
                return

    def _write(self, where: tuple[str, int | None], date: float) -> None:
        content = {"step": where[1], "phase": where[0], "time": date, "pid": os.getpid(), "host": socket.gethostname()}
        content |= {"why": self._why} if self._why else {}
        try:
            self._check_owned()
            self._path.parent.mkdir(exist_ok=True)
            write_whole(self._path, json.dumps(content) + "\n", durable=False)
        except FencedError:
            return  # the new attempt owns the file now; the main thread finds out at its next record or save
        except OSError as error:  # a heartbeat that fails, as on a full disk, must not end the run
            print(f"rank {self._rank}: heartbeat {self._path}: {error}", file=sys.stderr, flush=True)


class _Beside:
    """The guard process, which ends this rank when none of its threads can run."""

    def __init__(self) -> None:
        faulthandler.register(BLOCKED, file=2, all_threads=True, chain=True)
        command = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(int(BLOCKED))]
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
        except OSError as error:  # no more processes are allowed; the watchdog thread still watches
            print(f"a blocked interpreter will not be noticed: {error}", file=sys.stderr, flush=True)
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def allow(self, seconds: float) -> None:
        """Tell the guard that this process has run, and how many seconds of silence to allow from now on."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BlockingIOError, BrokenPipeError):  # the guard is stopped, or was ended from outside
                self._process.stdin.write(f"{seconds}\n".encode())

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def heartbeat_seconds(world_size: int) -> float:
    """The seconds between two heartbeats of a rank. All ranks together write at most 200 files a second."""
    return max(HEARTBEAT_SECONDS, world_size / 200)


def forget_ranks(run_dir: Path, world_size: int) -> None:
    """Remove the heartbeats of ranks that only an earlier attempt had."""
    for path in (run_dir / HEARTBEATS).glob("rank-*.json"):
        if int(path.stem.removeprefix("rank-")) >= world_size:
            path.unlink(missing_ok=True)


def straggler(seconds: Sequence[Sequence[float]], factor: float, phases: Sequence[str]) -> dict[str, Any] | None:
    """The slowest rank and phase if it took more than `factor` times the median of the ranks, else None.

    Args:
        seconds: a row for each rank, from `Watch.phase_seconds`.
        phases: the phases of `TIMED` to compare.
    """
    columns = dict(zip(TIMED, zip(*seconds, strict=True), strict=False))
    slow = []
    for phase in phases:
        median = statistics.median_low(columns[phase])
        spent = max(columns[phase])
        rank = columns[phase].index(spent)
        if spent > factor * median and spent - median > NEGLIGIBLE * seconds[rank][-1]:
            slow.append({"rank": rank, "phase": phase, "seconds": spent, "median_seconds": median})
    return max(slow, key=lambda found: found["seconds"] - found["median_seconds"], default=None)
