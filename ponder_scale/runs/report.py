"""`ponder-scale report RUN...`: write one HTML file that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ponder_scale.errors import ConfigError
from ponder_scale.files.write import write_whole
from ponder_scale.runs.page import page
from ponder_scale.runs.series import read_run

CONTENT = Path(__file__).with_name("report.html")


def report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write a page about one run, or about several runs drawn over each other, to `out`. Returns `out`.

    Raises:
        ConfigError: a folder is no run, a run has no recorded step, or `out` cannot be written.
    """
    runs = [read_run(run_dir, name) for run_dir, name in zip(run_dirs, names(run_dirs), strict=True)]
    title = " against ".join(run["name"] for run in runs)
    text = page(title, CONTENT.read_text(encoding="utf-8"), runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}; name another file") from error
    return out


def names(run_dirs: Sequence[Path]) -> list[str]:
    """Short names that differ: as many of the last parts of each folder's path as it takes."""
    parts = [path.resolve().parts for path in run_dirs]
    if len(set(parts)) < len(parts):
        raise ConfigError("report: a run is named twice; name each once")
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(path[-count:]) for path in parts]
        if len(set(found)) == len(found):
            break
    return found
