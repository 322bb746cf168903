"""Runs that are injured while they save, or whose checkpoints are damaged, lose nothing that was saved.

Answers: saves that hang and partial checkpoints (DeepSpeed 942, 1748, 4781).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.checkpoint.find import find, verify
from ponder_scale.checkpoint.index import ASIDE, saved_steps
from ponder_scale.errors import UNHEALTHY, SaveError
from ponder_scale.runs.report import report
from ponder_scale.runs.status import status
from tests.faults import Fault
from tests.ranks import KILLED, run_ranks
from tests.train.runs import (
    STEPS,
    assert_same_run,
    assert_same_state,
    overrides,
    records,
    resumed_from,
    train_on_a_rank,
)

pytestmark = pytest.mark.faults

DONE = ["done", "done"]
MOMENTS = {  # every other one with asynchronous saving, whose second half is the same code on a thread
    "rank 1, before its part": {"rank": 1, "at": "write_part", "how": "kill"},
    "rank 1, its part written": {"rank": 1, "at": "write_part", "how": "kill after"},
    "rank 1, its part not yet on disk": {"rank": 1, "at": "sync", "call": 2, "how": "kill"},
    "rank 0, before the index": {"rank": 0, "at": "_seal", "how": "kill"},
    "rank 0, between index and rename": {"rank": 0, "at": "_write_json", "call": 4, "how": "kill after"},
    "rank 0, after the rename": {"rank": 0, "at": "_seal", "how": "kill after"},
    "rank 0, before deleting older ones": {"rank": 0, "at": "_delete_older", "how": "kill"},
}


@pytest.fixture(scope="module")
def whole(shards: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(train_on_a_rank, [{"overrides": overrides(run_dir, shards)}]) == [DONE]
    return run_dir


def test_a_run_killed_at_any_moment_of_a_save_goes_on_from_a_whole_checkpoint(
    shards: Any, whole: Path, tmp_path: Path, fault: Fault
) -> None:
    cases = []
    for number, moment in enumerate(MOMENTS.values()):
        case = overrides(tmp_path / str(number), shards, f"checkpoint.asynchronous={str(number % 2 == 1).lower()}")
        cases += [{"overrides": case, "fault": moment}, {"overrides": case}]
    results = run_ranks(train_on_a_rank, cases)
    for number, (name, moment) in enumerate(MOMENTS.items()):
        killed, resumed = results[2 * number : 2 * number + 2]
        assert killed[moment["rank"]] == KILLED, name
        assert resumed == DONE, (name, resumed)
        assert_same_run(tmp_path / str(number), whole)
        assert resumed_from(tmp_path / str(number))[1] is not None, name
        fault(
            f"SIGKILL: {name}",
            "save, asynchronous" if number % 2 else "save",
            detected="at the restart",
            after="newest whole checkpoint",
            lost="nothing saved",
        )


def test_a_full_disk_is_survived_and_a_disk_that_stays_full_ends_the_run(
    shards: Any, whole: Path, tmp_path: Path, fault: Fault
) -> None:
    once, ever = (overrides(tmp_path / name, shards) for name in ("once", "ever"))
    full = {"rank": 1, "at": "write_part", "how": "full"}
    survived, ended, resumed = run_ranks(
        train_on_a_rank,
        [
            {"overrides": once, "fault": full},
            {"overrides": [*ever, "checkpoint.asynchronous=true"], "fault": {**full, "calls": 3}},
            {"overrides": ever},
        ],
    )
    assert survived == DONE
    assert_same_run(tmp_path / "once", whole)
    assert sorted(saved_steps(tmp_path / "once")) == [1, 3, 4]
    (alarm,) = (line for line in events(tmp_path / "once") if line["event"] == "alarm")
    assert alarm["step"] == 2 and "rank 1: OSError: [Errno 27]" in alarm["message"]
    fault(
        "disk full once, at one rank",
        "save",
        detected="alarm on all ranks",
        after="trains on, next save",
        lost="nothing",
    )
    for rank in ended:
        assert rank["error"].startswith("SaveError: the checkpoint of step 4 could not be saved: rank 1: OSError")
        assert "step 1 is saved; free space on the disk of" in rank["error"] and "and start again" in rank["error"]
    assert SaveError.exit_code == UNHEALTHY
    assert resumed == DONE
    assert_same_run(tmp_path / "ever", whole)
    fault(
        "disk full, three saves long",
        "save",
        detected="all ranks end, exit 87",
        after="older are whole",
        lost="nothing saved",
    )


@pytest.mark.parametrize("damage", ["flipped byte", "file missing"])
def test_a_damaged_newest_checkpoint_is_put_aside_and_its_steps_computed_again(
    damage: str, shards: Any, whole: Path, tmp_path: Path, fault: Fault
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    part = find(run_dir) / "rank-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.unlink() if damage == "file missing" else part.write_bytes(content)
    assert run_ranks(train_on_a_rank, [{"overrides": overrides(run_dir, shards)}]) == [DONE]
    assert_same_run(run_dir, whole)
    assert verify(find(run_dir)) == [] and find(run_dir).name == f"step-{STEPS:08d}"
    assert (run_dir / "checkpoints" / f"{ASIDE}step-{STEPS:08d}").is_dir()
    fault(
        f"{damage}, newest checkpoint",
        "resume",
        detected="by its hash",
        after="the one before; damaged put aside",
        lost="nothing",
    )


def test_an_old_writer_is_fenced_out_and_touches_nothing(
    shards: Any, whole: Path, tmp_path: Path, fault: Fault
) -> None:
    """An old process is stopped in the worst moment, a new one takes the run over, and the old one wakes up."""
    run_dir, pid_file = tmp_path / "run", tmp_path / "pid"
    case = {"overrides": overrides(run_dir, shards), "pid_file": str(pid_file)}
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(run_ranks, train_on_a_rank, [{**case, "fault": {"rank": 0, "at": "_seal", "how": "stop"}}])
        while not pid_file.is_file():
            assert not old.done(), old.result()
            time.sleep(0.05)
        assert run_ranks(train_on_a_rank, [case]) == [DONE]
        before = contents(run_dir)
        os.kill(int(pid_file.read_text()), signal.SIGCONT)
        (ranks,) = old.result()
    assert all(rank["error"].startswith("FencedError") for rank in ranks), ranks
    assert "attempt 2 has taken the run over" in ranks[0]["error"]
    assert contents(run_dir) == before
    assert_same_run(run_dir, whole)
    fault(
        "second writer on the same run",
        "save",
        detected="its attempt number",
        after="old one ends, writes nothing",
        lost="nothing",
    )


def train_with_a_bad_evaluation(case: dict[str, Any]) -> str:
    """Train; at the evaluation of step `fails` the ranks named fail, or all losses are a thousand times larger."""
    from ponder_scale.train import loop
    from ponder_scale.train.zero.engine import Engine

    original, predict = loop.loss_sums, Engine.predict

    def failing(*arguments: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) in case["ranks"]:
            raise ValueError("a held-out shard is sick")
        return original(*arguments, **options)

    def large(self: Any, *arguments: Any) -> Any:
        output = predict(self, *arguments)
        output.pass_losses = 1000 * output.pass_losses
        return output

    if case.get("ranks"):
        loop.loss_sums = failing
    else:
        Engine.predict = large  # type: ignore[method-assign]
    return train_on_a_rank(case)


def test_an_evaluation_that_fails_costs_no_step(shards: Any, whole: Path, tmp_path: Path, fault: Fault) -> None:
    """At a step that the settings do not save, on one rank or on all; and after the last step."""
    sparse = ["checkpoint.every_steps=null", "evaluate.every_steps=3"]
    runs = {
        "one": {"ranks": [1], "overrides": overrides(tmp_path / "one", shards, *sparse)},
        "all": {"ranks": [0, 1], "overrides": overrides(tmp_path / "all", shards, *sparse, "train.deepspeed=zero3")},
        "last": {"ranks": [0], "overrides": overrides(tmp_path / "last", shards, "checkpoint.asynchronous=true")},
    }
    results = dict(zip(runs, run_ranks(train_with_a_bad_evaluation, list(runs.values())), strict=True))
    for name, case in runs.items():
        for rank in range(2):
            said = results[name][rank]["error"]
            assert said.endswith("is sick" if rank in case["ranks"] else "failed on another rank; see its log"), said
        assert int(find(tmp_path / name).name[-8:]) == (STEPS if name == "last" else 3)
    goes_on = [{"overrides": runs[name]["overrides"]} for name in ("one", "last")]
    assert run_ranks(train_on_a_rank, goes_on) == [DONE, DONE]
    for name in ("one", "last"):
        assert_same_state(find(tmp_path / name), find(whole))
    assert_same_run(tmp_path / "last", whole)  # what it owed of the last step, too
    assert [line["step"] for line in records(tmp_path / "one") if line["event"] == "evaluation"] == [3, STEPS]
    for injected in ("on one rank", "on all ranks", "after the last step"):
        fault(f"evaluation fails {injected}", "evaluate", detected="by all ranks", after="step saved", lost="nothing")


def test_a_held_out_loss_beyond_every_bound_ends_no_run_and_no_report(
    shards: Any, tmp_path: Path, fault: Fault
) -> None:
    case = {"overrides": overrides(tmp_path / "run", shards, "evaluate.every_steps=2")}
    assert run_ranks(train_with_a_bad_evaluation, [case], world_size=1) == [["done"]]
    evaluations = [line for line in records(tmp_path / "run") if line["event"] == "evaluation"]
    assert [min(line["losses"]) > 710 for line in evaluations] == [True, True]
    assert "perplexity by pass inf inf inf, at step 4" in "\n".join(status(tmp_path / "run"))
    report([tmp_path / "run"], tmp_path / "page.html")
    fault("held-out loss above 709 nats", "evaluate", detected="inf", after="trains on; shown as inf", lost="nothing")


def train_with_a_slow_disk(case: dict[str, Any]) -> str:
    """Train; no part of a step but the last is written before the next step has begun to read its data."""
    from ponder_scale.checkpoint import save as checkpoint
    from ponder_scale.data.loader import Loader

    begun, changed = [0], threading.Condition()
    next_batches, write_part = Loader.next_batches, checkpoint.write_part

    def counting(self: Any, *sequences: int) -> Any:
        with changed:
            begun[0] += 1
            changed.notify_all()
        return next_batches(self, *sequences)

    def slow(path: Path, *arguments: Any) -> Any:
        step = int(path.parent.name[-8:])
        with changed:
            assert step == STEPS or changed.wait_for(lambda: begun[0] > step + 1, timeout=60)
        return write_part(path, *arguments)

    Loader.next_batches, checkpoint.write_part = counting, slow  # type: ignore[method-assign]
    return train_on_a_rank(case)


def test_asynchronous_saves_hold_what_synchronous_ones_hold(shards: Any, tmp_path: Path) -> None:
    """While training has gone on: a save that shared memory with it would hold the later step."""
    stages = [("zero0", "bf16"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16")]
    cases = {}
    for kind in ("sync", "async"):
        for stage, precision in stages:
            settings = [f"train.deepspeed={stage}", f"train.precision={precision}", "checkpoint.every_steps=2"]
            settings.append(f"checkpoint.asynchronous={str(kind == 'async').lower()}")
            cases[kind, stage] = {"overrides": overrides(tmp_path / (kind + stage), shards, *settings)}
    usual = [case for (kind, _), case in cases.items() if kind == "sync"]
    behind = [case for (kind, _), case in cases.items() if kind == "async"]
    assert run_ranks(train_on_a_rank, usual) == [DONE] * len(stages)
    assert run_ranks(train_with_a_slow_disk, behind) == [DONE] * len(stages)
    for stage, _ in stages:
        runs = [tmp_path / (kind + stage) for kind in ("async", "sync")]
        assert records(runs[0]) == records(runs[1])
        saved = [saved_steps(run) for run in runs]
        assert sorted(saved[0]) == sorted(saved[1]) == [2, STEPS]
        for step in saved[0]:
            assert_same_state(saved[0][step], saved[1][step])
        saves = [line for line in events(runs[0]) if line["event"] == "save"]
        assert [(line["step"], line["reason"]) for line in saves] == [(2, "schedule"), (STEPS, "last step")]
        for line in saves:
            size = sum(path.stat().st_size for path in saved[0][line["step"]].rglob("*") if path.is_file())
            assert line["bytes"] == size and line["write_seconds"] > 0 and line["stall_seconds"] >= 0


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
