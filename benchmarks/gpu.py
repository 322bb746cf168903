"""`python -m benchmarks gpu` measures a GPU in ten minutes, one stage after the other.

Each stage runs in its own process, so that a stage which fails, hangs or breaks its CUDA context does not affect the
others. Its rows so far are kept. After each stage gpu.json and gpu.md are written again. gpu.log holds what the stages
printed. The processes are forked from one that has loaded the libraries but has not touched any device.
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

LEAST_SECONDS = 5.0  # a stage does not begin if less time is left
GRACE_SECONDS = 15.0  # time for a stage to finish its current row after its budget is over
REHEARSED = 10.0  # a rehearsal on a busy processor may take this many times as long as on a GPU
BESIDE_TRAINING = 120.0  # seconds to prepare text and tokens and to compute held-out losses
NAME = "gpu"  # name of the files
KERNELS = "ponder_scale.model"  # a warning from here says that a kernel was replaced by another backend
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Stage:
    """A part of the measurement: a function that yields rows, and its time limit in seconds."""

    name: str
    title: str
    seconds: float
    rows: Callable[[Place], Iterator[Row]]


@dataclass
class Outcome:
    """The result of a stage. status: done, failed, left out, cut short, skipped."""

    name: str
    title: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def run(out: Path, *, toy: bool, minutes: float, train_minutes: float | None = None) -> int:
    """Measure everything, write the files, and return the exit code, which is 1 if a stage has failed.

    Args:
        toy: use tiny shapes, also without a GPU.
        minutes: time for all stages except training.
        train_minutes: time for paired training after all other stages. None skips it.

    Raises:
        ConfigError: there is no GPU here, and `toy` is not set.
    """
    import torch

    if not torch.cuda.is_available() and not toy:
        raise ConfigError("torch finds no GPU to measure; use --toy to rehearse the measurement on this processor")
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
    """Run the stages within `budget` seconds, not counting paired training, and write the files after each."""
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
    """Load the libraries in the process from which stages are forked, so that their time does not include it."""
    _CONTEXT.set_forkserver_preload(["benchmarks.stages"])
    nothing = _CONTEXT.Process(target=int)
    nothing.start()
    nothing.join()


def _run(stage: Stage, place: Place, out: Path, seconds: float) -> Outcome:
    """Run one stage in its own process, and kill it if it does not end in time."""
    path, began = out / f".{stage.name}.jsonl", time.monotonic()
    path.write_text("")
    process = _CONTEXT.Process(target=_in_a_process, args=(stage, place, path, out / f"{NAME}.log", seconds))
    process.start()
    process.join(seconds + GRACE_SECONDS)
    hung = process.is_alive()
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also kills the processes that it has started
    process.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    rows = [line for line in lines if "status" not in line]
    ended: dict[str, str] = next((line for line in lines if "status" in line), {})
    if hung:
        ended = {
            "status": "failed",
            "reason": f"it was still running {GRACE_SECONDS:g} s after its limit of {seconds:.0f} s",
        }
    elif not ended:
        ended = {"status": "failed", "reason": f"its process ended with exit code {process.exitcode}"}
    return Outcome(stage.name, stage.title, ended["status"], ended["reason"], time.monotonic() - began, rows)


class _Heard(logging.Handler):
    """Keeps our warnings as rows. A warning about a kernel is a failure, because another backend is measured then."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._rows: list[Row] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        said = record.getMessage()
        self._rows.append(Row("warning", said, error=said if record.name.startswith(KERNELS) else None))

    def rows(self) -> list[Row]:
        """The rows since the last call."""
        found, self._rows = self._rows, []
        return found


def _in_a_process(stage: Stage, place: Place, path: Path, log: Path, seconds: float) -> None:
    """Write each row when it is measured, then the status."""
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
                    write_line({"status": "cut short", "reason": f"it reached its limit of {seconds:.0f} s"})
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
    os._exit(0)  # a broken device may hang an interpreter that exits normally


def write(out: Path, place: Place, outcomes: Sequence[Outcome]) -> None:
    """Write the two files. A reader always sees whole files."""
    found = {"command": "python -m benchmarks gpu" + (" --toy" if place.toy else ""), "device": place.device}
    found |= {"time": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    text = json.dumps({**found, "stages": [asdict(outcome) for outcome in outcomes]}, indent=1)
    write_whole(out / f"{NAME}.json", text + "\n")
    write_whole(out / f"{NAME}.md", markdown(outcomes))


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One table in the format of docs/performance.md, with columns for the part, what, its figure and a comparison."""
    lines = ["| part | what | measured | beside |", "|---|---|---|---|"]
    for outcome in outcomes:
        for row in outcome.rows:
            lines.append(_line(outcome.title, row["what"], row["figure"], row["beside"]))
        if outcome.status != "done":
            lines.append(_line(outcome.title, f"*{outcome.status}*", outcome.reason[:300], ""))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
