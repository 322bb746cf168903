"""The layout of checkpoints, and their index checkpoint.json, which has the size and hash of each file.

    RUN/checkpoints/step-00000300/
        rank-00000.safetensors  weights and optimizer states that rank 0 kept; see parts.py
        tokenizer/              copy of the tokenizer in the shards
        state.json              step, loader state, configuration of run and model, versions
        checkpoint.json         size and hash of each file above
    RUN/latest                  name of the newest folder

checkpoint.json is written last, so a folder without it is unfinished. A file that is not in it does not belong to the
checkpoint: readers find the parts in the index, never by listing the folder. This module does not import torch, because
it is also used on login nodes.
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
SAVING, ASIDE = ".saving-", "aside-"  # prefixes of folders that are not yet, or no longer, checkpoints
FORMAT = 2
_PART = re.compile(r"rank-\d{5,}\.safetensors")

Index = dict[str, tuple[int, str]]  # size and hash of each file, by its path in the checkpoint


def step_name(step: int) -> str:
    """The name of a step's checkpoint, and of its evidence file."""
    return f"step-{step:08d}"


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder for the checkpoint of a step, whether it exists or not."""
    return run_dir / CHECKPOINTS / step_name(step)


def saved_steps(run_dir: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by step, whether they are whole or not."""
    folders = (run_dir / CHECKPOINTS).glob("step-*")
    return {int(folder.name[5:]): folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name)}


def read_index(folder: Path) -> Index:
    """The files that checkpoint.json lists.

    Raises:
        CheckpointError: it is missing, of another version or changed, or it names a path outside of the folder.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: its format is {content['format']!r}; this version reads format {FORMAT}")
        files = content["files"]
        if content["checksum"] != checksum(files):
            raise CheckpointError(f"{path}: its checksum does not match its list of files")
        index = {name: (size, digest) for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error!r}") from error
    for name, (size, digest) in index.items():
        if not _is_inside(name) or type(size) is not int or type(digest) is not str:
            raise CheckpointError(
                f"{path}: its entry for {name!r} is wrong; expected a file in the folder, its size and hash"
            )
    return index


def part_files(folder: Path) -> list[str]:
    """The names of a checkpoint's parts. Raises CheckpointError if it has none."""
    names = [name for name in read_index(folder) if is_part(name)]
    if not names:
        raise CheckpointError(
            f"checkpoint {folder}: {INDEX} lists no file of a rank; another program or version saved the checkpoint"
        )
    return sorted(names)


def is_part(name: str) -> bool:
    """Whether this is the name of a rank's part."""
    return _PART.fullmatch(name) is not None


def strangers(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Files that look like files of the checkpoint and are not in its index."""
    beside = [path.name for path in folder.glob("rank-*")]
    within = [path.relative_to(folder).as_posix() for path in (folder / TOKENIZER).rglob("*") if _is_leaf(path)]
    hidden = (".nfs", ".DS_Store")  # left behind by file systems and desktops
    found = sorted({*beside, *within} - index.keys())
    return [name for name in found if not PurePosixPath(name).name.startswith(hidden)]


def made(folder: Path) -> Callable[[str], bool]:
    """A function that tells whether a path belongs to the checkpoint.

    These are the paths that the index lists. Without an index, they are those that a save writes.
    """
    within = TOKENIZER + "/"
    try:
        listed = {*read_index(folder), INDEX}
    except CheckpointError:
        return lambda name: name in (STATE, INDEX) or is_part(name) or name.startswith(within)
    return lambda name: name in listed or (name.startswith(within) and name.endswith("/"))


def checksum(files: Mapping[str, Any]) -> str:
    """The checksum of the list of files, which checkpoint.json has beside the list."""
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _is_leaf(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
