"""Checkpoints that a test has made or changed by hand, sealed: what is in the folder is what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ponder_scale.checkpoint.index import FORMAT, INDEX, checksum
from ponder_scale.files.write import hash_file


def seal(folder: Path) -> Path:
    """Write the index of all that is in the folder, and return it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != INDEX)
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, hash_file(path)] for path in paths}
    write_index(folder, files)
    return folder


def write_index(folder: Path, files: object) -> None:
    """Write an index of these files, whatever they are, with a checksum that is right."""
    content = {"format": FORMAT, "files": files, "checksum": checksum(files)}  # type: ignore[arg-type]
    (folder / INDEX).write_text(json.dumps(content))


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's state.json, as if it had been saved so."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
