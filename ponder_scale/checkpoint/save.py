"""Checkpoints of a run: whole or not there.

    RUN/checkpoints/step-00000300/
        rank-00000.safetensors  weights and optimizer states that rank 0 kept; see parts.py
        tokenizer/              as in the shards
        state.json              step, loader state, configuration of run and model, versions
        checkpoint.json         size and hash of each file above; written last
    RUN/latest                  name of the newest folder

A save goes to a hidden folder, is synced and hashed by all ranks, gets its index when every rank has told that it is
done, and only then its name; `latest` moves last. Nothing in it is pickled.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ponder_scale.checkpoint.index import FORMAT, INDEX, TOKENIZER, Index, checksum, read_index, strangers
from ponder_scale.errors import CheckpointError, FencedError, SaveError
from ponder_scale.files.delete import copy_folder, delete_folder
from ponder_scale.files.links import check_links
from ponder_scale.shards.manifest import hash_file, sync, sync_file, sync_folder

CHECKPOINTS, LATEST, STATE = "checkpoints", "latest", "state.json"
SAVING, ASIDE = ".saving-", "aside-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """What saving needs of the process group; the default is a group of one."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # each rank's value, on all ranks; collective
    alive: Callable[[], None] = lambda: None  # called while much is read


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept besides the newest `last`; None keeps all."""

    last: int | None = None
    every: int | None = None
    milestones: Collection[int] = ()

    def doomed(self, steps: Collection[int]) -> list[int]:
        """Those of the saved steps that are to be deleted, oldest first."""
        if self.last is None:
            return []
        older = sorted(steps)[: -self.last]
        return [step for step in older if step not in self.milestones and not (self.every and step % self.every == 0)]


def save(
    run_dir: Path,
    step: int,
    state: Mapping[str, Any],
    write: Callable[[Path], Index],
    *,
    tokenizer: Path,
    ranks: Ranks,
    retention: Retention = Retention(),
    check_owned: Callable[[], None] = lambda: None,
    trial: bool = False,
) -> Path:
    """Save a checkpoint and return its folder. Collective: every rank calls it, on whichever thread.

    Args:
        state: goes to state.json, from rank 0.
        write: writes and syncs this rank's files in the folder it is given, and returns their sizes and hashes.
        check_owned: raises FencedError when another process has taken the run over; asked before anything is
            written, named or deleted, and again when that fails, as it does in a folder the other has cleared.
        trial: do all that a save does, but delete it instead of giving it its name.

    Raises:
        SaveError: on every rank, if any rank failed. What was there before is as it was; the remains are deleted.
        FencedError: on every rank.
    """
    final = _folder(run_dir, step).with_name(SAVING + "trial") if trial else _folder(run_dir, step)
    saving = final.with_name(SAVING + final.name)

    def begin() -> Index:
        for remains in final.parent.glob(SAVING + "*"):
            delete_folder(remains)
        saving.mkdir(parents=True)
        check_links(tokenizer)
        copy_folder(tokenizer, saving / TOKENIZER)
        _write_json(saving / STATE, state)
        return _index_shared(saving)

    def end() -> Index:
        _seal(saving, final, index)
        if trial:
            delete_folder(final)
            return {}
        for after in (lambda: _replace(run_dir / LATEST, final.name + "\n"), lambda: _delete_older(run_dir, retention)):
            check_owned()
            try:
                after()
            except OSError as error:  # it is saved all the same
                logger.warning("%s is saved, but %s", final, error)
        return {}

    def together(action: Callable[[], Index]) -> list[Index]:
        return _together(lambda: _owned(action, check_owned), saving, step, ranks)

    first = ranks.rank == 0
    shared = together(begin if first else dict)
    own = together(lambda: write(saving))
    index = {name: entry for part in (*shared, *own) for name, entry in part.items()}
    together(end if first else dict)
    return final


def newest_whole(run_dir: Path, report: Callable[[str], None], ranks: Ranks = Ranks()) -> Path | None:
    """The newest checkpoint of a run that is whole, or None where nothing was saved yet. Collective.

    Each rank reads its share of the files. Damaged checkpoints are passed over; `report` is told of each on rank 0.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    problems = []
    # one rank looks: of a folder that many list at once each sees what the file system has for it
    listed = sorted(saved_steps(run_dir).values(), reverse=True) if ranks.rank == 0 else []
    folders = ranks.gather(listed)[0]
    for folder in folders:
        findings = [finding for part in ranks.gather(verify(folder, ranks)) for finding in part]
        if not findings:
            return folder
        problems.append(f"checkpoint {folder} is damaged ({findings[0]})")
        if ranks.rank == 0:
            report(f"{problems[-1]}; trying the one before")
    if problems:
        raise CheckpointError(
            f"{run_dir}: no whole checkpoint in it; {'; '.join(problems)}; "
            f"put one back from a copy, or move {CHECKPOINTS}/ away to begin anew"
        )
    return None


