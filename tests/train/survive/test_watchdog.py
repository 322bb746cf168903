"""A rank that hangs, one whose interpreter is blocked, one that is slow: found, named, ended with the right code."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import HealthConfig, RunConfig
from ponder_scale.errors import HUNG
from ponder_scale.settings import load
from ponder_scale.train.survive.watchdog import BLOCKED, Watch, heartbeat_seconds, straggler
from tests.faults import Fault
from tests.ranks import run_ranks
from tests.train.runs import overrides


def train_with_a_sick_rank(case: dict[str, Any]) -> int:
    """Train; in the data of its third step rank 1 falls asleep for ever (`hang`), or for a while in each (`slow`)."""
    import torch

    from ponder_scale.data.loader import Loader
    from ponder_scale.train import loop
    from ponder_scale.train.survive import watchdog

    torch.set_num_threads(1)
    print_into(case["folder"])
    watchdog.GRACE_SECONDS = 2.0
    kind, original, calls = case["kind"], Loader.next_batches, []

    def sick(self: Any, *sequences: int) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1":
            if kind == "hang" and len(calls) == 3:
                time.sleep(3600)
            if kind == "slow":
                time.sleep(0.7)
        return original(self, *sequences)

    Loader.next_batches = sick  # type: ignore[method-assign]
    return loop.train(load(RunConfig, None, case["settings"]))


def watch_blocked_code(case: dict[str, Any]) -> None:
    """Hold the interpreter's lock in native code for ever, under a watch."""
    from ponder_scale.train.survive import watchdog

    watchdog.GRACE_SECONDS = 2.0
    print_into(case["folder"])
    run_dir = Path(case["folder"], "run")
    run_dir.mkdir()
    watch = Watch(run_dir, HealthConfig(hang_seconds=1.0, slow_seconds=1.0), rank=0)
    watch.enter("forward", 1)
    time.sleep(0.5)  # for the watchdog to start the process beside
    ctypes.PyDLL(None).sleep(3600)


