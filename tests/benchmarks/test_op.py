"""`bench op` on a shape of no consequence: every backend is there, right, and compared with the published way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import op
from benchmarks.op import NAIVE, run
from ponder_scale.errors import ConfigError


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The bench sets the threads of torch, for all of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_every_backend_is_measured_against_the_published_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a new process for each backend, by the command of docs/performance.md
    monkeypatch.setattr(op, "_memory", lambda *given: (1.0, 0.5))
    rows = run(tokens=64, hidden=32, vocabulary=500, top_k=20, runs=2, device="cpu")
    table = capsys.readouterr().out.splitlines()
    assert [row["variant"] for row in rows] == [NAIVE, "chunked", "chunked+", "sdpa", "sdpa+", "top_k"]
    assert "64 tokens, D 32, V 500, float32" in table[0] and "medians of 2 interleaved runs" in table[0]
    assert len(table) == 3 + len(rows)
    for row, line in zip(rows, table[3:], strict=True):
        assert line.startswith(str(row["variant"]))
        assert row["error"] < 2e-6 and row["gradient_error"] < 2e-6
        assert 0 < row["forward_s"] < row["both_s"] and row["peak_mib"] >= 0
    assert table[3].split()[3] == table[3].split()[5] == "1.00"


def test_arguments_out_of_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tokens is 0; expected at least 1"):
        run(tokens=0)
    with pytest.raises(ConfigError, match="--dtype is 'int8'; expected one of float32, bfloat16, float16"):
        run(dtype="int8")
