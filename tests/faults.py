"""The fault matrix: tests that injure a run say what they did and what was left; `make faults` prints all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

COLUMNS = ("injected", "phase", "detected", "state after", "lost")
Fault = Callable[..., None]


@pytest.fixture
def fault(record_property: Callable[[str, Any], None]) -> Fault:
    """Adds a row, after the assertions that make it true; the test is marked `faults`."""

    def add(injected: str, phase: str, *, detected: str, after: str, lost: str) -> None:
        record_property("fault", [injected, phase, detected, after, lost])

    return add


def print_fault_matrix(terminalreporter: Any) -> None:
    """Print the rows of tests that passed, and the names of those that did not, after `pytest -m faults`."""
    if terminalreporter.config.option.markexpr != "faults":
        return
    reports = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "when")]
    rows = [value for report in reports if report.passed for name, value in report.user_properties if name == "fault"]
    unique = sorted({tuple(row) for row in rows})
    widths = [max(len(row[column]) for row in [COLUMNS, *unique]) for column in range(len(COLUMNS))]
    terminalreporter.section("faults")
    for row in [COLUMNS, tuple("-" * width for width in widths), *unique]:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    failed = sorted({report.nodeid for report in reports if report.failed})
    terminalreporter.line(f"{len(unique)} faults survived" + "".join(f"\nNOT SURVIVED: {name}" for name in failed))
