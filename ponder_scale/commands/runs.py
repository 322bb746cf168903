"""Looking at runs: `ponder-scale status` and `report`. Neither loads torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    status = commands.add_parser("status", help="how a run is doing, in a dozen lines")
    status.add_argument("run_dir", type=Path, help="a run folder")
    status.set_defaults(run=_status)

    report = commands.add_parser("report", help="one HTML page about a run, or several runs over each other")
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    report.add_argument("--out", type=Path, help="default: report.html in the run folder; of several, here")
    report.set_defaults(run=_report)


def _status(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.status import status

    print("\n".join(status(options.run_dir)))


def _report(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.report.page import report

    default = options.run_dirs[0] / "report.html" if len(options.run_dirs) == 1 else Path("report.html")
    print(f"wrote {report(options.run_dirs, options.out or default)}")
