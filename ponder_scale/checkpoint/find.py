"""Finding a checkpoint to read from: the newest whole one of a run, every byte of it verified."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ponder_scale.checkpoint.index import (
    ASIDE,
    CHECKPOINTS,
    INDEX,
    LATEST,
    STATE,
    read_index,
    saved_steps,
    step_name,
    strangers,
)
from ponder_scale.errors import CheckpointError
from ponder_scale.files.write import hash_file, write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """The processes that save or read a checkpoint together; the default is this one alone."""

    rank: int = 0
    world_size: int = 1
    group: Any = None  # of torch.distributed, by which they tell each other; None: that of the whole program
    alive: Callable[[], None] = lambda: None  # called while much is read

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, on all ranks. Collective."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values


def newest_whole(run_dir: Path, ranks: Ranks = Ranks()) -> Path | None:
    """The newest checkpoint of a run that is whole, or None where nothing was saved yet. Collective.

    Each rank reads its share of the files. Damaged checkpoints are passed over, with a warning on rank 0.

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
            logger.warning("%s; trying the one before", problems[-1])
    if problems:
        raise CheckpointError(
            f"{run_dir}: no whole checkpoint in it; {'; '.join(problems)}; "
            f"put one back from a copy, or move {CHECKPOINTS}/ away to begin anew"
        )
    return None


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Take away their names from checkpoints after `step`: damaged ones that a run went back behind.

    They would count as its newest. They are left for a person to look at, or to delete, under the names returned.
    """
    moved = []
    for later, folder in sorted(saved_steps(run_dir).items()):
        if later > step:
            aside = folder.with_name(ASIDE + folder.name)
            while aside.exists():  # an earlier one of this step, which somebody may not have looked at yet
                aside = aside.with_name(aside.name + "-again")
            moved.append(folder.rename(aside))
    if moved:
        write_whole(run_dir / LATEST, step_name(step) + "\n")
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
        newest = newest_whole(path)
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
