"""Links in folders that are copied from: followed while they stay in the folder, refused where they lead out of it.

A tokenizer folder of somebody else may link a name that is copied to a file of yours, which would travel on with
the checkpoint or the export.
"""

from __future__ import annotations

from pathlib import Path

from ponder_scale.errors import TokenizerError


def check_links(folder: Path) -> None:
    """Raise TokenizerError where something in the folder, at any depth, leads out of it."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            resolved(folder, path)


def resolved(folder: Path, path: Path) -> Path:
    """Where a path in the folder leads. Raises TokenizerError where that is not in the folder."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a link to nothing, or in a circle
        raise TokenizerError(f"{path}: is a link that leads to no file; remove it or put the file there") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise TokenizerError(
            f"{path}: is a link out of its folder, to {target}, and is not followed; put a copy of the file there"
        )
    return target


def _roots(folder: Path) -> list[Path]:
    """The folder, and of a snapshot in the hub's cache the folder beside it that its links lead to."""
    own = folder.resolve()
    blobs = own.parent.parent / "blobs"
    in_cache = own.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink()
    return [own, blobs] if in_cache else [own]
