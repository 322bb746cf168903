"""Assign tasks to processes, on one machine or over MPI ranks on several.

Workers send each other nothing. A worker claims a task by creating a file, and the task is done when its journal has
its final name. Workers keep their claims fresh. Any worker may take over a claim that is no longer fresh. The output of
a task depends on the task alone and gets its final name in one step. Two workers that do the same task therefore write
the same bytes. Claims save work, and correctness does not depend on them.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.build.journals import Journals
from data_pipeline.progress import Doing, Report, told
from data_pipeline.read.units import share
from ponder_scale.errors import ConfigError
from ponder_scale.files.delete import delete_contents, delete_file
from ponder_scale.files.write import sync, sync_folder

_RANKS_OF = ("SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # set by srun, MPICH and Open MPI
_LEAST_WAIT, _MOST_WAIT = 0.05, 2.0  # seconds between two searches for work
_SEALING_SECONDS = 3600.0
_ARRIVAL_SECONDS = 600.0  # long, because thousands of ranks may import from one file system
_TRIES = 32  # tasks of other workers to try in each search; few, because file servers are shared


@dataclass(frozen=True)
class Team:
    """The processes that work on a build: this rank among all ranks, each with the same number of worker processes."""

    rank: int = 0
    ranks: int = 1
    workers: int = 1
    world: Any = None  # MPI's communicator of the ranks, if there is more than one


def one_thread() -> None:
    """Limit libraries to one thread, because each worker is a process. Call it before the libraries are loaded."""
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def assemble(workers: int | None, prepare: Callable[[], bool]) -> tuple[Team, bool]:
    """Find this process's team from the environment of mpirun or srun. Returns it and what `prepare` returned.

    Only rank 0 calls `prepare`, and all other ranks wait for it. From then until `part`, ranks communicate only through
    files, so that losing one does not stop the others.
    Raises ConfigError if the launcher started more ranks than MPI knows, and if `prepare` failed on rank 0.
    """
    announced = max(map(_ranks_announced, _RANKS_OF))
    if announced == 1:
        return Team(workers=workers or len(os.sched_getaffinity(0))), prepare()
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"{announced} ranks were started, but MPI cannot be loaded: {error}") from error
    _wait_until_all_ranks_have_started(MPI)
    world = MPI.COMM_WORLD
    team = Team(world.rank, world.size, workers or 1, world)
    if team.ranks != announced:
        raise ConfigError(
            f"{announced} ranks were started, but MPI sees {team.ranks}: the launcher and the MPI library do not fit; "
            f"use srun --mpi=pmi2 with MPICH, srun --mpi=pmix with Open MPI, or the mpirun of the library"
        )
    found = None
    try:
        if team.rank == 0:
            found = prepare()
    finally:
        found = world.bcast(found)
        if not found:  # nothing to do, or rank 0 failed
            MPI.Finalize()
    if found is None:
        raise ConfigError("rank 0 could not begin the build; see its own error message")
    return team, found


def _ranks_announced(name: str) -> int:
    value = os.environ.get(name) or "1"
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name} is {value!r} in the environment; expected the number of ranks; unset or correct it")
    return int(value)


def _wait_until_all_ranks_have_started(mpi: Any) -> None:
    """Call MPI.Init, and end this process if a rank does not arrive in time.

    MPI.Init waits forever for a rank whose node is lost, and it holds the interpreter's lock. Only a thread outside the
    interpreter can end the process. That thread prints a stack, in which this function's name tells the reason.
    """
    faulthandler.dump_traceback_later(_ARRIVAL_SECONDS, exit=True)
    mpi.Init()
    faulthandler.cancel_dump_traceback_later()


def part(team: Team, work: Path, lease_seconds: float) -> None:
    """Leave MPI with all ranks, as launchers expect. If a rank is lost, leave without MPI, which would wait forever.

    Every rank calls it after it has found all work done. If a rank is lost, the others wait until rank 0 has finished,
    because launchers stop the processes that remain when some leave. Raises ConfigError if rank 0 itself is lost.
    """
    if team.world is None:
        return
    here = work / "ranks"
    here.mkdir(exist_ok=True)
    (here / str(team.rank)).touch()
    if _until(lambda: len(list(here.glob("*"))) == team.ranks, lease_seconds):
        from mpi4py import MPI

        team.world.barrier()
        MPI.Finalize()
    elif team.rank > 0:
        if work.is_dir() and not (here / "0").exists():
            raise ConfigError(
                "rank 0 was lost after all units were done; run the same command again to finish the build"
            )
        _until(lambda: not work.is_dir(), _SEALING_SECONDS)


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until the condition holds, for at most `seconds`. Returns whether it did."""
    patience = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < patience:
        time.sleep(_LEAST_WAIT)
    return met


