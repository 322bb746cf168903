"""Save a checkpoint, so that it is either whole or not there.

All ranks write to a hidden folder, and sync and hash their files. When every rank has said that it is done, the folder
gets its index and only then its name. `latest` changes last. Nothing is pickled. index.py describes the files.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor

from ponder_scale.checkpoint.find import Ranks
from ponder_scale.checkpoint.index import (
    CHECKPOINTS,
    FORMAT,
    INDEX,
    LATEST,
    SAVING,
    STATE,
    TOKENIZER,
    Index,
    checksum,
    is_part,
    made,
    saved_steps,
    step_folder,
)
from ponder_scale.checkpoint.parts import part_name, write_part
from ponder_scale.errors import ConfigError, FencedError, SaveError
from ponder_scale.files.delete import check_ours, delete_made
from ponder_scale.files.links import check_links
from ponder_scale.files.write import copy_folder, hash_file, sync, sync_file, sync_folder, write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """The checkpoints to keep besides the newest `last`. None keeps all."""

    last: int | None = None
    every: int | None = None
    milestones: Collection[int] = ()

    def doomed(self, steps: Collection[int]) -> list[int]:
        """The saved steps to delete, oldest first."""
        if self.last is None:
            return []
        older = sorted(steps)[: -self.last]
        return [step for step in older if step not in self.milestones and not (self.every and step % self.every == 0)]


class Part(NamedTuple):
    """One rank's part of a checkpoint: tensors (n,) by `KIND/NAME`, and the metadata of their file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


class Saver:
    """Saves the checkpoints of a run. Collective: every rank calls it, on any thread.

    Args:
        tokenizer: folder whose files are copied into each checkpoint.
        check_owned: raises FencedError if another process has taken the run over. It is called before anything is
            written, named or deleted. It is called again when that fails, because the other process may have cleared
            the folder.
    """

    def __init__(
        self,
        run_dir: Path,
        tokenizer: Path,
        *,
        ranks: Ranks,
        retention: Retention = Retention(),
        check_owned: Callable[[], None] = lambda: None,
    ) -> None:
        self._run_dir, self._tokenizer, self._ranks = run_dir, tokenizer, ranks
        self._retention, self._check_owned = retention, check_owned

    def save(self, step: int, state: Mapping[str, Any], part: Part, alive: Callable[[], None] = lambda: None) -> Path:
        """Save a checkpoint, delete those that the retention does not keep, and return its folder.

        Args:
            state: contents of state.json. Those of rank 0 are written.
            alive: called while the part of this rank is written.

        Raises:
            SaveError: a rank failed. Raised on every rank. Earlier checkpoints are as before, and the remains are
                deleted.
            FencedError: another process has taken the run over. Raised on every rank.
        """
        final = step_folder(self._run_dir, step)
        index = self._fill(final, step, state, part, alive)
        self._on_first(lambda: self._name(final, index), final, step)
        return final

    def trial(self, state: Mapping[str, Any], part: Part, alive: Callable[[], None] = lambda: None) -> int:
        """Do everything that a save does, but delete the checkpoint at the end. Returns the bytes of all parts.

        Raises like `save`.
        """
        final = self._run_dir / CHECKPOINTS / (SAVING + "trial")
        index = self._fill(final, 0, state, part, alive)

        def end() -> None:
            _seal(_hidden(final), final, index)
            _sweep(final)

        self._on_first(end, final, 0)
        return sum(size for name, (size, _) in index.items() if is_part(name))

    def _fill(self, final: Path, step: int, state: Mapping[str, Any], part: Part, alive: Callable[[], None]) -> Index:
        """Write everything except the index into the hidden folder of `final`. Returns what the index will list."""
        saving = _hidden(final)

        def begin() -> Index:
            for remains in saving.parent.glob(SAVING + "*"):
                _sweep(remains)
            saving.mkdir(parents=True)
            check_links(self._tokenizer)
            copy_folder(self._tokenizer, saving / TOKENIZER)
            _write_json(saving / STATE, state)
            return _index_shared(saving)

        def write() -> Index:
            name = part_name(self._ranks.rank)
            return {name: write_part(saving / name, part.tensors, part.metadata, alive)}

        shared = self._on_first(begin, final, step)
        own = self._together(write, final, step)
        return {name: entry for found in (shared, *own) for name, entry in found.items()}

    def _name(self, final: Path, index: Index) -> None:
        _seal(_hidden(final), final, index)
        afterwards: list[Callable[[], None]] = [
            lambda: write_whole(self._run_dir / LATEST, final.name + "\n"),
            lambda: _delete_older(self._run_dir, self._retention),
        ]
        for after in afterwards:
            self._check_owned()
            try:
                after()
            except OSError as error:  # the checkpoint itself is saved
                logger.warning("%s is saved, but %s", final, error)

    def _on_first(self, action: Callable[[], Any], final: Path, step: int) -> Any:
        """Run the action on rank 0 and return its result on all ranks. Raises like `_together`."""
        return self._together(action if self._ranks.rank == 0 else lambda: None, final, step)[0]

    def _together(self, action: Callable[[], Any], final: Path, step: int) -> list[Any]:
        """Run the action on all ranks and return all results. If one fails, all raise, and the remains are deleted."""
        result: Any = None
        failure: str | None = None
        remedy, fenced = "", False
        try:
            result = self._owned(action)
        except FencedError as error:
            failure, fenced = str(error), True
        except Exception as error:  # the other ranks must hear of every error, or they would wait forever
            failure, remedy = f"{type(error).__name__}: {error}", _remedy(error, self._run_dir)
        outcomes = self._ranks.gather((result, failure, fenced, remedy))
        failures = {rank: outcome[1] for rank, outcome in enumerate(outcomes) if outcome[1] is not None}
        if not failures:
            return [outcome[0] for outcome in outcomes]
        rank, reason = next(iter(failures.items()))
        if any(outcome[2] for outcome in outcomes):
            raise FencedError(reason)
        if self._ranks.rank == 0:
            _sweep(_hidden(final))  # on a full disk, the next save needs its room
        more = f" and {len(failures) - 1} more ranks" if len(failures) > 1 else ""
        raise SaveError(
            f"the checkpoint of step {step} could not be saved: rank {rank}{more}: {reason}", outcomes[rank][3]
        )

    def _owned(self, action: Callable[[], Any]) -> Any:
        self._check_owned()
        try:
            return action()
        except Exception:
            self._check_owned()
            raise


