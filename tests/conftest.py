"""Fixtures shared by the whole suite: factories of tiny data, all deterministic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.tokenize.training import train_tokenizer
from ponder_scale.shards.format import ShardSet, ShardWriter, dtype_for, open_shards
from ponder_scale.shards.manifest import Manifest, seal
from tests.faults import fault, print_fault_matrix

__all__ = ["fault"]  # a fixture of the whole suite

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def square(number):\n    return number * number\n\n\nassert square(3) == 9\n",
    "Größe, naïveté, 数学 and \U0001f600: every byte has a token, whatever the text.",
]

TinyShards = Callable[..., ShardSet]


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


def make_shards(
    folder: Path,
    *,
    train: tuple[int, ...] = (900, 700),
    heldout: tuple[int, ...] = (200,),
    vocab_size: int = 100,
    seed: int = 0,
    tokenizer: str = "a" * 64,
    masked: bool = False,
) -> ShardSet:
    """Shards with `train` and `heldout` tokens each, in documents of 1 to 40 tokens that end with token 0.

    With `masked`, a third of the tokens count in the loss: none of the first half of a shard, two of three behind it.
    """
    generator, chance = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    splits = {}
    for split, sizes in (("train", train), ("heldout", heldout)):
        splits[split] = []
        for number, size in enumerate(sizes):
            writer = ShardWriter(folder, f"{split}-{number:05d}", vocab_size, masked)
            left = size
            while left:
                length = min(left, int(generator.integers(1, 41)))
                document = generator.integers(1, vocab_size, length)
                document[-1] = 0
                counts = chance.random(length) < 2 / 3 if left <= size // 2 else np.zeros(length, dtype=bool)
                writer.add(document, np.array([length]), counts if masked else None)
                left -= length
            splits[split].append(writer.close())
    seal(folder, Manifest(dtype_for(vocab_size).name, vocab_size, 0, None, tokenizer, splits))
    return open_shards(folder)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly what was left out for want of Slurm: it is much of what the project promises. Print the faults."""
    print_fault_matrix(terminalreporter)
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = {report.nodeid: report.longrepr[2] for report in skipped if "no Slurm here" in str(report.longrepr)}
    if left_out:
        terminalreporter.section("NOT TESTED", sep="!", red=True, bold=True)
        terminalreporter.line(f"{len(left_out)} tests of runs on a cluster: {next(iter(left_out.values()))}")
