"""What a run can be taken up from: saved while it trains, taken up when it starts.

Saving is in two halves. Training stops for the first, which copies this rank's tensors to the host. The second
writes, syncs, hashes, waits for the other ranks and seals; with `checkpoint.asynchronous` it runs on a thread while
training goes on. Its collectives have a gloo group of their own, so that they cannot mix with those of training.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ponder_scale import figures
from ponder_scale.checkpoint import save as checkpoint
from ponder_scale.checkpoint.index import INDEX, part_files, read_index
from ponder_scale.checkpoint.parts import (
    WEIGHT,
    Parts,
    Table,
    part_name,
    read_table,
    shares,
    write_part,
)
from ponder_scale.checkpoint.save import Index, Ranks, Retention, average_since
from ponder_scale.config import RunConfig
from ponder_scale.data.loader import Loader
from ponder_scale.errors import CheckpointError, FencedError, SaveError
from ponder_scale.runs import attempts
from ponder_scale.settings import to_dict
from ponder_scale.train.changes import Change, between
from ponder_scale.train.measure.work import Work
from ponder_scale.train.survive.health import Health
from ponder_scale.train.zero.engine import Engine, code_commit, versions

logger = logging.getLogger(__name__)

FAILURES = 3  # saves in a row that may fail before the run stops: a full disk is often noticed and cleared in time
SLOWEST_SAVE = timedelta(hours=3)  # how long one rank may write before the others give it up


class RunState:
    """Saves and resumes a run. Collective, except for `record`.

    Args:
        model_values: of the transformers configuration, as JSON gives them back.
        tokenizer: folder with its files, copied into each checkpoint.
        alive: called while a load, or a save that training waits for, makes progress.
    """

    def __init__(
        self,
        config: RunConfig,
        model_values: dict[str, Any],
        tokenizer: Path,
        engine: Engine,
        loader: Loader,
        health: Health,
        work: Work,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._run_dir = config, Path(config.run_dir)
        self._model_values, self._tokenizer = model_values, tokenizer
        self._engine, self._loader, self._health = engine, loader, health
        self._work = work
        self._alive = alive
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_SAVE)
        self._ranks = Ranks(engine.rank, engine.world_size, self._gather, alive)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._saving: _Saving | None = None
        self.attempt = 0
        self.changes: list[Change] = []  # of this attempt against the checkpoint that it went on from
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._failures: list[SaveError] = []  # in a row
        self.save_seconds = 0.0  # what the slowest save has taken from beginning to end, for those who must end in time
        self.record: Callable[..., None] = lambda event, step, **values: None  # where an event goes, on rank 0

    def resume(self) -> int:
        """Load the newest whole checkpoint, take the run over, and return the step that is done; 0 at the beginning.

        Ranks, ZeRO stage and micro-batch may be others than it was saved with.

        Raises:
            CheckpointError: there are checkpoints and none is whole, or it is of another model, optimizer or precision.
        """
        newest = checkpoint.newest_whole(self._run_dir, logger.warning, self._ranks)
        step = 0 if newest is None else self._load(newest)
        if self._engine.rank == 0:
            facts = {"hosts": self._hosts(), "world_size": self._engine.world_size, "first_step": step + 1}
            facts["changed"] = {change.key: [change.before, change.after] for change in self.changes}
            self.attempt = attempts.claim(self._run_dir, **facts, resumed_from=newest and newest.name)
        else:
            self._hosts()
        self.attempt = self._gather(self.attempt)[0]
        return self._goes_on_from(step)

    def check_owned(self) -> None:
        """Raise FencedError where another process has taken the run over."""
        attempts.check_owned(self._run_dir, self.attempt)

    def due(self, step: int) -> str | None:
        """Why the settings ask for a save after this step, or None. The last step is always saved."""
        settings = self._config.checkpoint
        if step == self._config.train.steps:
            return "last step"
        if settings.every_steps is not None and step % settings.every_steps == 0:
            return "schedule"
        if step in settings.milestones:
            return "milestone"
        return None

    def late(self) -> bool:
        """Whether this rank's clock asks for a save; rank 0's counts."""
        every = self._config.checkpoint.every_minutes
        return every is not None and time.monotonic() - self._saved_at >= 60 * every

    def save(self, step: int, reason: str = "schedule") -> None:
        """Save a checkpoint of this step; `reason` is for the log. A failure is told, and the next save tries again.

        Raises:
            SaveError: it failed, and so many before it.
            FencedError: another process has taken the run over.
        """
        self.finish()
        if step == self._saved_step:
            return
        began = time.monotonic()
        asynchronous = self._config.checkpoint.asynchronous
        tensors = self._engine.partition.tensors(copy=asynchronous)
        metadata, state = self._metadata(), self._state(step)

        def write(folder: Path) -> Index:
            return self._write_part(folder, tensors, metadata, (lambda: None) if asynchronous else self._alive)

        copied = time.monotonic()
        job = self._thread.submit(self._write, step, state, write)
        self._saving = _Saving(step, reason, job, began, copied)
        self._saved_at = copied
        if not asynchronous:
            self.finish()

    def trial(self) -> int:
        """Save all that the first save will, at its full size, and delete it again; the bytes of the ranks' parts.

        Raises:
            SaveError: it failed.
        """
        tensors, sizes = _at_full_size(self._engine.partition.tensors(copy=False)), [0]

        def write(folder: Path) -> Index:
            index = self._write_part(folder, tensors, self._metadata(), self._alive)
            sizes[:] = [size for size, _ in index.values()]
            return index

        checkpoint.save(
            self._run_dir,
            0,
            self._state(0),
            write,
            tokenizer=self._tokenizer,
            ranks=self._ranks,
            check_owned=self.check_owned,
            trial=True,
        )
        return sum(self._gather(sizes[0]))

    def poll(self) -> None:
        """Between steps: record a save that has ended since. It does not wait."""
        saving = self._saving
        if saving is None or not saving.job.done():
            return
        error = saving.job.exception()
        if isinstance(error, FencedError):
            raise error
        if isinstance(error, SaveError):  # what follows from it is decided where all ranks look, in `finish`
            self._tell(saving, error)
        elif error is None:
            self._record(saving)

    def finish(self) -> None:
        """Wait for the save under way, if there is one. Raises as `save` does."""
        saving = self._saving
        if saving is None:
            return
        waited = time.monotonic()
        try:
            saving.job.result()
        except SaveError as error:
            self._failures.append(error)
            self._tell(saving, error)
            if len(self._failures) >= FAILURES:
                raise self._failed() from error
        else:
            self._failures, self._saved_step = [], saving.step
            saving.waited = time.monotonic() - waited
            self._record(saving)
        finally:
            self._saving = None

    def abandon(self) -> None:
        """Before an error ends the run: wait for the save under way, so that it is whole; what it raises is told."""
        try:
            self.finish()
        except Exception as error:  # such as that of a group whose other ranks are gone
            logger.error("%s", error)

    def close(self) -> None:
        """Finish and end the thread. Raises SaveError if the last save failed: nobody will try again."""
        self.finish()
        self._thread.shutdown()
        if self._failures:
            raise self._failed()

    def _goes_on_from(self, step: int) -> int:
        self._saved_step, self._saved_at = step, time.monotonic()
        if self._engine.rank == 0:
            for folder in checkpoint.set_aside(self._run_dir, step):
                logger.warning("put aside %s, of later steps than the run goes on from; look at it, delete it", folder)
        return step

    def _write(self, step: int, state: dict[str, Any], write: Callable[[Path], Index]) -> tuple[Path, float]:
        """The second half of a save; its folder and seconds."""
        began = time.monotonic()
        settings = self._config.checkpoint
        folder = checkpoint.save(
            self._run_dir,
            step,
            state,
            write,
            tokenizer=self._tokenizer,
            ranks=self._ranks,
            retention=Retention(settings.keep, settings.keep_every, settings.milestones),
            check_owned=self.check_owned,
        )
        return folder, time.monotonic() - began

    def _write_part(
        self, folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], alive: Callable[[], None]
    ) -> Index:
        name = part_name(self._engine.rank)
        return {name: write_part(folder / name, tensors, metadata, alive)}

    def _metadata(self) -> dict[str, Any]:
        return {"begins": self._engine.partition.begins()}

    def _tell(self, saving: _Saving, error: SaveError) -> None:
        if saving.recorded or self._engine.rank != 0:  # every rank has the same error
            return
        saving.recorded = True
        self.record("alarm", saving.step, kind="save failed", message=str(error))
        logger.error("%s; %s; the next save tries again", error, error.remedy)

    def _record(self, saving: _Saving) -> None:
        if saving.recorded or self._engine.rank != 0:  # only rank 0 looks at the clock and keeps the record
            return
        saving.recorded = True
        folder, seconds = saving.job.result()
        self.save_seconds = max(self.save_seconds, saving.copied - saving.began + seconds)
        size = sum(size for size, _ in read_index(folder).values()) + (folder / INDEX).stat().st_size
        stall = saving.copied - saving.began + saving.waited
        self.record("save", saving.step, reason=saving.reason, stall_seconds=stall, write_seconds=seconds, bytes=size)
        logger.info(
            "saved %s (%s): %s, training waited %.2f s, writing took %.2f s",
            *(folder.name, saving.reason, figures.size(size), stall, seconds),
        )

    def _state(self, step: int) -> dict[str, Any]:
        """Contents of state.json. Learning rate and pondering steps are not in it: functions of step and seed."""
        engine = self._engine
        return {
            "step": step,
            "tokens": self._work.tokens,
            "done": self._work.state(),
            "attempt": self.attempt,
            "loader": self._loader.state(),
            "health": self._health.state(),
            "optimizer": {"name": engine.optimizer_name, "scalars": engine.partition.scalars()},
            "model": self._model_values,
            "parameters": engine.partition.shapes(),
            "average": None if engine.average_since is None else {"first_step": engine.average_since},
            "zero_stage": engine.zero_stage,
            **self._circumstances(),
        }

    def _circumstances(self) -> dict[str, Any]:
        """What may be otherwise when the run goes on, and is then told."""
        return {
            "config": to_dict(self._config),
            "sharding": self._engine.sharding,
            "world_size": self._engine.world_size,
            "versions": versions(),
            "commit": code_commit(),
        }

    def _load(self, newest: Path) -> int:
        state = checkpoint.read_state(newest)
        self._check(newest, state)
        engine = self._engine
        layout = (state["world_size"], state["zero_stage"])
        same = layout == (engine.world_size, engine.zero_stage)
        scalars = state["optimizer"]["scalars"]
        engine.restore(self._parts(newest, same), scalars, average_since(state), self._alive)
        self._loader.restore(state["loader"])
        self._health.restore(state["health"])
        if "done" in state:
            self._work.restore(state["done"])
        else:
            self._work.estimate(state, self._loader.taken)
            logger.info(
                "%s does not say what the run had done: %s tokens by its loader, FLOPs by its own recipe",
                *(newest, f"{self._work.tokens:,}"),
            )
        logger.info("going on from %s", newest)
        logger.info("attempt %d saved it", state["attempt"])
        if not same:
            logger.info(
                "it was saved by %d ranks under ZeRO-%d; %d ranks under ZeRO-%d take what they need of it",
                *(*layout, engine.world_size, engine.zero_stage),
            )
        self.changes = between(state, self._circumstances())
        for change in self.changes:
            logger.info("%s", change.sentence(state["step"] + 1))
        return state["step"]

    def _parts(self, newest: Path, same: bool) -> Parts:
        """What this rank reads: its own file if that is enough for every rank, else what it needs of all."""
        if same:
            own = Parts(newest, [part_name(self._engine.rank)])
            if all(self._gather(self._engine.partition.is_in(own))):
                return own
        return Parts(newest, table=self._needed(newest))

    def _needed(self, newest: Path) -> Table:
        """Where the elements that this rank keeps are. Collective: each header is read by one rank.

        Rank 0 puts the tables together and gives to each rank what it needs: the whole grows with the ranks that
        saved times the parameters, and nobody else has to hold it.
        """
        found, error = {}, None
        try:
            found = read_table(newest, part_files(newest)[self._engine.rank :: self._engine.world_size])
        except CheckpointError as problem:
            error = str(problem)
        answers: list[Any] | None = [None] * self._engine.world_size if self._engine.rank == 0 else None
        dist.gather_object((found, error, self._engine.partition.needs()), answers, dst=0, group=self._group)
        given: list[Any] | None = None
        if answers is not None:
            given = shares(newest, answers)
        box: list[Any] = [None]
        dist.scatter_object_list(box, given, src=0, group=self._group)
        table, error = box[0]
        if error is not None:
            raise CheckpointError(error)
        return table

    def _check(self, newest: Path, state: dict[str, Any]) -> None:
        for key, saved in state["model"].items():
            value = self._model_values.get(key, saved)
            if saved != value and key not in ("transformers_version", "dtype", "torch_dtype"):
                raise CheckpointError(
                    f"checkpoint {newest}: its model has {key} {saved}, this run {value}; "
                    "use another run_dir, or the same model"
                )
        for key, saved, value in (
            ("optimizer", state["optimizer"]["name"], self._engine.optimizer_name),
            ("train.precision", state["config"]["train"]["precision"], self._config.train.precision),
        ):
            if saved != value:
                raise CheckpointError(
                    f"checkpoint {newest}: saved with {key} {saved}, this run has {value}; use the same"
                )

    def _failed(self) -> SaveError:
        before, last = "nothing is saved yet", self._failures[-1]
        if self._saved_step:
            before = f"step {self._saved_step} is saved"
        return SaveError(f"{last}; {before}; {last.remedy}, and start again", last.remedy)

    def _hosts(self) -> list[str]:
        return sorted(set(self._gather(socket.gethostname())))

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._engine.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _at_full_size(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With stand-ins for the two moments where the optimizer makes them at its first update."""
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{WEIGHT}/")}
    if len(weights) < len(tensors):
        return tensors
    return tensors | {f"moment {number}/{name}": tensor for number in (1, 2) for name, tensor in weights.items()}


@dataclass
class _Saving:
    """A save under way. Times are monotonic seconds."""

    step: int
    reason: str
    job: Future[tuple[Path, float]]
    began: float
    copied: float
    waited: float = 0.0
    recorded: bool = False
