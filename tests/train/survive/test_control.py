"""Signals, request files, the time limit: every rank ends at the same step, saved, with the code launchers expect."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.checkpoint.find import find, newest_whole, read_state
from ponder_scale.config import RunConfig
from ponder_scale.errors import AGAIN, INTERRUPTED, ConfigError
from ponder_scale.runs.requests import REQUESTS, requested
from ponder_scale.settings import load
from ponder_scale.train.survive import control, signals
from tests.faults import Fault
from tests.ranks import run_ranks
from tests.train.runs import assert_same_run, overrides
from tests.train.survive.commands import ENDLESS, PATIENCE_SECONDS, Command, alive, has_signal, state, wait_until

pytestmark = pytest.mark.faults


def train_with_an_event(case: dict[str, Any]) -> int:
    """Train; before the data of step `at`, on rank `rank`, comes the event: a signal's name, or a file's."""
    import torch

    from ponder_scale.data.loader import Loader
    from ponder_scale.train import loop

    torch.set_num_threads(1)
    signals.install()
    control.LOOK_SECONDS = 0.0
    config = load(RunConfig, None, case["overrides"])
    original, calls = Loader.next_batches, []

    def happen(number: int) -> None:
        if number == case.get("at") and os.environ["RANK"] == str(case["rank"]):
            for event in case["events"]:
                if event.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, event))
                elif event == "time":
                    control.Control.seconds_left = lambda self: 1.0  # type: ignore[method-assign]
                else:
                    Path(config.run_dir, event).touch()

    def eventful(self: Any, *sequences: int) -> Any:
        calls.append(1)
        happen(len(calls))
        return original(self, *sequences)

    Loader.next_batches = eventful  # type: ignore[method-assign]
    happen(0)
    return loop.train(config)


SPARSE = ["checkpoint.every_steps=null", "train.time_limit=100:00:00", "train.steps=8"]
EVENTS = [  # rank, events, at which step of the attempt (0: before it, while all starts up), exit code
    (1, ["SIGTERM"], 0, AGAIN),
    (1, ["SIGUSR1", "SIGTERM"], 2, AGAIN),
    (0, ["time"], 1, AGAIN),
    (0, ["SAVE_AND_STOP"], 1, 0),
    (0, ["STOP"], 0, 0),
    (1, ["SIGINT"], 1, INTERRUPTED),
    (0, ["SAVE"], 1, 0),
]


def test_ranks_agree_on_every_event_and_the_run_goes_on_bit_for_bit(shards: Any, tmp_path: Path, fault: Fault) -> None:
    run_dir, base = tmp_path / "cut", overrides(tmp_path / "cut", shards, *SPARSE)
    cases = [{"overrides": base, "at": at, "rank": rank, "events": events} for rank, events, at, _ in EVENTS]
    results = run_ranks(train_with_an_event, [{"overrides": overrides(tmp_path / "whole", shards, *SPARSE)}, *cases])
    assert results == [[0, 0], *([code, code] for *_, code in EVENTS)]
    steps = [int(folder.name[-8:]) for folder in sorted((run_dir / "checkpoints").glob("step-*"))]
    assert steps == [2, 3, 4, 5, 6, 8]  # one for each event, and the last
    assert not requested(run_dir)
    ends = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"end"' in line]
    reasons = ["a signal", "a signal", "the time limit", "the file SAVE_AND_STOP", "the file STOP"]
    reasons += ["an interrupt", "done"]
    assert [(end["step"], end["reason"]) for end in ends] == list(zip([0, 2, 3, 4, 4, 5, 8], reasons, strict=True))
    assert_same_run(run_dir, tmp_path / "whole")
    for rank, events, at, code in EVENTS:
        injected = f"{' after '.join(reversed(events))}{f' to rank {rank}' if events[0].startswith('SIG') else ''}"
        phase = "a step" if at else "start-up"
        after = f"{'not saved, as asked' if events == ['STOP'] else 'saved'}; exit code {code}"
        fault(injected, phase, detected="all ranks, same step", after=after, lost="nothing")


def test_a_persons_wish_comes_before_a_schedulers(shards: Any, tmp_path: Path) -> None:
    case = {"overrides": overrides(tmp_path / "run", shards, *SPARSE), "at": 2, "rank": 0}
    assert run_ranks(train_with_an_event, [{**case, "events": ["SIGUSR2", "STOP"]}]) == [[0, 0]]
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


NOTHING = control.Seen(frozenset(), interrupt=False, again=False, out_of_time=False, late=False)
SIGNS = {
    "the file STOP": {"requests": frozenset({"STOP"})},
    "the file SAVE_AND_STOP": {"requests": frozenset({"SAVE_AND_STOP"})},
    "an interrupt": {"interrupt": True},
    "a signal": {"again": True},
    "the time limit": {"out_of_time": True},
    "the file SAVE": {"requests": frozenset({"SAVE"})},
    "checkpoint.every_minutes": {"late": True},
}


def test_each_order_is_wanted_for_its_own_sign_alone() -> None:
    assert [orders.reason for orders in control.ORDERS] == list(SIGNS)  # by precedence
    for reason, sign in SIGNS.items():
        seen = NOTHING._replace(**sign)
        assert [orders.reason for orders in control.ORDERS if orders.wanted(seen)] == [reason]
    assert not any(orders.wanted(NOTHING) for orders in control.ORDERS)
    assert {orders.request for orders in control.ORDERS} - {None} == set(REQUESTS)


def test_the_time_limit_leaves_time_for_a_step_and_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(control.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals, "started", 1000.0)
    limited = control.Control(tmp_path, "1:00:00", rank=0)
    limited.took(step=10.0, save=100.0)
    limited.took(step=12.0, save=90.0)
    limited.took(evaluation=40.0)
    # ends 60 s (margin) + 2.5 x 100 s (a scheduled save, and the last) + 2 x 12 s (step) + 40 s (evaluation) before
    now[0] = 1000.0 + 3600 - 375
    assert not limited.orders(limited.wishes()).stop
    now[0] += 2
    orders = limited.orders(limited.wishes())
    assert orders.save and orders.exit_code == AGAIN
    resumed = control.Control(tmp_path, "1:00:00", rank=0)
    resumed.took(load=300.0)  # no save is known: it may take as long
    now[0] = 1000.0 + 3600 - 60 - 2.5 * 300 + 1
    assert resumed.orders(resumed.wishes()).stop
    resumed.took(save=2.0)
    assert not resumed.orders(resumed.wishes()).stop
    assert control.Control(tmp_path, None, rank=0).wishes() == [0.0] * len(control.ORDERS)
    assert control.Control(tmp_path, "1", rank=1).wishes() == [0.0] * len(control.ORDERS)  # rank 0 has the clock


def train_within(case: dict[str, Any]) -> int:
    """Train as a process that has just started, or so many seconds ago."""
    from ponder_scale.train import loop

    signals.started = signals.imported = time.monotonic() - case.get("ago", 0.0)
    return loop.train(load(RunConfig, None, case["overrides"]))


def test_a_short_time_limit_is_used_and_one_too_short_for_a_step_is_refused(
    shards: Any, tmp_path: Path, fault: Fault
) -> None:
    base = overrides(tmp_path / "run", shards, "train.steps=6")
    cases = [
        {"overrides": [*base, "train.steps=2"]},
        {"overrides": [*base, "train.steps=4", "train.time_limit=160"]},  # no save is known, one of 60 s was feared
        {"overrides": [*base, "train.time_limit=100"], "ago": 90.0},
    ]
    first, short, refused = run_ranks(train_within, cases)
    assert first == short == [0, 0]
    for rank in refused:
        assert rank["error"].startswith("ConfigError: train.time_limit is 100 s, but this start took 9"), rank
        assert "so no time is left for a step; allow at least" in rank["error"]
    assert read_state(find(tmp_path / "run"))["step"] == 4
    fault(
        "a time limit too short for a step", "start-up", detected="before step 1", after="exit code 2", lost="nothing"
    )


def test_the_rest_of_a_long_time_limit_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start late in a job's stay leaves to be started again: the next stay is a whole one."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for moment, seconds in (("START", -86000), ("END", 100)):
        monkeypatch.setenv(f"SLURM_JOB_{moment}_TIME", str(time.time() + seconds))
    late = control.Control(tmp_path, "slurm", rank=0)
    assert late.refusal() is None and late.orders(late.wishes()).exit_code == AGAIN
    for moment, seconds in (("START", -90), ("END", 30)):
        monkeypatch.setenv(f"SLURM_JOB_{moment}_TIME", str(int(time.time()) + seconds))
    monkeypatch.setattr(signals, "imported", time.monotonic() - 90)
    refusal = control.Control(tmp_path, "slurm", rank=0).refusal()
    assert refusal is not None and refusal.startswith(
        "the time limit of Slurm job 7 is 120 s, but this start took 90 s"
    )


@pytest.mark.parametrize("value", ["0", "29", "00:00:20"])
def test_a_time_limit_shorter_than_a_start_is_refused_before_it(value: str) -> None:
    with pytest.raises(ConfigError, match=f"train.time_limit is {value}; expected at least 30 s"):
        control.check_time_limit(value)
    for fine in ("30", "00:30", "slurm", None):
        control.check_time_limit(fine)


def test_a_process_that_starts_over_keeps_its_time_limit_and_its_interrupt() -> None:
    """A rewind runs the command again in the same process; the launcher's clock goes on."""
    script = """
import os, sys, time
from ponder_scale.train.survive import signals
signals.install()
if os.environ.setdefault("ROUND", "1") == "1":
    os.environ["ROUND"] = "2"
    signals.received.interrupt = True
    time.sleep(1.0)
    signals.start_over()
time.sleep(0.1)
print(time.monotonic() - signals.started, signals.received)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    age, received = done.stdout.split(" ", 1)
    assert 1.0 < float(age) < 30.0 and "interrupt=True" in received


def test_the_time_limit_is_read_as_people_and_slurm_write_it() -> None:
    cases = {"90": 90, "1.5": 1.5, "30:00": 1800, "12:00:00": 43200, "1-12:00:00": 129600}
    cases |= {"1-12:30": 131400, "1-12": 129600, "2-00:00:30": 172830}
    assert {text: control.parse_time_limit(text) for text in cases} == cases
    with pytest.raises(ConfigError, match=r"train\.time_limit is soon; expected seconds, HH:MM:SS"):
        control.parse_time_limit("soon")


def test_the_time_limit_of_a_slurm_job_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert control.Control(tmp_path, "slurm", rank=0).seconds_left() == float("inf")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 500))
    assert 400 < control.Control(tmp_path, "slurm", rank=0).seconds_left() <= 501
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "--noheader --jobs 7 --format %L" ] && echo 1-00:00:00\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert 86300 < control.Control(tmp_path, "slurm", rank=0).seconds_left() <= 86400
    squeue.write_text("#!/bin/sh\necho slurm_load_jobs error >&2; exit 1\n")
    assert control.Control(tmp_path, "slurm", rank=0).seconds_left() == float("inf")


def test_a_signal_in_the_first_moment_is_remembered(command: Callable[..., Command], fault: Fault) -> None:
    """Held back until the handlers are there, which is before torch is imported; without them it would kill."""
    started = command(*ENDLESS, held_back=True)
    started.process.send_signal(signal.SIGTERM)
    printed = started.output()
    assert started.process.returncode == AGAIN, printed
    assert "Traceback" not in printed
    fault("SIGTERM", "before torch is imported", detected="at the first chance", after="exit code 85", lost="nothing")


def test_preemption_of_a_running_command_saves_and_asks_to_be_started_again(
    command: Callable[..., Command], tmp_path: Path
) -> None:
    """The pains of pytorch/torchtitan#810 and Lightning-AI/pytorch-lightning#4265: preempted, the work is there."""
    started = command(*ENDLESS)
    ranks = started.ranks()
    os.kill(ranks[1], signal.SIGSTOP)  # else both write at once, into each other's lines
    wait_until(lambda: state(ranks[1]) == "T")  # of signals that wait together the lowest number comes first
    started.process.send_signal(signal.SIGUSR1)  # stacks of all ranks, and on with it
    wait_until(lambda: has_signal(ranks[1], "ShdPnd") and not has_signal(ranks[0], "ShdPnd", "SigPnd", "SigBlk"))
    os.kill(ranks[1], signal.SIGCONT)
    os.kill(ranks[1], signal.SIGUSR2)  # one rank knows; both act
    printed = started.output()
    assert started.process.returncode == AGAIN, printed
    assert printed.count("in main\n") >= 2  # the stack of each rank down to the command line
    newest = newest_whole(tmp_path / "run")
    assert newest is not None
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    end = records[-1]
    assert (end["event"], end["reason"], end["exit_code"]) == ("end", "a signal", AGAIN)
    assert end["step"] == read_state(newest)["step"]


def test_a_killed_rank_ends_the_others_and_a_killed_launcher_ends_its_ranks(
    command: Callable[..., Command], tmp_path: Path, fault: Fault
) -> None:
    started = command(*ENDLESS)
    ranks = started.ranks()
    os.kill(ranks[1], signal.SIGKILL)
    printed = started.output()
    assert started.process.returncode in (1, 128 + signal.SIGKILL), printed  # rank 0 may be the first to be seen
    assert not any(alive(rank) for rank in ranks)
    fault("SIGKILL of rank 1", "a step", detected="by the launcher", after="all ranks ended", lost="nothing saved")

    again = command(*ENDLESS)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    ranks = again.ranks()
    again.process.kill()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(alive(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert read_state(find(tmp_path / "run"))["step"] > 0
    fault("SIGKILL of the launcher", "a step", detected="by every rank", after="saved; ranks ended", lost="nothing")
