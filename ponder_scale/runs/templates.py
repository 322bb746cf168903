"""`ponder-scale templates DIR`: the Slurm files, written out for a site to edit."""

from __future__ import annotations

import shlex
from pathlib import Path

from ponder_scale.errors import ConfigError
from ponder_scale.files.delete import delete_file
from ponder_scale.files.shipped import SLURM
from ponder_scale.files.write import copy_file

NEEDED = ("train.sbatch", "site.sh", "rank.sh", "check_node.sh")  # of a folder that a run is submitted with


def write_templates(folder: Path, *, overwrite: bool = False) -> str:
    """Write each Slurm file into `folder`; returns what was done and what to do next.

    Files of these names that say the same are left. Nothing else in the folder is touched.

    Args:
        overwrite: also files that differ.

    Raises:
        ConfigError: a file differs and may not be overwritten, or cannot be written. Before the first one is written,
            where that can be known.
    """
    sources = [path for path in sorted(SLURM.iterdir()) if path.is_file()]
    missing = [path for path in sources if not _same(path, folder / path.name)]
    there = [path.name for path in missing if (folder / path.name).exists() or (folder / path.name).is_symlink()]
    if there and not overwrite:
        raise ConfigError(
            f"{folder} holds {', '.join(there)} with other content; nothing was written: name another folder, or add "
            "--overwrite, which loses what you changed in them"
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
    """Raise ConfigError for a folder that a job cannot be started with."""
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ConfigError(
                f"--templates {folder}: no {name} in it; `ponder-scale templates {shlex.quote(str(folder))}` writes it"
            )


def _same(source: Path, target: Path) -> bool:
    return target.is_file() and source.read_bytes() == target.read_bytes()


def _write(source: Path, target: Path) -> None:
    """A file that is there is replaced as a whole; where it is a link, the link is, and not what it points to."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        copy_file(source, temporary)
        temporary.replace(target)
    finally:
        delete_file(temporary)
