"""Look at runs with `ponder-scale status` and `report`. Neither command loads torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ponder_scale.errors import ConfigError
from ponder_scale.settings.commandline import path


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    status = commands.add_parser("status", help="summarize the state of a run in a dozen lines")
    status.add_argument("run_dir", type=path, help="a run folder")
    status.set_defaults(run=_status)

    report = commands.add_parser("report", help="write an HTML page about a run, or one that compares several")
    report.add_argument("run_dirs", type=path, nargs="+", metavar="RUN", help="a run folder")
    report.add_argument(
        "--out", type=path, help="page to write (default: report.html in the run folder, or here for several runs)"
    )
    report.set_defaults(run=_report)


def _status(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.runs.status import status

    try:
        lines = status(options.run_dir)
    except OSError as error:
        raise ConfigError(f"{error.filename or options.run_dir}: cannot be read: {error.strerror}") from error
    print("\n".join(lines))


def _report(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.runs.report import report

    default = options.run_dirs[0] / "report.html" if len(options.run_dirs) == 1 else Path("report.html")
    try:
        written = report(options.run_dirs, options.out or default)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from error
    print(f"wrote {written}")
