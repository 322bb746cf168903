"""Find the newest whole checkpoint of a run, and verify every byte of it."""

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
    """The processes that save or read a checkpoint together. The default is this process alone."""

    rank: int = 0
    world_size: int = 1
    group: Any = None  # process group of torch.distributed for their messages; None is the default group
    alive: Callable[[], None] = lambda: None  # called again and again while files are read

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, on all ranks. Collective."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values


def newest_whole(run_dir: Path, ranks: Ranks = Ranks()) -> Path | None:
    """The newest whole checkpoint of a run, or None if nothing was saved yet. Collective.

    Each rank reads its share of the files. Damaged checkpoints are skipped, with a warning on rank 0.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
    """
    problems = []
    # Only one rank lists the folder, because a shared file system may show different contents to different ranks.
    listed = sorted(saved_steps(run_dir).values(), reverse=True) if ranks.rank == 0 else []
    folders = ranks.gather(listed)[0]
    for folder in folders:
        findings = [finding for part in ranks.gather(verify(folder, ranks)) for finding in part]
        if not findings:
            return folder
        problems.append(f"checkpoint {folder} is damaged ({findings[0]})")
        if ranks.rank == 0:
            logger.warning("%s; trying the previous checkpoint", problems[-1])
    if problems:
        raise CheckpointError(
            f"{run_dir}: it has no whole checkpoint; {'; '.join(problems)}; "
            f"put one back from a copy, or move {CHECKPOINTS}/ away to start again from step 1"
        )
    return None


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`. They are damaged, and the run went back to one before them.

    Under their old names they would count as the newest. You can look at them, or delete them, under the new names,
    which are returned.
    """
    moved = []
    for later, folder in sorted(saved_steps(run_dir).items()):
        if later > step:
            aside = folder.with_name(ASIDE + folder.name)
            while aside.exists():  # an earlier one of this step, which you may not have looked at yet
                aside = aside.with_name(aside.name + "-again")
            moved.append(folder.rename(aside))
    if moved:
        write_whole(run_dir / LATEST, step_name(step) + "\n")
    return moved


def verify(folder: Path, ranks: Ranks = Ranks()) -> list[str]:
    """Read and hash this rank's share of the files. Returns a line for each file that was changed or not saved."""
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
    return findings + [f"{name} is not in {INDEX}, so it was added after the save; move it away" for name in added]


def _finding(path: Path, name: str, size: int, digest: str) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, but {size:,} were saved"
        return None if hash_file(path) == digest else f"{name}: its hash differs from the saved one"
    except OSError as error:
        return f"{name}: {error}"


def find(path: Path) -> Path:
    """The checkpoint at `path`, which is a checkpoint folder or a run with a whole one. Every byte is verified.

    Raises:
        CheckpointError: it is neither, or the checkpoint is not as it was saved.
    """
    if (path / INDEX).is_file():
        check(path)
        return path
    if (path / CHECKPOINTS).is_dir():
        newest = newest_whole(path)
        if newest is not None:
            return newest
        raise CheckpointError(f"{path}: no checkpoint has been saved in it yet")
    raise CheckpointError(f"{path}: expected a run folder (with {CHECKPOINTS}/) or a checkpoint (with {INDEX})")


def check(folder: Path) -> None:
    """Read and hash a whole checkpoint. Raises CheckpointError if it is not as it was saved."""
    findings = verify(folder)
    if findings:
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise CheckpointError(
            f"checkpoint {folder} is damaged ({findings[0]}{more}); put it back from a copy, or take another one"
        )


def read_state(folder: Path, *keys: str) -> dict[str, Any]:
    """The contents of state.json. Raises CheckpointError if it cannot be read, or lacks one of `keys`."""
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    missing = list(keys) if not isinstance(state, dict) else [key for key in keys if key not in state]
    if missing or not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: it has no {', '.join(missing) or 'keys'}; another program or version saved the checkpoint"
        )
    return state


def average_since(state: Mapping[str, Any]) -> int | None:
    """The first step of a checkpoint's running average of the weights, or None if it has no average.

    Args:
        state: contents of its state.json.
    """
    if "average" in state:
        return state["average"] and state["average"]["first_step"]
    # In an older version the average began with the run. If optim.ema was switched off, it was saved on, but frozen.
    return None if state["config"]["optim"].get("ema") is None else 1
