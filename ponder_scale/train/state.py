"""Save checkpoints while a run trains.

A save has two halves. Training stops for the first, which copies this rank's tensors to the host. The second writes,
syncs, hashes, waits for the other ranks and seals the checkpoint. With `checkpoint.asynchronous` the second half runs
on a thread while training continues. Its collectives use a separate gloo group, so they cannot mix with those of
training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ponder_scale import figures
from ponder_scale.checkpoint.find import Ranks
from ponder_scale.checkpoint.index import INDEX, read_index
from ponder_scale.checkpoint.save import Part, Retention, Saver
from ponder_scale.errors import FencedError, SaveError
from ponder_scale.runs.attempts import Attempt
from ponder_scale.train.contents import Contents

logger = logging.getLogger(__name__)

# The run stops when this number of saves in a row has failed. A full disk is often noticed and cleared before that.
FAILURES = 3


class RunState:
    """Saves a run. Collective, except for `late` and `poll`.

    Args:
        tokenizer: folder whose files are copied into each checkpoint.
        ranks: the group that is used for saving only. `alive` is called while training waits for a save.
        start_step: the step that is already saved, or 0.
        record: called on rank 0 for each save and each failure, with the event, the step and values.
    """

    def __init__(
        self,
        contents: Contents,
        tokenizer: Path,
        ranks: Ranks,
        attempt: Attempt,
        *,
        start_step: int,
        record: Callable[..., None],
    ) -> None:
        settings, run_dir = contents.config.checkpoint, Path(contents.config.run_dir)
        self._contents, self._settings, self._steps = contents, settings, contents.config.train.steps
        self._ranks, self._attempt, self._record_event = ranks, attempt, record
        retention = Retention(settings.keep, settings.keep_every, settings.milestones)
        self._saver = Saver(run_dir, tokenizer, ranks=ranks, retention=retention, check_owned=attempt.check_owned)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._saving: _Saving | None = None
        self._saved_step = start_step
        self._saved_at = time.monotonic()
        self._failures: list[SaveError] = []  # in a row
        self.save_seconds = 0.0  # of the slowest save, from beginning to end; the time limit reserves this much

    def due(self, step: int) -> str | None:
        """The reason for a save after this step by the settings, or None. The last step is always saved."""
        settings = self._settings
        if step == self._steps:
            return "last step"
        if settings.every_steps is not None and step % settings.every_steps == 0:
            return "schedule"
        if step in settings.milestones:
            return "milestone"
        return None

    def late(self) -> bool:
        """Whether a save is due by this rank's clock. Only the clock of rank 0 counts."""
        every = self._settings.every_minutes
        return every is not None and time.monotonic() - self._saved_at >= 60 * every

    def save(self, step: int, reason: str = "schedule") -> None:
        """Save a checkpoint of this step. `reason` is for the log. A failure is logged, and the next save tries again.

        Raises:
            SaveError: `FAILURES` saves in a row have failed.
            FencedError: another process has taken the run over.
        """
        self.finish()
        if step == self._saved_step:
            return
        began = time.monotonic()
        asynchronous = self._settings.asynchronous
        part = self._contents.part(copy=asynchronous)
        state = self._contents.state(step, self._attempt.number)
        alive = (lambda: None) if asynchronous else self._ranks.alive
        copied = time.monotonic()
        job = self._thread.submit(self._write, step, state, part, alive)
        self._saving = _Saving(step, reason, job, began, copied)
        self._saved_at = copied
        if not asynchronous:
            self.finish()

    def trial(self) -> int:
        """Write a checkpoint of full size and delete it again. Returns the bytes of the ranks' parts.

        Raises:
            SaveError: it failed.
        """
        state = self._contents.state(0, self._attempt.number)
        return self._saver.trial(state, self._contents.part_at_full_size(), self._ranks.alive)

    def poll(self) -> None:
        """Record an asynchronous save that has ended. Called between steps, and does not wait."""
        saving = self._saving
        if saving is None or not saving.job.done():
            return
        error = saving.job.exception()
        if isinstance(error, FencedError):
            raise error
        if isinstance(error, SaveError):  # `finish`, which all ranks call at the same point, decides what follows
            self._tell(saving, error)
        elif error is None:
            self._record(saving)

    def finish(self) -> None:
        """Wait for the running save, if there is one. Raises like `save`."""
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
        """Wait for the running save before an error ends the run, so that the checkpoint is whole. Logs its errors."""
        try:
            self.finish()
        except Exception as error:  # for example, the other ranks of the group are gone
            logger.error("%s", error)

    def close(self) -> None:
        """Finish and end the thread. Raises SaveError if the last save failed, because no other save follows."""
        self.finish()
        self._thread.shutdown()
        if self._failures:
            raise self._failed()

    def _write(self, step: int, state: dict[str, Any], part: Part, alive: Callable[[], None]) -> tuple[Path, float]:
        """The second half of a save. Returns its folder and seconds."""
        began = time.monotonic()
        folder = self._saver.save(step, state, part, alive)
        return folder, time.monotonic() - began

    def _tell(self, saving: _Saving, error: SaveError) -> None:
        if saving.recorded or self._ranks.rank != 0:  # every rank has the same error
            return
        saving.recorded = True
        self._record_event("alarm", saving.step, kind="save failed", message=str(error))
        logger.error("%s; %s; the next save tries again", error, error.remedy)

    def _record(self, saving: _Saving) -> None:
        if saving.recorded or self._ranks.rank != 0:  # only rank 0 keeps the record
            return
        saving.recorded = True
        folder, seconds = saving.job.result()
        self.save_seconds = max(self.save_seconds, saving.copied - saving.began + seconds)
        size = sum(size for size, _ in read_index(folder).values()) + (folder / INDEX).stat().st_size
        stall = saving.copied - saving.began + saving.waited
        self._record_event(
            "save", saving.step, reason=saving.reason, stall_seconds=stall, write_seconds=seconds, bytes=size
        )
        logger.info(
            "saved %s (%s): %s, training waited %.2f s, writing took %.2f s",
            *(folder.name, saving.reason, figures.size(size), stall, seconds),
        )

    def _failed(self) -> SaveError:
        before, last = "nothing is saved yet", self._failures[-1]
        if self._saved_step:
            before = f"step {self._saved_step} is saved"
        return SaveError(f"{last}; {before}; {last.remedy}, and start again", last.remedy)


@dataclass
class _Saving:
    """A running save. Times are monotonic seconds."""

    step: int
    reason: str
    job: Future[tuple[Path, float]]
    began: float
    copied: float
    waited: float = 0.0
    recorded: bool = False
