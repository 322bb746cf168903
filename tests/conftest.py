"""Fixtures shared by the whole suite: factories of tiny data, all deterministic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.tokenize.training import train_tokenizer
from ponder_scale.shards.format import ShardSet
from tests.faults import fault, print_fault_matrix
from tests.lanes import put_long_files_first, starts_processes
from tests.tiny import TEXTS, TinyShards, make_shards

__all__ = ["fault"]  # a fixture of the whole suite


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> TinyShards:
    """Makes a folder of shards of random tokens; its arguments are those of `make_shards`."""

    def make(**arguments: object) -> ShardSet:
        return make_shards(tmp_path_factory.mktemp("shards"), **arguments)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 300 tokens that transformers loads too."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TEXTS * 20, 300, "bpe", folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes, so that the fast lane leaves it out without a list, and begin with long files."""
    for item in items:
        if isinstance(item, pytest.Function) and starts_processes(item):
            item.add_marker(pytest.mark.processes)
    put_long_files_first(items)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the faults, and say loudly what was left out for want of Slurm or of a package index."""
    print_fault_matrix(terminalreporter)
    skipped = terminalreporter.stats.get("skipped", [])
    for sign, what in (("no Slurm here", "of runs on a cluster"), ("TESTS_OFFLINE is set", "of other versions")):
        left_out = {report.nodeid: report.longrepr[2] for report in skipped if sign in str(report.longrepr)}
        if left_out:
            terminalreporter.section("NOT TESTED", sep="!", red=True, bold=True)
            terminalreporter.line(f"{len(left_out)} tests {what}: {next(iter(left_out.values()))}")
