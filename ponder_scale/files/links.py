"""Check links in folders that are copied. Links that stay in the folder are followed, others are refused.

A tokenizer folder from someone else may contain a link to one of your files. Copying it would send your file along with
the checkpoint or the export.
"""

from __future__ import annotations

from pathlib import Path

from ponder_scale.errors import TokenizerError


def check_links(folder: Path) -> None:
    """Raise TokenizerError if a link in the folder, at any depth, leads out of it."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            resolved(folder, path)


def resolved(folder: Path, path: Path) -> Path:
    """Where a path in the folder leads. Raises TokenizerError if the target is missing or lies outside the folder."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a link to nothing, or a circle of links
        raise TokenizerError(f"{path}: is a link that leads to no file; remove it or put the file there") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise TokenizerError(
            f"{path}: is a link out of its folder, to {target}, and is not followed; put a copy of the file there"
        )
    return target


def _roots(folder: Path) -> list[Path]:
    """Folders where links may lead: the folder itself and, for a snapshot in the hub's cache, the cache's blobs
    folder.
    """
    own = folder.resolve()
    blobs = own.parent.parent / "blobs"
    in_cache = own.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink()
    return [own, blobs] if in_cache else [own]
