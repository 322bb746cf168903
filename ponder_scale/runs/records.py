"""metrics.jsonl, the record of a run: one JSON object a line, {"event", "step", "attempt", "time", ...}.

Lines of steps, evaluations and tasks hold what the run computed. There is one line for each step, in order, even if
the run took several attempts. If an attempt resumes from an earlier step, later steps are computed again, and their old
lines move to metrics.superseded.jsonl. All other events are history and stay in the order in which they happened.

This module does not import torch, because the record is also read on login nodes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ponder_scale.files.write import sync, writing

logger = logging.getLogger(__name__)

METRICS, SUPERSEDED = "metrics.jsonl", "metrics.superseded.jsonl"
MEASURED = ("evaluation", "tasks")
COMPUTED = ("step", *MEASURED)
# The last phase of a rank's heartbeat. A run is "refused" if an error of the user ends it before the first step.
ENDED, REFUSED, FAILED = "ended", "refused", "failed"
HISTORY = ("resume", "change", "save", "skip", "alarm", "rewind", "straggler", "end")


class Recorder:
    """Appends to the record of a run. Only one process may do so at a time.

    Args:
        start_step: the step from which the run continues.
        attempt: number of this start of the run, counted from 1. It is in every line.
        check_owned: called before each line, and raises if another process has taken the run over. Otherwise an older
            process, on a node that was cut off from its cluster, would write to a record that it no longer owns.

    Attributes:
        reached: the last step that an earlier attempt has recorded, superseded lines included, or 0.
        evaluations: the steps with a recorded evaluation, superseded lines included.
        asked: the steps with recorded tasks, superseded lines included.
        evaluated: the last step up to `start_step` with an evaluation, or 0.
        last_asked: the last step up to `start_step` with tasks, or 0.
    """

    def __init__(
        self, run_dir: Path, *, start_step: int, attempt: int, check_owned: Callable[[], None] = lambda: None
    ) -> None:
        self._attempt, self._check_owned = attempt, check_owned
        path = run_dir / METRICS
        seen, kept = _keep_until(path, start_step)
        self.reached, self.evaluations, self.asked = seen.reached, seen.evaluations, seen.asked
        self.evaluated, self.last_asked = (kept[event] for event in MEASURED)
        # Unbuffered and in append mode, each line is one write, and no other writer's line can split it.
        self._file = path.open("ab", buffering=0)
        self._pending = bytearray()  # lines, or the rest of one, for which the disk had no room yet
        self._refused = False

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append a line. Numbers that are not finite become null. Events other than steps are on disk on return."""
        assert event in COMPUTED + HISTORY, event
        self._check_owned()
        head = {"event": event, "step": step, "attempt": self._attempt, "time": round(time.time(), 3)}
        self._pending += orjson.dumps(head | values, option=orjson.OPT_APPEND_NEWLINE)
        if event == "step":
            self._flush()
        else:
            self.sync()

    def sync(self) -> None:
        """Wait until all lines are on disk. Called before a checkpoint is sealed, so that no line before it is lost."""
        if self._flush():
            sync(self._file)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def _flush(self) -> bool:
        """Write pending lines. Returns whether the disk took all. If it is full, the next call tries the rest again."""
        try:
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
            self._refused = False
        except OSError as error:
            if not self._refused:
                logger.error("%s: %s; lines are kept in memory until there is room", self._file.name, error)
            self._refused = True
        return not self._pending


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record, in order. Damaged lines are skipped."""
    with path.open("rb") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None:
                yield record


def read_end(path: Path, size: int) -> list[dict[str, Any]]:
    """The lines within the last `size` bytes of a record."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - size))
        lines = file.read().splitlines(keepends=True)
    found = [_parse(line) for line in (lines if end <= size else lines[1:])]
    return [record for record in found if record is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line, or None if a crash has cut the line off."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict)
    return record if whole and isinstance(record.get("event"), str) and isinstance(record.get("step"), int) else None


@dataclass
class _Seen:
    """The last step, and the steps of evaluations and tasks, in some lines."""

    reached: int = 0
    evaluations: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)

    def add(self, record: dict[str, Any]) -> None:
        if record["event"] == "step":
            self.reached = max(self.reached, record["step"])
        elif record["event"] == "evaluation":
            self.evaluations.add(record["step"])
        elif record["event"] == "tasks":
            self.asked.add(record["step"])


def _keep_until(path: Path, step: int) -> tuple[_Seen, dict[str, int]]:
    """Move the lines that were computed after `step` out of the record.

    Returns what all attempts have recorded, and the last steps with an evaluation and with tasks that stay in the
    record.
    """
    measured = dict.fromkeys(MEASURED, 0)
    superseded, seen = path.with_name(SUPERSEDED), _Seen()
    for moved_before in read(superseded) if superseded.is_file() else ():
        seen.add(moved_before)
    if not path.is_file():
        return seen, measured
    kept: list[bytes] = []
    moved: list[bytes] = []
    damaged = 0
    with path.open("rb") as lines:
        for line in lines:
            record = _parse(line)
            if record is None:
                damaged += 1
                continue
            seen.add(record)
            if record["event"] in COMPUTED and record["step"] > step:
                moved.append(line)
                continue
            kept.append(line)
            if record["event"] in MEASURED:
                measured[record["event"]] = record["step"]
    if damaged:
        logger.warning("%s: left out %d damaged lines, which a crash can leave", path, damaged)
    if moved:
        _append_new(superseded, moved)
    if moved or damaged:
        with writing(path) as file:
            file.writelines(kept)
    return seen, measured


def _append_new(path: Path, lines: list[bytes]) -> None:
    """Append the lines that are not in the file yet.

    Some may be there already, if an earlier start died after this and before it replaced the record. Each line has its
    attempt and time, so equal lines are the same record.
    """
    with path.open("a+b") as file:
        file.seek(0)
        there, last = set(), b"\n"
        for last in file:
            there.add(last)
        if not last.endswith(b"\n"):  # a writer died in the middle of this line, so start a new one
            file.write(b"\n")
        file.writelines(line for line in lines if line not in there)
        sync(file)
