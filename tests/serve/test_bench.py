"""`python -m benchmarks serve` measures both engines on a folder, and what the cache takes of a token."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.serve.engine import ENVIRONMENT, REPOSITORY
from tests.serve.folders import make_folder, make_model


def test_both_engines_are_timed_and_a_token_takes_the_bytes_of_the_arithmetic(vllm: None, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", make_model("llama", pondering_steps=2))
    command = [sys.executable, "-m", "benchmarks", "serve", str(folder), "--batch", "2", "--eager", "--runs", "2"]
    done = subprocess.run(
        [*command, "--prompt-tokens", "8", "--new-tokens", "4"],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = re.findall(r"^ +2 +(\w+) +[\d.]+ +\d+$", done.stdout, flags=re.MULTILINE)
    assert rows == ["equal", "mixed"], done.stdout
    held, counted = re.findall(r"([\d,]+) bytes a token held, ([\d,]+) by arithmetic", done.stdout)[0]
    assert held == counted == f"{3 * 2 * 2 * 2 * 32 * 4:,}"  # passes, layers, keys and values, heads, width, bytes