def saved_steps(run_dir: Path) -> dict[int, Path]:
    """The checkpoint folders of a run, whole or not, by their step."""
    folders = (run_dir / CHECKPOINTS).glob("step-*")
    return {int(folder.name[5:]): folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name)}


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Take away their names from checkpoints after `step`: damaged ones that a run went back behind.

    They would count as its newest. They are left for a person to look at, or to delete, under the names returned.
    """
    moved = []
    for later, folder in sorted(saved_steps(run_dir).items()):
        if later > step:
            aside = folder.with_name(ASIDE + folder.name)
            delete_folder(aside)
            moved.append(folder.rename(aside))
    if moved:
        _replace(run_dir / LATEST, _folder(run_dir, step).name + "\n")
    return moved


def verify(folder: Path, ranks: Ranks = Ranks()) -> list[str]:
    """Read and hash this rank's share of the files: a line for each that is not as it was saved, or was not saved."""
    try:
        index = read_index(folder)
        added = strangers(folder, index) if ranks.rank == 0 else []
    except (CheckpointError, OSError) as error:
        return [str(error)]
    shares = sorted(index.items())[ranks.rank :: ranks.world_size]
    findings = []
    for name, (size, digest) in shares:
        ranks.alive()
        findings += [finding] if (finding := _finding(folder / name, name, size, digest)) else []
    return findings + [f"{name} is not in {INDEX}: it was put there after the save; move it away" for name in added]


def _finding(path: Path, name: str, size: int, digest: str) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, {size:,} were saved"
        return None if hash_file(path) == digest else f"{name}: its hash differs from the saved one"
    except OSError as error:
        return f"{name}: {error}"


def find(path: Path) -> Path:
    """The checkpoint folder that `path` is, or the newest whole one of the run that it is; every byte is verified.

    Raises:
        CheckpointError: neither, or the checkpoint is not as it was saved.
    """
    if (path / INDEX).is_file():
        check(path)
        return path
    if (path / CHECKPOINTS).is_dir():
        newest = newest_whole(path, logger.warning)
        if newest is not None:
            return newest
        raise CheckpointError(f"{path}: no whole checkpoint in it; none was saved yet")
    raise CheckpointError(f"{path}: expected a run folder (with {CHECKPOINTS}/) or a checkpoint (with {INDEX})")


def check(folder: Path) -> None:
    """Read and hash a whole checkpoint. Raises CheckpointError where it is not as it was saved."""
    findings = verify(folder)
    if findings:
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise CheckpointError(
            f"checkpoint {folder} is damaged ({findings[0]}{more}); put it back from a copy, or take another one"
        )


def read_state(folder: Path, *keys: str) -> dict[str, Any]:
    """The contents of state.json. Raises CheckpointError where it cannot be read, or has not all of `keys`."""
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    missing = list(keys) if not isinstance(state, dict) else [key for key in keys if key not in state]
    if missing or not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: no {', '.join(missing) or 'keys'} in it; the checkpoint is of another program or version"
        )
    return state


def average_since(state: Mapping[str, Any]) -> int | None:
    """The first step of the running average of the weights that a checkpoint has; None: it has none.

    Args:
        state: its state.json.
    """
    if "average" in state:
        return state["average"] and state["average"]["first_step"]
    # of an older version, which began with the run and saved a frozen average on where optim.ema had been switched off
    return None if state["config"]["optim"].get("ema") is None else 1


def _owned(action: Callable[[], Index], check_owned: Callable[[], None]) -> Index:
    check_owned()
    try:
        return action()
    except Exception:
        check_owned()
        raise


def _together(action: Callable[[], Any], saving: Path, step: int, ranks: Ranks) -> list[Any]:
    """What the action returned on each rank. If it failed on one, all raise, and the remains are deleted."""
    result: Any = None
    failure: str | None = None
    remedy, fenced = "", False
    try:
        result = action()
    except FencedError as error:
        failure, fenced = str(error), True
    except Exception as error:  # whatever it is, the others must hear of it, or they would wait for ever
        failure, remedy = f"{type(error).__name__}: {error}", _remedy(error, saving.parents[1])
    outcomes = ranks.gather((result, failure, fenced, remedy))
    failures = {rank: outcome[1] for rank, outcome in enumerate(outcomes) if outcome[1] is not None}
    if not failures:
        return [outcome[0] for outcome in outcomes]
    rank, reason = next(iter(failures.items()))
    if any(outcome[2] for outcome in outcomes):
        raise FencedError(reason)
    if ranks.rank == 0:
        delete_folder(saving)  # on a full disk its room is needed
    more = f" and {len(failures) - 1} more ranks" if len(failures) > 1 else ""
    raise SaveError(f"the checkpoint of step {step} could not be saved: rank {rank}{more}: {reason}", outcomes[rank][3])


def _remedy(error: Exception, run_dir: Path) -> str:
    """What a person can do about a save that failed by this error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"free space on the disk of {run_dir} or lower checkpoint.keep"
    if number in (errno.EACCES, errno.EPERM):
        return f"space is not the cause: give the user of the run, number {os.geteuid()}, permission for that"
    if number == errno.EROFS:
        return f"space is not the cause: {run_dir} is on a read-only file system; have it mounted for writing"
    return f"see to that; look at the disk of {run_dir}"


def _index_shared(saving: Path) -> Index:
    """Sync and hash the files that belong to no rank."""
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
    saving.rename(final)  # fails where another process has given the name, whose folder is never replaced
    sync_folder(final.parent)


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def _delete_older(run_dir: Path, retention: Retention) -> None:
    folders = saved_steps(run_dir)
    for step in retention.doomed(folders):
        _delete(folders[step])


def _delete(folder: Path) -> None:
    doomed = folder.with_name(f"{SAVING}old-{folder.name}")  # so that it never looks whole while it goes
    delete_folder(doomed)
    folder.rename(doomed)
    delete_folder(doomed)


def _write_json(path: Path, content: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
        sync(stream)


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(content)
        sync(stream)
    temporary.replace(path)
    sync_folder(path.parent)
