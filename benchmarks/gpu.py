"""`python -m benchmarks gpu`: all that is to be known of a GPU, in ten minutes, one stage after the other.

Each stage runs in a process of its own, so that one that fails, hangs or breaks its CUDA context leaves the others as
they are. What it has measured so far is kept. After each stage gpu.json and gpu.md are written anew. gpu.log has what
the stages printed. The processes are forked from one that has loaded the libraries and touched no device.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import Place, Row
from ponder_scale.errors import ConfigError, UserError
from ponder_scale.files.write import write_whole

LEAST_SECONDS = 5.0  # less is left: a stage is not begun
GRACE_SECONDS = 15.0  # for a stage whose budget is over to end with the row that it is at
REHEARSED = 10.0  # times as long as on a GPU may a rehearsal take, on a processor that has other work
BESIDE_TRAINING = 120.0  # seconds for its text, its tokens and its held-out losses
NAME = "gpu"  # of the files
KERNELS = "ponder_scale.model"  # whose warnings say that a kernel was given up for another backend
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Stage:
    """A part of the measurement: a generator of rows, and the seconds that it may take."""

    name: str
    title: str
    seconds: float
    rows: Callable[[Place], Iterator[Row]]


@dataclass
class Outcome:
    """What came of a stage. status: done, failed, left out, cut short, skipped."""

    name: str
    title: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def run(out: Path, *, toy: bool, minutes: float, train_minutes: float | None = None) -> int:
    """Measure everything, write the files, and return the exit code: 1 where a stage has failed.

    Args:
        toy: shapes of no consequence, also without a GPU.
        minutes: for all stages but the training.
        train_minutes: of paired training, after all else; None: none.

    Raises:
        ConfigError: there is no GPU here, and `toy` is not asked for.
    """
    import torch

    if not torch.cuda.is_available() and not toy:
        raise ConfigError("no GPU here that torch can use: nothing to measure; --toy rehearses it on this processor")
    place = Place("cuda" if torch.cuda.is_available() else "cpu", toy, train_minutes)
    stages = _stages(place)
    out.mkdir(parents=True, exist_ok=True)
    outcomes = measure(stages, place, out, 60 * minutes)
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    print(f"wrote {out / NAME}.json and {out / NAME}.md" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _stages(place: Place) -> list[Stage]:
    from benchmarks import stages

    slower = REHEARSED if place.toy else 1.0
    found = [Stage(name, title, slower * seconds, rows) for name, title, seconds, rows in stages.ALL]
    if place.train_minutes is not None:
        seconds = 60 * place.train_minutes + slower * BESIDE_TRAINING
        found.append(Stage("train", "Paired training", seconds, stages.training))
    return found


def measure(stages: Sequence[Stage], place: Place, out: Path, budget: float) -> list[Outcome]:
    """Run the stages within `budget` seconds, of which paired training has its own, and write the files after each."""
    _load()
    began, outcomes = time.monotonic(), list[Outcome]()
    (out / f"{NAME}.log").write_text("")
    for stage in stages:
        left = stage.seconds if stage.name == "train" else min(stage.seconds, budget - (time.monotonic() - began))
        if left < min(LEAST_SECONDS, stage.seconds):
            reason = f"the {budget / 60:g} minutes were over; raise --minutes"
            outcomes.append(Outcome(stage.name, stage.title, "skipped", reason))
        else:
            outcomes.append(_run(stage, place, out, left))
        outcome = outcomes[-1]
        said = f"{outcome.name:12s} {outcome.status}, {len(outcome.rows)} rows in {outcome.seconds:.0f} s"
        print(f"{said}: {outcome.reason}" if outcome.reason else said, flush=True)
        write(out, place, outcomes)
    return outcomes


def _load() -> None:
    """Have the process from which the stages are forked load the libraries, which is no part of their time."""
    _CONTEXT.set_forkserver_preload(["benchmarks.stages"])
    nothing = _CONTEXT.Process(target=int)
    nothing.start()
    nothing.join()


def _run(stage: Stage, place: Place, out: Path, seconds: float) -> Outcome:
    """One stage, in a process of its own, ended where it does not end in time."""
    path, began = out / f".{stage.name}.jsonl", time.monotonic()
    path.write_text("")
    process = _CONTEXT.Process(target=_in_a_process, args=(stage, place, path, out / f"{NAME}.log", seconds))
    process.start()
    process.join(seconds + GRACE_SECONDS)
    hung = process.is_alive()
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has started
    process.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    rows = [line for line in lines if "status" not in line]
    ended: dict[str, str] = next((line for line in lines if "status" in line), {})
    if hung:
        ended = {"status": "failed", "reason": f"it had not ended {GRACE_SECONDS:g} s after its {seconds:.0f} s"}
    elif not ended:
        ended = {"status": "failed", "reason": f"its process ended with exit code {process.exitcode}"}
    return Outcome(stage.name, stage.title, ended["status"], ended["reason"], time.monotonic() - began, rows)


class _Heard(logging.Handler):
    """Keeps the warnings of ours as rows. One of the kernels is a failure: what follows is measured of another way."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._rows: list[Row] = []

    def emit(self, record: logging.LogRecord) -> None:
        """As logging calls it."""
        said = record.getMessage()
        self._rows.append(Row("warning", said, error=said if record.name.startswith(KERNELS) else None))

    def rows(self) -> list[Row]:
        """Those since the last call."""
        found, self._rows = self._rows, []
        return found


def _in_a_process(stage: Stage, place: Place, path: Path, log: Path, seconds: float) -> None:
    """Write each row as it comes, and at last the status."""
    os.setsid()
    with log.open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    print(f"== {stage.name}", flush=True)
    deadline, heard = time.monotonic() + seconds, _Heard()
    logging.getLogger("ponder_scale").addHandler(heard)
    with path.open("a") as out:

        def write_line(value: dict[str, Any]) -> None:
            out.write(json.dumps(value) + "\n")
            out.flush()

        failures = []
        try:
            for measured in stage.rows(place):
                for row in (measured, *heard.rows()):
                    write_line(asdict(row))
                    failures += [row.error if row.what == "warning" else row.what] if row.error else []
                if time.monotonic() > deadline:
                    write_line({"status": "cut short", "reason": f"its {seconds:.0f} s were over"})
                    break
            else:
                wrong = {"status": "failed", "reason": "; ".join(failures)}
                write_line(wrong if failures else {"status": "done", "reason": ""})
        except UserError as error:
            write_line({"status": "left out", "reason": str(error)})
        except BaseException as error:
            traceback.print_exc()
            write_line({"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:2000]})
    sys.stdout.flush()
    os._exit(0)  # a broken device may hang an interpreter that ends


def write(out: Path, place: Place, outcomes: Sequence[Outcome]) -> None:
    """The two files, each whole at any time."""
    found = {"command": "python -m benchmarks gpu" + (" --toy" if place.toy else ""), "device": place.device}
    found |= {"time": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    text = json.dumps({**found, "stages": [asdict(outcome) for outcome in outcomes]}, indent=1)
    write_whole(out / f"{NAME}.json", text + "\n")
    write_whole(out / f"{NAME}.md", markdown(outcomes))


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One table, to stand in docs/performance.md: the part, what, its figure and what that is beside."""
    lines = ["| part | what | measured | beside |", "|---|---|---|---|"]
    for outcome in outcomes:
        for row in outcome.rows:
            lines.append(_line(outcome.title, row["what"], row["figure"], row["beside"]))
        if outcome.status != "done":
            lines.append(_line(outcome.title, f"*{outcome.status}*", outcome.reason[:300], ""))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
