"""One cluster for all tests of this folder, and shards to train on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.build.pipeline import build
from data_pipeline.config import BuildConfig
from ponder_scale.settings import load
from tests.slurm.lab import Lab, missing
from tests.tiny import TEXTS

HINT = "no Slurm here: install it to run these tests (Debian: apt-get install slurm-wlm munge iproute2)"


@pytest.fixture(scope="session")
def slurm() -> None:
    """Without Slurm on this machine: skipped, or failed where REQUIRE_SLURM is set."""
    if missing():
        outcome = pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip
        outcome(f"{HINT}; missing: {', '.join(missing())}")


@pytest.fixture(scope="module")
def lab(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A cluster of 20 nodes."""
    running = Lab(tmp_path_factory.mktemp("slurm") / "lab", nodes=20)
    yield running
    running.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts.jsonl."""
    import json

    folder = tmp_path_factory.mktemp("corpus of the lab")  # spaces, on purpose
    texts = [f"{text}\nNumber {number}." for number in range(120) for text in TEXTS]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tiny_tokenizer: Path) -> Path:
    """A folder of shards of it."""
    settings = ["sources.texts.kind=jsonl", f"sources.texts.path={corpus / 'texts.jsonl'}", "heldout_fraction=0.1"]
    build(load(BuildConfig, None, [*settings, f"tokenizer={tiny_tokenizer}", f"out={corpus / 'shards'}"]), "test")
    return corpus / "shards"
