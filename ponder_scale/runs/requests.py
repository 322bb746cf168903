"""Request files. You put one into the folder of a run, and the run fulfils it at its next step."""

from __future__ import annotations

from pathlib import Path

from ponder_scale.files.delete import delete_file

STOP, SAVE_AND_STOP, SAVE = "STOP", "SAVE_AND_STOP", "SAVE"
REQUESTS = (STOP, SAVE, SAVE_AND_STOP)


def requested(run_dir: Path) -> list[Path]:
    """The requests that the run has not fulfilled yet."""
    return [path for path in (run_dir / name for name in REQUESTS) if path.exists()]


def request(run_dir: Path, name: str) -> Path:
    """Write the request `name`, one of `REQUESTS`, and return its file. Raises OSError if it cannot be written."""
    path = run_dir / name
    path.touch()
    return path


def honoured(run_dir: Path, name: str) -> None:
    """Remove a request that has been fulfilled."""
    delete_file(run_dir / name)
