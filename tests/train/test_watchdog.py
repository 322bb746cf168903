"""A rank that hangs, one whose interpreter is blocked, one that is slow: found, named, ended with the right code."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import HealthConfig, RunConfig
from ponder_scale.errors import HUNG
from ponder_scale.settings import load
from ponder_scale.train.launch import free_port
from ponder_scale.train.watchdog import Watch, straggler
from tests.faults import Fault
from tests.train.test_loop import overrides


def train_with_a_sick_rank(kind: str, settings: list[str]) -> int:
    """Train; in the data of its third step rank 1 falls asleep for ever (`hang`), or for a while in each (`slow`)."""
    import torch

    from ponder_scale.data.loader import Loader
    from ponder_scale.train import loop

    torch.set_num_threads(1)
    original, calls = Loader.next_batches, []

    def sick(self: Any, *sequences: int) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1":
            if kind == "hang" and len(calls) == 3:
                time.sleep(3600)
            if kind == "slow":
                time.sleep(0.7)
        return original(self, *sequences)

    Loader.next_batches = sick  # type: ignore[method-assign]
    return loop.train(load(RunConfig, None, settings))


def watch_blocked_code(run_dir: str) -> None:
    """Hold the interpreter's lock in native code for ever, under a watch."""
    Path(run_dir).mkdir()
    watch = Watch(Path(run_dir), HealthConfig(hang_seconds=1.0, slow_seconds=1.0), rank=0)
    watch.enter("forward", 1)
    time.sleep(0.5)  # for the watchdog to set its timer
    ctypes.PyDLL(None).sleep(3600)


def processes(script: str, count: int) -> list[tuple[int, str]]:
    """Exit code and output of `count` ranks that run `script`."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.communicate()
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def call(function: Callable[..., Any], *arguments: Any) -> str:
    words = ", ".join(map(repr, arguments))
    return f"import sys, {__name__} as here; sys.exit(here.{function.__name__}({words}))"


@pytest.mark.faults
def test_a_hang_leaves_the_stacks_of_every_rank_and_ends_within_the_time_set(
    shards: Any, tmp_path: Path, fault: Fault
) -> None:
    """The pains of pytorch/torchtitan#810 and EleutherAI/gpt-neox#988: a hang that nothing reports or ends."""
    settings = overrides(tmp_path / "run", shards, "health.hang_seconds=12", "train.steps=100")
    first, second = processes(call(train_with_a_sick_rank, "hang", settings), 2)
    for rank, (code, printed) in enumerate((first, second)):
        assert code == HUNG, printed
        assert re.search(rf"rank {rank}: no progress for \d+ s in \w+ of step 3; stacks:", printed), printed
    assert "in sleep" not in first[1] and "in sick" in second[1].partition("stacks:")[2]  # who waits, who hangs
    beats = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "heartbeat").glob("rank-*.json"))]
    assert [beat["step"] for beat in beats] == [3, 3] and beats[1]["phase"] == "data"
    assert beats[0].keys() == {"step", "phase", "time", "pid", "host"}
    fault(
        "rank 1 hangs",
        "data",
        detected="by every rank",
        after="stacks of all; exit code 86",
        lost="nothing saved",
    )


@pytest.mark.faults
def test_a_blocked_interpreter_is_ended_too(tmp_path: Path, fault: Fault) -> None:
    ((code, printed),) = processes(call(watch_blocked_code, str(tmp_path / "run")), 1)
    assert code == 1 and "Timeout (" in printed and "in watch_blocked_code" in printed
    fault(
        "native code keeps the lock",
        "forward",
        detected="by a timer",
        after="stacks; exit code 1",
        lost="nothing saved",
    )


def test_a_slow_rank_is_named_with_its_phase(shards: Any, tmp_path: Path) -> None:
    settings = overrides(tmp_path / "run", shards, "checkpoint.every_steps=null")  # ZeRO-3: all wait for it in forward
    done = processes(call(train_with_a_sick_rank, "slow", settings), 2)
    assert [code for code, _ in done] == [0, 0], done
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["event"] == "straggler"]
    assert [(line["step"], line["rank"], line["phase"]) for line in found] == [(step, 1, "data") for step in (2, 3, 4)]
    assert all(line["seconds"] >= 0.7 for line in found)
    beat = json.loads((tmp_path / "run" / "heartbeat" / "rank-00001.json").read_text())
    assert (beat["phase"], beat["step"]) == ("ended", 4)


def test_a_straggler_is_much_slower_than_the_median_and_worth_its_name() -> None:
    even = [[0.1, 1.0, 4.0]] * 3
    phases = ("data", "forward")
    assert straggler([*even, even[0]], 1.5, phases) is None
    late = [*even, [0.1, 2.0, 4.0]]
    found = {"rank": 3, "phase": "forward", "seconds": 2.0, "median_seconds": 1.0}
    assert straggler(late, 1.5, phases) == found
    assert straggler(late, 2.1, phases) is None
    assert straggler(late, 1.5, ("data",)) is None
    assert straggler([*even, [0.25, 1.0, 4.0]], 1.5, phases) is None  # 2.5 times as long, but 4% of the time


def test_progress_again_within_the_grace_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ponder_scale.train import watchdog

    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    tmp_path.joinpath("run").mkdir()
    watch = Watch(tmp_path / "run", HealthConfig(hang_seconds=2.0, slow_seconds=2.0), rank=0)
    watch.enter("forward", 1)
    deadline = time.monotonic() + 60
    while "stacks:" not in (printed := capfd.readouterr().err):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with watch:
        watch.enter("backward")
    assert "no progress for 2 s in forward of step 1" in printed
