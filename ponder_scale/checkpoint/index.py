"""Where the checkpoints of a run are, and checkpoint.json: which files one has, and the size and hash of each.

    RUN/checkpoints/step-00000300/
        rank-00000.safetensors  weights and optimizer states that rank 0 kept; see parts.py
        tokenizer/              as in the shards
        state.json              step, loader state, configuration of run and model, versions
        checkpoint.json         size and hash of each file above
    RUN/latest                  name of the newest folder

checkpoint.json is written last, so a folder without it is unfinished. What is not in it is no part of the checkpoint:
readers find the parts here, never by looking into the folder. No torch here: login nodes look, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from ponder_scale.errors import CheckpointError

CHECKPOINTS, LATEST = "checkpoints", "latest"
INDEX, STATE, TOKENIZER = "checkpoint.json", "state.json", "tokenizer"
SAVING, ASIDE = ".saving-", "aside-"  # before the names of folders that are no checkpoints yet, or no more
FORMAT = 2
_PART = re.compile(r"rank-\d{5,}\.safetensors")

Index = dict[str, tuple[int, str]]  # size and hash of files, by their path in the checkpoint


def step_name(step: int) -> str:
    """The name of what belongs to a step: its checkpoint, its evidence."""
    return f"step-{step:08d}"


def step_folder(run_dir: Path, step: int) -> Path:
    """The checkpoint of a step, saved or not."""
    return run_dir / CHECKPOINTS / step_name(step)


def saved_steps(run_dir: Path) -> dict[int, Path]:
    """The checkpoint folders of a run, whole or not, by their step."""
    folders = (run_dir / CHECKPOINTS).glob("step-*")
    return {int(folder.name[5:]): folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name)}


def read_index(folder: Path) -> Index:
    """What checkpoint.json lists.

    Raises:
        CheckpointError: it is missing, of another version, changed, or names what is not in the folder.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {content['format']!r}, this version reads {FORMAT}")
        files = content["files"]
        if content["checksum"] != checksum(files):
            raise CheckpointError(f"{path}: its checksum differs")
        index = {name: (size, digest) for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error!r}") from error
    for name, (size, digest) in index.items():
        if not _is_inside(name) or type(size) is not int or type(digest) is not str:
            raise CheckpointError(f"{path}: lists {name!r}: expected a file in the folder, its size and its hash")
    return index


def part_files(folder: Path) -> list[str]:
    """The names of the parts that the checkpoint has. Raises CheckpointError where there are none."""
    names = [name for name in read_index(folder) if is_part(name)]
    if not names:
        raise CheckpointError(f"checkpoint {folder}: no part of a rank in {INDEX}; it is of another program or version")
    return sorted(names)


def is_part(name: str) -> bool:
    """Whether a file of this name is the part of a rank."""
    return _PART.fullmatch(name) is not None


def strangers(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Files that a reader of the folder could take for the checkpoint's and that its index does not list."""
    beside = [path.name for path in folder.glob("rank-*")]
    within = [path.relative_to(folder).as_posix() for path in (folder / TOKENIZER).rglob("*") if _is_leaf(path)]
    hidden = (".nfs", ".DS_Store")  # what file systems and desktops leave
    found = sorted({*beside, *within} - index.keys())
    return [name for name in found if not PurePosixPath(name).name.startswith(hidden)]


def made(folder: Path) -> Callable[[str], bool]:
    """Whether a path in a checkpoint's folder is its own: what the index lists, or without one what a save writes."""
    within = TOKENIZER + "/"
    try:
        listed = {*read_index(folder), INDEX}
    except CheckpointError:
        return lambda name: name in (STATE, INDEX) or is_part(name) or name.startswith(within)
    return lambda name: name in listed or (name.startswith(within) and name.endswith("/"))


def checksum(files: Mapping[str, Any]) -> str:
    """Of the list of files, kept beside it."""
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _is_leaf(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