def _hidden(final: Path) -> Path:
    return final.with_name(SAVING + final.name)


def _remedy(error: Exception, run_dir: Path) -> str:
    """What you can do about a save that failed with this error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"free space on the disk of {run_dir} or lower checkpoint.keep"
    if number in (errno.EACCES, errno.EPERM):
        return f"space is not the cause; give the user of the run (uid {os.geteuid()}) that permission"
    if number == errno.EROFS:
        return f"space is not the cause; have the read-only file system of {run_dir} mounted for writing"
    return f"check the disk of {run_dir}"


def _index_shared(saving: Path) -> Index:
    """Sync and hash the files that do not belong to a rank."""
    index = {}
    for path in sorted(path for path in saving.rglob("*") if path.is_file()):
        sync_file(path)
        index[path.relative_to(saving).as_posix()] = (path.stat().st_size, hash_file(path))
    return index


def _seal(saving: Path, final: Path, index: Index) -> None:
    files = {name: list(entry) for name, entry in sorted(index.items())}
    _write_json(saving / INDEX, {"format": FORMAT, "files": files, "checksum": checksum(files)})
    names = [PurePosixPath(name) for name in index]
    for folder in sorted({parent for name in names for parent in name.parents}):
        sync_folder(saving / folder)
    saving.rename(final)  # fails if another process has made a folder of this name, which is never replaced
    sync_folder(final.parent)


def _delete_older(run_dir: Path, retention: Retention) -> None:
    folders = saved_steps(run_dir)
    for step in retention.doomed(folders):
        folder = folders[step]
        doomed = folder.with_name(f"{SAVING}old-{folder.name}")  # so that it never looks whole while it is deleted
        try:
            check_ours(folder, made(folder), proven=lambda _: True)
        except ConfigError as error:
            logger.warning("checkpoint.keep would delete a checkpoint, but it is kept: %s", error)
            continue
        folder.rename(doomed)
        _sweep(doomed)


def _sweep(folder: Path) -> None:
    """Delete a folder that is not, or no longer, a checkpoint. Files that no save wrote are left."""
    try:
        delete_made(folder, made(folder), last=INDEX)
    except FileNotFoundError:
        pass
    except (ConfigError, OSError) as error:
        logger.warning("the remains of a save were not deleted: %s", error)


def _write_json(path: Path, content: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
        sync(stream)
