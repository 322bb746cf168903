"""End or save a run from outside, on all ranks at the same step.

Every rank listens for signals. Only rank 0 looks at the clock and at the request files STOP, SAVE and SAVE_AND_STOP in
the run folder. Each rank turns its wishes into a row of numbers. The rows are added up over the ranks together with the
losses of the step, so the ranks need no other collective to agree.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ponder_scale.errors import AGAIN, INTERRUPTED, ConfigError
from ponder_scale.figures import duration, seconds_of
from ponder_scale.runs.requests import SAVE, SAVE_AND_STOP, STOP, honoured, requested
from ponder_scale.train.survive import signals

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks for request files
SHORTEST_SECONDS = 30.0  # shortest time limit: loading torch alone takes a third of this
# Assumed time of a save until a save or a load has been measured. Limits under ten minutes assume a tenth of the limit.
UNKNOWN_SAVE_SECONDS = 60.0


class Seen(NamedTuple):
    """The reasons to end or save the run that one rank sees."""

    requests: frozenset[str]  # only rank 0 looks for request files
    interrupt: bool
    again: bool  # SIGTERM or SIGUSR2 came: the scheduler ends the run and may start it again
    out_of_time: bool  # by rank 0's clock
    late: bool  # rank 0's clock says that a save is due


@dataclass(frozen=True)
class Orders:
    """What all ranks do at a step boundary."""

    wanted: Callable[[Seen], bool] = lambda seen: False  # whether a rank that sees this wants these orders
    save: bool = False
    exit_code: int | None = None  # None: the run continues
    reason: str = ""
    request: str | None = None  # the request file that these orders fulfil

    @property
    def stop(self) -> bool:
        """Whether the run ends here."""
        return self.exit_code is not None


# In order of precedence: what a person asks for comes before what a scheduler asks for.
ORDERS = (
    Orders(lambda seen: STOP in seen.requests, exit_code=0, reason="the file STOP", request=STOP),
    Orders(
        lambda seen: SAVE_AND_STOP in seen.requests,
        save=True,
        exit_code=0,
        reason="the file SAVE_AND_STOP",
        request=SAVE_AND_STOP,
    ),
    Orders(lambda seen: seen.interrupt, save=True, exit_code=INTERRUPTED, reason="an interrupt"),
    Orders(lambda seen: seen.again, save=True, exit_code=AGAIN, reason="a signal"),
    Orders(lambda seen: seen.out_of_time, save=True, exit_code=AGAIN, reason="the time limit"),
    Orders(lambda seen: SAVE in seen.requests, save=True, reason="the file SAVE", request=SAVE),
    Orders(lambda seen: seen.late, save=True, reason="checkpoint.every_minutes"),
)


class Control:
    """Requests to a run, as this rank sees them.

    Args:
        time_limit: value of `train.time_limit`. Only rank 0 reads it.
    """

    def __init__(self, run_dir: Path, time_limit: str | None, *, rank: int) -> None:
        self._run_dir, self._first = run_dir, rank == 0
        self._slurm = time_limit == "slurm"
        self._limit, self._deadline = _limit(time_limit) if self._first else (float("inf"), None)
        self._looked, self._requests = -LOOK_SECONDS, frozenset[str]()
        self._step_seconds: list[float] = []
        self._save_seconds, self._save_known = min(UNKNOWN_SAVE_SECONDS, 0.1 * self._limit), False
        self._evaluation_seconds = 0.0
        if self._deadline is not None:
            logger.info("the time limit is in %s; the run saves and ends before it", duration(self.seconds_left()))

    def seconds_left(self) -> float:
        """Seconds until this attempt is ended from outside."""
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def took(
        self,
        *,
        step: float | None = None,
        save: float | None = None,
        load: float | None = None,
        evaluation: float | None = None,
    ) -> None:
        """Note how long something took, so that the run ends in time. A load counts as a save until one is measured."""
        if step is not None:
            self._step_seconds = [*self._step_seconds[-9:], step]
        if save is not None:
            self._save_seconds = max(self._save_seconds, save) if self._save_known else save
            self._save_known = True
        if load is not None:
            self._save_seconds = max(self._save_seconds, load)
        if evaluation is not None:
            self._evaluation_seconds = max(self._evaluation_seconds, evaluation)

    def refusal(self) -> str | None:
        """Why no attempt with this time limit can do a step, or None if one can. Called before the first step."""
        started = time.monotonic() - signals.imported
        if not self._out_of_time():
            return None
        if self._limit - started >= self._reserve():
            logger.warning("the time limit is in %s, too soon for another step", duration(self.seconds_left()))
            return None
        what = f"train.time_limit is {self._limit:.0f} s"
        if self._slurm:
            what = f"the time limit of Slurm job {os.environ.get('SLURM_JOB_ID')} is {self._limit:.0f} s"
        return (
            f"{what}, but this start took {started:.0f} s and saving in time needs {self._reserve():.0f} s, so no time "
            f"is left for a step; allow at least {2 * (started + self._reserve()):.0f} s"
        )

    def wishes(self, *, late: bool = False) -> list[float]:
        """A 1 for each of `ORDERS` that this rank wants, else a 0. `late`: a save is due by this rank's clock."""
        seen = Seen(
            requests=self._look() if self._first else frozenset(),
            interrupt=signals.received.interrupt,
            again=signals.received.again,
            out_of_time=self._first and self._out_of_time(),
            late=self._first and late,
        )
        return [float(orders.wanted(seen)) for orders in ORDERS]

    def orders(self, wishes: Sequence[float]) -> Orders:
        """The first orders that any rank wants, from the sum of the wishes of all ranks."""
        return next((orders for orders, wish in zip(ORDERS, wishes, strict=True) if wish), Orders())

    def done(self, orders: Orders) -> None:
        """Remove the request file that these orders have fulfilled."""
        if self._first and orders.request:
            honoured(self._run_dir, orders.request)
            self._requests -= {orders.request}

    def _look(self) -> frozenset[str]:
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            self._requests = frozenset(path.name for path in requested(self._run_dir))
        return self._requests

    def _out_of_time(self) -> bool:
        """Whether the time may be too short for an evaluation, a scheduled save, a step and the save after it."""
        return self._deadline is not None and self.seconds_left() < self._reserve()

    def _reserve(self) -> float:
        """The seconds that the run needs to end in time."""
        margin = min(60.0, 0.1 * self._limit)
        steps, saves = 2 * max(self._step_seconds, default=0.0), 2.5 * self._save_seconds
        return margin + self._evaluation_seconds + steps + saves