def print_into(folder: str) -> None:
    """Let this rank print into a file of its own, read by `printed`."""
    file = os.open(Path(folder, os.environ["RANK"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def printed(folder: Path, rank: int) -> str:
    return (folder / str(rank)).read_text()


@pytest.mark.faults
def test_a_hang_leaves_the_stacks_of_every_rank_and_ends_within_the_time_set(
    shards: Any, tmp_path: Path, fault: Fault
) -> None:
    """The pains of pytorch/torchtitan#810 and EleutherAI/gpt-neox#988: a hang that nothing reports or ends."""
    settings = overrides(tmp_path / "run", shards, "health.hang_seconds=4", "train.steps=100", "train.deepspeed=zero3")
    case = {"folder": str(tmp_path), "kind": "hang", "settings": settings}
    (ranks,) = run_ranks(train_with_a_sick_rank, [case])
    said = [printed(tmp_path, rank) for rank in range(2)]
    assert ranks == [{"error": f"exit code {HUNG}"}] * 2, said
    for rank in range(2):
        assert re.search(rf"rank {rank}: no progress for \d+ s in \w+ of step 3; stacks:", said[rank]), said[rank]
    assert "in sleep" not in said[0] and "in sick" in said[1].partition("stacks:")[2]  # who waits, who hangs
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


def train_until_stopped(case: dict[str, Any]) -> float:
    """Train; before the data of step 3 say so, and wait for the file `go`. The seconds of the longest step."""
    import torch

    from ponder_scale.data.loader import Loader
    from ponder_scale.train import loop
    from ponder_scale.train.survive import control, watchdog

    torch.set_num_threads(1)
    print_into(case["folder"])
    watchdog.GRACE_SECONDS = 2.0
    original, took, calls, longest = Loader.next_batches, control.Control.took, [], [0.0]

    def waiting(self: Any, *sequences: int) -> Any:
        calls.append(1)
        if len(calls) == 3:
            Path(case["folder"], f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
            while not Path(case["folder"], "go").exists():
                time.sleep(0.05)
        return original(self, *sequences)

    def noting(self: Any, **seconds: Any) -> None:
        longest[0] = max(longest[0], seconds.get("step", 0.0))
        took(self, **seconds)

    Loader.next_batches = waiting  # type: ignore[method-assign]
    control.Control.took = noting  # type: ignore[method-assign]
    loop.train(load(RunConfig, None, case["settings"]))
    return longest[0]


@pytest.mark.faults
def test_a_run_that_was_stopped_for_longer_than_a_hang_may_last_goes_on(
    shards: Any, tmp_path: Path, fault: Fault
) -> None:
    """As `scontrol suspend` does it, and a container that is paused. What ends blocked interpreters waits, too."""
    settings = overrides(tmp_path / "run", shards, "health.hang_seconds=5", "checkpoint.every_steps=null")
    pids = [tmp_path / f"pid-{rank}" for rank in range(2)]
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run_ranks, train_until_stopped, [{"folder": str(tmp_path), "settings": settings}])
        while not all(path.is_file() and path.read_text() for path in pids):
            assert not ended.done(), ended.result()
            time.sleep(0.05)
        numbers = [int(path.read_text()) for path in pids]
        for number in numbers:
            os.kill(number, signal.SIGSTOP)
        time.sleep(11.0)  # 1.25 x 5 + 2: until a blocked interpreter is ended
        for number in numbers:
            os.kill(number, signal.SIGCONT)
        (tmp_path / "go").touch()
        (longest,) = ended.result()
    said = [printed(tmp_path, rank) for rank in range(2)]
    assert all(isinstance(seconds, float) and seconds < 11.0 for seconds in longest), (longest, said)
    assert not any("no progress" in text or "Timeout (" in text for text in said), said
    fault("SIGSTOP, later SIGCONT, of all ranks", "data", detected="as no hang", after="trains on", lost="nothing")


def train_and_count(case: dict[str, Any]) -> dict[str, int]:
    """Train; how often there was a sign of life within each phase."""
    from ponder_scale.train import loop
    from ponder_scale.train.survive import watchdog

    alive, counts = watchdog.Watch.alive, dict.fromkeys(watchdog.SLOW, 0)

    def counting(self: watchdog.Watch) -> None:
        counts[self._where[0]] += 1
        alive(self)

    watchdog.Watch.alive = counting  # type: ignore[method-assign]
    loop.train(load(RunConfig, None, case["settings"]))
    return counts


def test_long_evaluations_saves_and_loads_give_signs_of_life(shards: Any, tmp_path: Path) -> None:
    settings = overrides(tmp_path / "run", shards, "checkpoint.every_steps=null", "train.sanity_step=true")
    first, again = run_ranks(
        train_and_count, [{"settings": settings}, {"settings": [*settings, "train.steps=5"]}], world_size=1
    )
    assert first[0]["evaluate"] == again[0]["evaluate"] == 3  # 6 sequences by 2
    assert first[0]["save"] > 10 and first[0]["start"] > 10  # each stretch of a part, of the trial's part
    assert again[0]["start"] > 10  # each file that is verified, each stretch that is loaded


def test_a_sign_of_life_moves_the_heartbeat_and_time_stopped_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with Watch(tmp_path / "run", HealthConfig(), rank=0) as watch:
        watch.enter("evaluate", 7)
        before = watch._since
        watch.alive()
        assert watch._where == ("evaluate", 7) and watch._since > before
        began = watch.clock()
        watch._looked -= 1000.0  # as if the thread had not run for so long
        assert watch.clock() - began == pytest.approx(-1000.0, abs=60.0)


@pytest.mark.faults
def test_a_blocked_interpreter_is_ended_too(tmp_path: Path, fault: Fault) -> None:
    ended = run_ranks(watch_blocked_code, [{"folder": str(tmp_path)}], world_size=1)
    said = printed(tmp_path, 0)
    assert (
        ended == [[{"error": f"exit code -{int(BLOCKED)}"}]] and "Timeout (" in said and "in watch_blocked_code" in said
    ), said
    fault(
        "native code keeps the lock",
        "forward",
        detected="by a process beside",
        after="stacks; ended by a signal",
        lost="nothing saved",
    )


def test_a_slow_rank_is_named_with_its_phase(shards: Any, tmp_path: Path) -> None:
    more = ["checkpoint.every_steps=null", "train.deepspeed=zero3"]  # so all wait for it in forward
    case = {"folder": str(tmp_path), "kind": "slow", "settings": overrides(tmp_path / "run", shards, *more)}
    ranks = run_ranks(train_with_a_sick_rank, [case])
    assert ranks == [[0, 0]], printed(tmp_path, 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["event"] == "straggler"]
    assert [(line["step"], line["rank"], line["phase"]) for line in found] == [(step, 1, "data") for step in (2, 3, 4)]
    assert all(line["seconds"] >= 0.7 for line in found)
    beat = json.loads((tmp_path / "run" / "heartbeat" / "rank-00001.json").read_text())
    assert (beat["phase"], beat["step"]) == ("ended", 4)


def test_heartbeats_of_all_ranks_are_at_most_200_files_a_second() -> None:
    assert [heartbeat_seconds(ranks) for ranks in (1, 1000, 2000, 8000)] == [5.0, 5.0, 10.0, 40.0]


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
    from ponder_scale.train.survive import watchdog

    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    tmp_path.joinpath("run").mkdir()
    watch = Watch(tmp_path / "run", HealthConfig(hang_seconds=2.0, slow_seconds=2.0), rank=0)
    watch.enter("forward", 1)
    deadline = time.monotonic() + 60
    while "stacks:" not in (said := capfd.readouterr().err):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with watch:
        watch.enter("backward")
    assert "no progress for 2 s in forward of step 1" in said
