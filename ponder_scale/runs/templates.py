"""`ponder-scale templates DIR`: write the Slurm files out, so that you can edit them for your site."""

from __future__ import annotations

import shlex
from pathlib import Path

from ponder_scale.errors import ConfigError
from ponder_scale.files.delete import delete_file
from ponder_scale.files.shipped import SLURM
from ponder_scale.files.write import copy_file

NEEDED = ("train.sbatch", "site.sh", "rank.sh", "check_node.sh")  # files that a run cannot be submitted without


def write_templates(folder: Path, *, overwrite: bool = False) -> str:
    """Write each Slurm file into `folder`. Returns what was done and what to do next.

    Files that already have the right contents are left. Nothing else in the folder is touched.

    Args:
        overwrite: replace files that differ, too.

    Raises:
        ConfigError: a file differs and may not be overwritten, or cannot be written. Where this can be known, it is
            raised before the first file is written.
    """
    sources = [path for path in sorted(SLURM.iterdir()) if path.is_file()]
    missing = [path for path in sources if not _same(path, folder / path.name)]
    there = [path.name for path in missing if (folder / path.name).exists() or (folder / path.name).is_symlink()]
    if there and not overwrite:
        raise ConfigError(
            f"{folder} holds {', '.join(there)} with other content; nothing was written; name another folder, or add "
            "--overwrite, which discards your changes in these files"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _write(path, folder / path.name)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror}; name another") from error
    shown = shlex.quote(str(folder))
    said = [f"wrote {len(missing)} files to {shown}; {len(sources) - len(missing)} were there already"]
    said += ["next: look at the lines marked EDIT in train.sbatch and site.sh, then"]
    said += [f"  ponder-scale submit RECIPE --templates {shown} ..."]
    if folder.name == "slurm":
        said += [f"or, in {shlex.quote(str(folder.absolute().parent))}:", "  sbatch slurm/train.sbatch RECIPE ..."]
    return "\n".join(said)


def check_templates(folder: Path) -> None:
    """Raise ConfigError if a job cannot be started with the files of this folder."""
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ConfigError(
                f"--templates {folder}: no {name} in it; `ponder-scale templates {shlex.quote(str(folder))}` writes it"
            )


def _same(source: Path, target: Path) -> bool:
    return target.is_file() and source.read_bytes() == target.read_bytes()


def _write(source: Path, target: Path) -> None:
    """Replace the target as a whole. If it is a link, the link is replaced, and not the file that it points to."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        copy_file(source, temporary)
        temporary.replace(target)
    finally:
        delete_file(temporary)