def parse_time_limit(value: str) -> float:
    """The seconds of "90", "30:00" (minutes), "12:00:00" or Slurm's "1-12:00:00", "1-12:00" and "1-12" (hours).

    Raises ConfigError for anything else.
    """
    seconds = seconds_of(value)
    if seconds is None:
        raise ConfigError(f"train.time_limit is {value}; expected seconds, HH:MM:SS, D-HH:MM:SS, slurm or null")
    return seconds


def check_time_limit(value: str | None) -> None:
    """Raise ConfigError if `train.time_limit` cannot be read, or is too short for a start."""
    if value not in (None, "slurm") and parse_time_limit(value) < SHORTEST_SECONDS:
        raise ConfigError(
            f"train.time_limit is {value}; expected at least {SHORTEST_SECONDS:.0f} s, because a start takes "
            "that long; use null for no limit"
        )


def _limit(time_limit: str | None) -> tuple[float, float | None]:
    """The seconds that an attempt may take in all, and the monotonic time by which this one must have ended."""
    if time_limit is None:
        return float("inf"), None
    if time_limit != "slurm":
        limit = parse_time_limit(time_limit)
        return limit, signals.started + limit
    left = _slurm_seconds_left()
    if left is None:
        return float("inf"), None
    deadline = time.monotonic() + left
    begin, end = (os.environ.get(f"SLURM_JOB_{moment}_TIME") for moment in ("START", "END"))
    # The limit is that of the whole job, in which earlier attempts may have run. If Slurm does not tell its times, this
    # attempt counts as the first of the job.
    return float(end) - float(begin) if begin and end else deadline - signals.started, deadline


def _slurm_seconds_left() -> float | None:
    """The seconds until Slurm ends this job. None outside a job, without a limit, or if Slurm does not say."""
    job, end = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_END_TIME")
    if not job:
        return None
    if end:
        return float(end) - time.time()
    try:  # Slurm before 23.02 does not set SLURM_JOB_END_TIME
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        if answer == "UNLIMITED":
            return None
        left = seconds_of(answer)
        if left is None:
            raise ConfigError(f"squeue says {answer}")
        return left
    except (OSError, subprocess.SubprocessError, ConfigError) as error:
        logger.warning("the time limit of Slurm job %s is not known (%s); set train.time_limit", job, error)
        return None
