"""What ends a run or an attempt: faults, people, mistakes."""

from __future__ import annotations

import re
import time

from tests.slurm.runs import Place, count, hosts, train


def a_hang_leaves_stacks_of_all_ranks_and_the_run_goes_on(place: Place) -> None:
    """The trainer's own watchdog."""
    run = train(place, "health.hang_seconds=8", HANG="10:1")
    assert run.ended() == "COMPLETED", run.log
    assert "exit code 86" in run.log
    for rank, where in ((0, "all_reduce|wait|all_gather"), (1, "stand_still")):
        assert re.search(rf'File ".*in .*({where})', run.rank_log(0, rank)), run.rank_log(0, rank)[-2000:]
    assert len(hosts(run)) == 2 and "back to the queue" not in run.log
    assert run.losses() == place.reference().losses()


def a_hang_that_the_trainer_does_not_see_is_ended_by_the_job_script(place: Place) -> None:
    run = count(place, "to=30", "hang_at=14", "save_every=5", HANG_SECONDS="4")
    assert run.ended() == "COMPLETED", run.log
    assert "no sign of life for 4 s" in run.log and len(hosts(run)) == 2
    for rank in (0, 1):
        assert "in wait_for_ever" in run.rank_log(0, rank)


def scancel_ends_a_run_that_has_saved(place: Place) -> None:
    run = train(place, "checkpoint.every_steps=null", nodes=1, STEP_SECONDS="0.5")
    run.until_step(3)
    place.lab.run("scancel", run.job)
    run.until_said("ended from outside: not requeued")
    assert run.whole() and run.whole()[0] >= 3
    time.sleep(8)  # a requeued job would be back
    assert place.lab.state(run.job) == "CANCELLED"
    assert len(hosts(run)) == 1


def a_crash_before_any_progress_is_not_repeated(place: Place) -> None:
    run = count(place, "to=30", "crash_at=4")
    assert run.ended() == "FAILED"
    assert len(hosts(run)) == 1 and "no node is to blame: not repeated" in run.log


def a_crash_after_a_checkpoint_is_repeated_in_place(place: Place) -> None:
    run = count(place, "to=30", "crash_at=14", "save_every=5")
    assert run.ended() == "COMPLETED", run.log
    assert len(hosts(run)) == 2 and "back to the queue" not in run.log
    assert "begins at 10" in run.rank_log(1, 0)


def a_crash_of_the_trainer_loses_no_step(place: Place) -> None:
    """The real one, on a node that fails its check from then on: a spare takes its place."""
    (place.folder / "run").mkdir()
    check = place.folder / "check"
    check.write_text('#!/bin/bash\n[ ! -e "$1.fault" ] || [ "$SLURMD_NODENAME" != "$(cat "$1/second")" ]\n')
    check.chmod(0o755)
    run = train(place, nodes=3, SPARES="1", CRASH="10:1", CHECK_NODE=str(check))
    run.until_said("trains on")
    first = hosts(run)[0].split(",")
    (run.folder / "second").write_text(first[1] + "\n")
    assert run.ended() == "COMPLETED", run.log
    assert len(hosts(run)) == 2 and first[1] not in hosts(run)[1].split(",") and "back to the queue" not in run.log
    assert f"not fit to train: {first[1]}" in run.log
    assert run.losses() == place.reference().losses()


def crashes_are_repeated_within_a_budget(place: Place) -> None:
    run = count(place, "to=900", "crash_every=7", "save_every=5", MAX_FAILURES="3")
    assert run.ended() == "FAILED"
    assert len(hosts(run)) == 3 and "gives up after 3 failures" in run.log


def what_a_person_must_look_at_is_not_repeated(place: Place) -> None:
    for code in (2, 87):
        run = count(place, "to=9", f"code={code}", name=f"run {code}")
        assert run.ended() == "FAILED"
        assert len(hosts(run)) == 1


SCENARIOS = [
    a_hang_leaves_stacks_of_all_ranks_and_the_run_goes_on,
    a_hang_that_the_trainer_does_not_see_is_ended_by_the_job_script,
    scancel_ends_a_run_that_has_saved,
    a_crash_before_any_progress_is_not_repeated,
    a_crash_after_a_checkpoint_is_repeated_in_place,
    crashes_are_repeated_within_a_budget,
    a_crash_of_the_trainer_loses_no_step,
    what_a_person_must_look_at_is_not_repeated,
]
