"""The worker processes of one machine. If one dies, another takes over its task."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.build.parallel import Tasks, Team, one_thread, work_off
from data_pipeline.build.stages import Stage
from data_pipeline.build.state import Build
from data_pipeline.config import BuildConfig
from data_pipeline.progress import SECONDS_BETWEEN_LINES, Progress, Report
from ponder_scale.errors import ConfigError, UserError

if TYPE_CHECKING:
    from multiprocessing import connection
    from multiprocessing.context import SpawnProcess


def run_stage(folder: Path, config: BuildConfig, stage: Stage, team: Team) -> None:
    """Do every task of a stage, this rank with its workers and all other ranks with theirs.

    Raises the UserError that stopped a worker, or ConfigError if all workers of this rank were killed.
    """
    one_thread()
    if team.ranks > 1:
        _without_torch()
    build = Build(folder, config)
    tasks = _tasks(build, stage)
    if not tasks.sizes:
        return
    waiting = set(tasks.unfinished())
    done = sum(tasks.sizes) - sum(tasks.sizes[task] for task in waiting)
    with Progress(stage.title, sum(tasks.sizes), quiet=team.rank > 0, done=done) as progress:

        def report(size: int, documents: int, tokens: int) -> None:
            if team.ranks == 1:
                progress.add(size, documents, tokens)

        def watch(left: list[int]) -> None:
            if team.ranks > 1 and team.rank == 0:
                progress.add(*_news(tasks, waiting, left))

        if team.workers == 1 or len(tasks.unfinished()) <= 1:
            work_off(tasks, partial(stage.task, build), team.rank, team.ranks, report, watch)
        else:
            with _started(folder, config, stage, team) as children:
                _listen(tasks, children, report, watch if team.ranks > 1 else None)
        watch([])


def _tasks(build: Build, stage: Stage) -> Tasks:
    return Tasks(build.work, stage.name, stage.sizes(build), build.config.lease_seconds)


def _news(tasks: Tasks, waiting: set[int], left: list[int]) -> tuple[int, int, int]:
    """Bytes, documents and tokens of the tasks in `waiting` that are now done, from their journals. Removes these
    tasks.
    """
    new = waiting.difference(left)
    waiting -= new
    documents = tokens = 0
    for journal in map(tasks.journals.of, new):
        shards = [info for infos in journal.get("shards", {}).values() for info in infos]
        documents += sum(info["documents"] for info in shards) if shards else journal.get("documents", 0)
        tokens += sum(info["tokens"] for info in shards)
    return sum(tasks.sizes[task] for task in new), documents, tokens


@contextmanager
def _started(
    folder: Path, config: BuildConfig, stage: Stage, team: Team
) -> Iterator[dict[connection.Connection, SpawnProcess]]:
    """Start a process for each worker and yield them by the pipe that each reports to. Ends them with the block."""
    from multiprocessing import get_context

    context = get_context("spawn")  # threads of libraries do not survive a fork
    children = {}
    try:
        for worker in range(team.workers):
            ours, theirs = context.Pipe(duplex=False)
            place = (team.rank * team.workers + worker, team.ranks * team.workers)
            process = context.Process(target=_work, args=(folder, config, stage, place, theirs), daemon=True)
            with _ignoring_interrupts():
                process.start()
            theirs.close()
            children[ours] = process
        yield children
    finally:
        for process in children.values():
            process.terminate()
            process.join()


def _listen(
    tasks: Tasks,
    children: dict[connection.Connection, SpawnProcess],
    report: Report,
    watch: Callable[[list[int]], None] | None,
) -> None:
    """Pass on the reports of workers, until each has found all tasks done or one reports an error.

    Other ranks send no reports. If there are any, `watch` regularly receives the tasks that are left.
    """
    from multiprocessing import connection

    alive, last_look = dict(children), time.monotonic()
    while alive:
        if watch is not None and time.monotonic() - last_look >= SECONDS_BETWEEN_LINES:
            watch(tasks.unfinished())
            last_look = time.monotonic()
        ready: Any = connection.wait(list(alive), timeout=1.0)
        for pipe in ready:
            try:
                message = pipe.recv()
            except EOFError:
                process = alive.pop(pipe)
                process.join()
                if process.exitcode:
                    _lost(tasks, process, bool(alive))
                continue
            if isinstance(message, BaseException):
                raise message
            report(*message)


def _lost(tasks: Tasks, process: SpawnProcess, others: bool) -> None:
    code = process.exitcode or 0
    what = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if process.pid is not None:
        tasks.release(process.pid)
    print(f"warning: worker {process.pid} {what}; another worker takes over its unit", file=sys.stderr, flush=True)
    if not others and tasks.unfinished():
        raise ConfigError(
            f"all workers ended, and the last one {what}; after signal 9 the machine may lack memory, so lower "
            f"workers or max_document_bytes; run the same command again to continue from the finished units"
        )


def _work(folder: Path, config: BuildConfig, stage: Stage, place: tuple[int, int], pipe: connection.Connection) -> None:
    """Run one worker process. An error that stops it is sent to the build."""
    one_thread()
    _without_torch()
    try:
        build = Build(folder, config)
        work_off(_tasks(build, stage), partial(stage.task, build), *place, report=lambda *done: pipe.send(done))
    except BrokenPipeError:
        sys.exit(1)  # the build of this worker has ended
    except (UserError, OSError) as error:
        with suppress(BrokenPipeError):
            pipe.send(error)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Start workers so that they ignore Ctrl-C. The terminal sends it to them too, but the build itself ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _without_torch() -> None:
    """Keep `datasets` from loading torch to read rows, which only costs memory. For processes that are only workers."""
    os.environ["USE_TORCH"] = "0"