class Tasks:
    """Tasks 0 ... n - 1 of a stage: which are done, which are claimed, and how to do one."""

    def __init__(self, work: Path, stage: str, sizes: Sequence[int], lease_seconds: float) -> None:
        """`sizes` are the sizes of the tasks in any unit. They balance the work among workers."""
        self.sizes, self.journals = sizes, Journals(work / stage)
        self._claims = work / "claims" / stage
        self._scratch = work / "scratch" / f"{socket.gethostname()}-{os.getpid()}"
        self._lease = lease_seconds
        for folder in (self.journals.folder, self._claims, self._scratch):
            folder.mkdir(parents=True, exist_ok=True)

    def unfinished(self) -> list[int]:
        """The tasks without a journal. None if the folder is gone, because then the build is finished."""
        if not self.journals.folder.is_dir():
            return []
        done = self.journals.done()
        return [task for task in range(len(self.sizes)) if task not in done]

    def free(self, tasks: list[int]) -> Iterator[int]:
        """Claim the tasks that no live worker holds, one by one, and yield each claimed task."""
        for task in tasks:
            if self._claim(task) and not self.journals.path(task).exists():
                yield task

    def perform(self, task: int, begin: Callable[[int, Path], Doing], report: Report) -> None:
        """Do a claimed task in an empty folder and write its journal. `begin` receives the task and the folder."""
        stop = threading.Event()
        heartbeat = threading.Thread(target=self._keep_fresh, args=(task, stop), daemon=True)
        heartbeat.start()
        try:
            self._scratch.mkdir(exist_ok=True)
            delete_contents(self._scratch, lambda name: True)  # everything in it belongs to this process
            journal = told(begin(task, self._scratch), report)
            path = self._scratch / "journal.json"
            with path.open("wb") as stream:
                stream.write(orjson.dumps(journal))
                sync(stream)
            path.rename(self.journals.path(task))
            sync_folder(self.journals.folder)
        except BaseException:
            delete_file(self._claim_file(task))
            raise
        finally:
            stop.set()
            heartbeat.join()

    def release(self, pid: int) -> None:
        """Give up the claims of a worker on this machine that died."""
        owner = f"{socket.gethostname()}-{pid}"
        for path in self._claims.iterdir():
            if path.read_text() == owner:
                delete_file(path)

    def _claim(self, task: int) -> bool:
        path = self._claim_file(task)
        if path.exists() and self._is_stale(path):
            delete_file(path)
        try:
            with path.open("x") as stream:
                stream.write(self._scratch.name)
        except FileExistsError:
            return False
        return True

    def _is_stale(self, path: Path) -> bool:
        probe = self._scratch / "now"  # on the same file system, so that the clocks of machines need not agree
        probe.touch()
        try:
            return probe.stat().st_mtime - path.stat().st_mtime > self._lease
        except FileNotFoundError:
            return False

    def _keep_fresh(self, task: int, stop: threading.Event) -> None:
        while not stop.wait(min(self._lease / 6, 5.0)):
            from multiprocessing import parent_process  # imported late, because short tasks never need it

            if (parent := parent_process()) is not None and not parent.is_alive():
                os._exit(1)  # the build of this worker has ended, and may have been started again
            try:
                os.utime(self._claim_file(task))
            except FileNotFoundError:
                return

    def _claim_file(self, task: int) -> Path:
        return self._claims / f"{task:06d}"


def work_off(
    tasks: Tasks,
    begin: Callable[[int, Path], Doing],
    worker: int,
    workers: int,
    report: Report,
    watch: Callable[[list[int]], None] = lambda left: None,
) -> None:
    """Do this worker's share of tasks, then tasks that others have not begun, then tasks of lost workers.

    Returns when every task is done, by this worker or another. `watch` regularly receives the tasks that are left.
    """
    mine = share(tasks.sizes, workers)[worker]
    looks, wait = 0, _LEAST_WAIT
    try:
        while left := tasks.unfinished():
            watch(left)
            waiting = set(left)
            first = (len(left) * worker // workers + looks * _TRIES) % len(left)  # so that workers try different tasks
            others = (left[first:] + left[:first])[:_TRIES]
            task = next(tasks.free([task for task in mine if task in waiting] + others), None)
            if task is not None:
                tasks.perform(task, begin, report)
                looks, wait = 0, _LEAST_WAIT
            else:
                time.sleep(wait)
                looks, wait = looks + 1, min(2 * wait, _MOST_WAIT)
    except FileNotFoundError:
        if tasks.journals.folder.is_dir():  # otherwise rank 0 has found everything done and has renamed the folder
            raise
