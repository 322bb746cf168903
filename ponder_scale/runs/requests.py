"""The files by which a person asks a run for something: put into its folder, honoured at its next step."""

from __future__ import annotations

from pathlib import Path

from ponder_scale.files.delete import delete_file

STOP, SAVE_AND_STOP, SAVE = "STOP", "SAVE_AND_STOP", "SAVE"
REQUESTS = (STOP, SAVE, SAVE_AND_STOP)


def requested(run_dir: Path) -> list[Path]:
    """The requests that the run has not honoured yet."""
    return [path for path in (run_dir / name for name in REQUESTS) if path.exists()]


def request(run_dir: Path, name: str) -> Path:
    """Ask for `name`, one of `REQUESTS`; the file that does. Raises OSError where it cannot be written."""
    path = run_dir / name
    path.touch()
    return path


def honoured(run_dir: Path, name: str) -> None:
    """Take a request away, once it is honoured."""
    delete_file(run_dir / name)
