"""Folders to serve, and vLLM in a process beside the one that computes what it has to say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.engine import ENVIRONMENT, REPOSITORY

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def vllm() -> None:
    """Skips a test where vLLM is not installed; `make test-vllm` installs it."""
    if importlib.util.find_spec("vllm") is None:
        if os.environ.get("REQUIRE_VLLM"):
            pytest.fail("vLLM is not installed here")
        pytest.skip("needs vLLM: make test-vllm")


@pytest.fixture(scope="session")
def run(vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Takes jobs by name (see `engine`) and variables of the environment, returns the answers by name.

    Beside them "log": what the process and those that it started have printed.
    """

    def in_a_process(jobs: dict[str, Any], **variables: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("jobs")
        asked, said = folder / "jobs.json", folder / "answers.json"
        asked.write_text(json.dumps(jobs))
        done = subprocess.run(
            [sys.executable, "-m", "tests.serve.engine", str(asked), str(said)],
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1100,  # a dozen engines on a busy machine
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return {**json.loads(said.read_text()), "log": done.stdout}

    return in_a_process


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer of 300 tokens."""
    from data_pipeline.tokenize.training import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(
        ["The quick brown fox jumps over the lazy dog, and the dog does not mind."] * 20, 300, "bpe", folder
    )
    return folder
