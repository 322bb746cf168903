"""A calibration on this machine: real ranks, real collectives, and what the command writes and reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ponder_scale.planning.calibrate import _line, calibrate
from ponder_scale.planning.hardware import read_hardware
from tests.commands import run_command


def test_the_line_of_the_least_relative_errors_is_found() -> None:
    slope, height = _line([(x, 3.0 * x + 2.0) for x in (0.1, 0.5, 2.0)])
    assert (slope, height) == pytest.approx((3.0, 2.0))
    # the relative error of the small one weighs more
    slope, height = _line([(0.0, 1.0), (1.0, 101.0), (2.0, 401.0)])
    assert height == pytest.approx(1.0, rel=0.01)


SMALL = ["quickstart", "model.vocab_size=500", "train.precision=fp32", "--gpus", "2"]


def ponder_scale(*words: str) -> str:
    done = run_command("ponder-scale", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_machine_is_calibrated_by_two_ranks_and_a_plan_reckons_by_it(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    said = ponder_scale("plan", "--calibrate", str(file))
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["products", "vocabulary", "memory", "links"]
    assert f"written to {file}" in said
    found = read_hardware(file)
    assert not found.asynchronous and found.source.startswith("measured")
    assert 1e9 < found.peak("fp32") * found.product_share < 1e13
    assert 1e8 < found.memory_bytes_per_second < 1e12 and 1e-7 < found.call_seconds < 1e-3
    assert all(0.02 < share < 2 for share in found.vocabulary_share.values())
    assert all(1e6 < rate < 1e11 for rate in found.inside.bytes_per_second.values())
    assert 1e-6 < found.inside.start_seconds + found.inside.hop_seconds < 0.1
    planned = ponder_scale("plan", *SMALL, "--hardware", str(file))
    assert "2 x cpu: " in planned and "reductions" in planned
    twice = json.loads(file.read_text())
    twice["peak_flops"] = {key: 2 * value for key, value in twice["peak_flops"].items()}
    file.write_text(json.dumps(twice))
    assert ponder_scale("plan", *SMALL, "--hardware", str(file)) != planned


def test_a_rank_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(RuntimeError, match="a rank of the calibration failed"):
        calibrate(timeout=60.0)
