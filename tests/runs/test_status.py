"""`ponder-scale status`: a run at a glance from its files, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.errors import ConfigError
from ponder_scale.figures import duration
from ponder_scale.runs.records import METRICS, Recorder
from ponder_scale.runs.status import END_BYTES, status

NOW = 1_800_000_000.0
STEP = {
    "tokens": 1_500_000_000,
    "loss": 2.5,
    "pass_losses": [2.9, 2.5],
    "grad_norm": 0.71,
    "seconds_per_step": 2.0,
    "seconds_left": 9980.0,
    "tokens_per_second": 512_000.0,
    "mfu": 0.412,
    "hfu": None,
    "memory_gib": 61.25,
}


def make_run(run_dir: Path, steps: int = 10) -> Recorder:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("train: {steps: 5000}\n")
    recorder = Recorder(run_dir, start_step=0, attempt=1)
    for step in range(1, steps + 1):
        recorder.write("step", step, **{**STEP, "time": NOW - 2.0 * (steps - step) - 5.0})
    return recorder


def beat(run_dir: Path, rank: int, age: float, **values: Any) -> None:
    (run_dir / "heartbeat").mkdir(exist_ok=True)
    heart = {"step": 10, "phase": "backward", "time": NOW - age, "pid": 7, "host": f"node{rank}", **values}
    (run_dir / "heartbeat" / f"rank-{rank:05d}.json").write_text(json.dumps(heart))


def line(run_dir: Path, name: str) -> str:
    (found,) = (text for text in status(run_dir, NOW) if text.startswith(f"{name} "))
    return found.removeprefix(name).strip()


def test_a_run_whose_held_out_loss_left_every_bound_is_told_of_too(tmp_path: Path) -> None:
    make_run(tmp_path / "run").write("evaluation", 10, losses=[800.0, float("nan"), 20.0])
    assert line(tmp_path / "run", "held-out") == "perplexity by pass inf not finite 4.85e+08, at step 10"


def test_bits_per_byte_are_told_where_they_are_known(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.write("evaluation", 5, losses=[1.0], bits_per_byte=None)
    assert line(tmp_path / "run", "held-out") == "perplexity by pass 2.72, at step 5"
    run.write("evaluation", 10, losses=[1.0, 0.0], bits_per_byte=[1.5, 0.75])
    assert line(tmp_path / "run", "held-out") == "perplexity by pass 2.72 1.00, bits per byte 0.7500, at step 10"


def test_a_running_run_says_where_it_is(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    recorder = make_run(run_dir)
    recorder.write("evaluation", 10, losses=[1.0, 0.0], time=NOW - 5)
    recorder.write("save", 10, checkpoint="step-00000010", seconds=3.25, time=NOW - 4)
    recorder.write("alarm", 10, kind="pondering_idle", time=NOW - 3)
    (run_dir / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run_dir / "SAVE").touch()
    attempt = {"attempt": 2, "time": NOW - 3600, "job_id": "77", "hosts": ["node0", "node1"], "world_size": 2}
    (run_dir / "attempts.jsonl").write_text(json.dumps({"attempt": 1}) + "\n" + json.dumps(attempt) + "\n")
    for rank in (0, 1):
        beat(run_dir, rank, 1.0 + rank)
    assert line(run_dir, "run").endswith(": running")
    assert line(run_dir, "step") == "10 of 5,000 (0.2%), 1.500B tokens"
    assert line(run_dir, "loss") == "2.5000, by pass 2.9000 2.5000; gradient norm 0.710"
    assert line(run_dir, "speed") == "512,000 tok/s, 2.00 s a step, MFU 41.2%, memory 61.2 GiB"
    assert line(run_dir, "left") == "2h46m of training"
    assert line(run_dir, "held-out") == "perplexity by pass 2.72 1.00, at step 10"
    assert line(run_dir, "saved").startswith("step-00000010, ")
    assert line(run_dir, "attempt") == "2: job 77, on node0, node1, begun 1h00m ago, 2 ranks, from the beginning"
    assert line(run_dir, "ranks") == "2, heartbeats 1s to 2s ago"
    assert line(run_dir, "events").startswith("alarm at step 10: kind pondering_idle (3s ago); save at step 10: ")
    assert line(run_dir, "requests").startswith("SAVE, for ")


def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir)
    beat(run_dir, 0, 3.0)
    beat(run_dir, 1, 300.0, step=9, phase="all-reduce")
    assert line(run_dir, "run").endswith("running, but not all ranks are")
    assert line(run_dir, "ranks").endswith("1 stale: rank 1 on node1 at step 9 in all-reduce for 5m00s")
    beat(run_dir, 0, 200.0)
    assert line(run_dir, "run").endswith("no sign of life for 5s")  # the last line of the record
    (run_dir / METRICS).unlink()
    assert line(run_dir, "run").endswith("no sign of life for 3m20s")


@pytest.mark.parametrize(("seconds_per_step", "fresh", "stale"), [(2.0, 59.0, 61.0), (20.0, 99.0, 101.0)])
def test_a_heartbeat_is_stale_after_a_minute_and_five_steps(
    seconds_per_step: float, fresh: float, stale: float, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir).write("step", 11, **{**STEP, "seconds_per_step": seconds_per_step, "time": NOW - 5.0})
    beat(run_dir, 0, 1.0)
    for age, said in ((fresh, "running"), (stale, "running, but not all ranks are")):
        beat(run_dir, 1, age)
        assert line(run_dir, "run").endswith(f": {said}"), age


def test_a_start_has_an_hour_to_come_to_its_first_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("train: {steps: 5000}\n")
    for age, said in ((3590.0, "starting for "), (3610.0, "came to nothing")):
        beat(run_dir, 0, age, step=None, phase="start")
        assert said in line(run_dir, "run"), age


def test_a_rank_that_works_a_minute_after_the_end_is_of_another_attempt(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir).write("end", 10, reason="time limit", time=NOW - 90)
    for age, said in ((31.0, "ended (time limit) 1m30s ago"), (29.0, "running")):
        beat(run_dir, 0, age)
        assert line(run_dir, "run").endswith(said), age


def test_an_ended_run_says_why(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir).write("end", 10, reason="time limit", time=NOW - 90)
    beat(run_dir, 0, 95.0)
    assert line(run_dir, "run").endswith("ended (time limit) 1m30s ago")


def test_a_refused_start_does_not_make_a_run_dead(tmp_path: Path) -> None:
    """Its ranks have put their heartbeats in the place of those that ended in order, and stood still or said why."""
    run_dir = tmp_path / "run"
    recorder = make_run(run_dir)
    recorder.write("end", 10, reason="done", time=NOW - 7200)
    beat(
        run_dir,
        0,
        300.0,
        step=None,
        phase="refused",
        why="checkpoint X: its model has hidden_size 16, but this run has 32",
    )
    beat(run_dir, 1, 301.0, step=None, phase="start")  # ended by the launcher
    why = "a start 5m00s ago was refused: checkpoint X: its model has hidden_size 16, but this run has 32"
    assert line(run_dir, "run").endswith(f": ended (done) 2h00m ago; {why}")
    assert line(run_dir, "ranks") == "2, heartbeats 5m00s to 5m01s ago"
    recorder.write("step", 10, **{**STEP, "time": NOW - 5400})  # killed without an end
    assert line(run_dir, "run").endswith(f": not running for 1h30m; {why}")
    recorder.write("step", 10, **{**STEP, "time": NOW - 20})  # another process trains on
    assert line(run_dir, "run").endswith(": running")
    (run_dir / METRICS).unlink()
    assert line(run_dir, "run").endswith(f": started, nothing recorded yet; {why}")


def test_a_start_is_told_from_a_run_that_stands_still(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir).write("end", 10, reason="a signal", time=NOW - 7200)
    beat(run_dir, 0, 300.0, step=None, phase="start")
    assert line(run_dir, "run").endswith(": ended (a signal) 2h00m ago; starting for 5m00s")
    beat(run_dir, 0, 3700.0, step=None, phase="start")
    assert line(run_dir, "run").endswith("; a start 1h01m ago came to nothing")
    beat(run_dir, 0, 300.0, step=None, phase="failed", why="RuntimeError: out of luck")
    assert line(run_dir, "run").endswith("; a start 5m00s ago failed: RuntimeError: out of luck")
    beat(run_dir, 0, 3.0)
    assert line(run_dir, "run").endswith(": running")


def test_ranks_that_have_ended_are_not_stale(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir)
    beat(run_dir, 0, 3.0)
    beat(run_dir, 1, 300.0, phase="ended")
    assert line(run_dir, "run").endswith(": running") and "stale" not in line(run_dir, "ranks")
    beat(run_dir, 0, 290.0, phase="ended")
    assert line(run_dir, "run").endswith(": ended 4m50s ago") and "stale" not in line(run_dir, "ranks")
    beat(run_dir, 0, 280.0, phase="failed", why="the disk is full")
    assert line(run_dir, "run").endswith(": ended by an error 4m40s ago: the disk is full")


def test_a_small_run_is_told_in_units_that_fit(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    small = {**STEP, "tokens": 3840, "seconds_per_step": 0.004, "tokens_per_second": 0.5, "memory_gib": 0.03}
    make_run(run_dir, steps=0).write("step", 10, **small, time=NOW)
    assert line(run_dir, "step") == "10 of 5,000 (0.2%), 3,840 tokens"
    assert line(run_dir, "speed") == "0.5 tok/s, 4.00 ms a step, MFU 41.2%, memory 30.7 MiB"


def test_a_run_that_has_only_begun_and_what_is_no_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, steps=0)
    assert line(run_dir, "run").endswith("started, nothing recorded yet")
    assert line(run_dir, "step") == "none recorded yet"
    with pytest.raises(ConfigError, match=r"no config\.yaml in it; expected the run_dir"):
        status(tmp_path)


def test_only_the_end_of_a_long_record_is_read(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, steps=3)
    path = run_dir / METRICS
    good = path.read_bytes()
    path.write_bytes(b'{"event":"alarm","step":1,"time":0}\n' + b" " * END_BYTES + b"\n" + good)
    assert line(run_dir, "step").startswith("3 of")
    assert line(run_dir, "events") == "none"


def test_status_and_report_load_no_torch(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir)
    for command in (["status", str(run_dir)], ["report", str(run_dir)]):
        code = (
            "import sys; from ponder_scale.cli import main\n"
            f"try: main({command!r})\n"
            "except SystemExit as end: assert end.code == 0\n"
            "print(sorted({'torch', 'transformers', 'deepspeed'} & sys.modules.keys()))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout + done.stderr


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (61, "1m01s"), (7260, "2h01m"), (90_000, "1d01h")])
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_that_waits_in_the_queue_says_so(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("77\n")
    assert status(tmp_path) == [f"run       {tmp_path}: submitted as job 77, not begun yet; squeue --jobs=77 says why"]
