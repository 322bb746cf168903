"""What moves a run to another time or place: limits, rivals, and nodes that are lost, drained or sick."""

from __future__ import annotations

import time

from tests.slurm.runs import STEPS, Place, count, hosts, train


def at_the_time_limit_a_run_saves_requeues_and_ends_with_the_losses_of_an_uninterrupted_one(place: Place) -> None:
    """Slurm sends the signal up to a minute early: 30 to 70 s after the start, between two checkpoints or in step 1."""
    run = train(place, sbatch=("--exclusive", "--time=2", "--signal=B:USR2@50"), STEP_SECONDS="3")
    assert run.ended() == "COMPLETED", run.log
    assert int(place.lab.show(run.job)["Restarts"]) >= 1
    assert "SIGUSR2: the ranks save" in run.log and "back to the queue" in run.log
    assert run.losses() == place.reference().losses()
    assert [step for step, _ in run.losses()] == list(range(1, STEPS + 1))


def after_a_power_cut_the_run_goes_on_with_another_node_as_if_nothing_had_been(place: Place) -> None:
    run = train(place, STEP_SECONDS="0.5")
    run.until_step(9)
    place.lab.run("labnode", "down", hosts(run)[0].split(",")[1])
    assert run.ended() == "COMPLETED", run.log
    first, second = hosts(run)
    assert first.split(",")[1] not in second.split(",")
    assert run.losses() == place.reference().losses()


def a_rank_behind_a_cut_cable_cannot_write_once_the_run_goes_on_elsewhere(place: Place) -> None:
    """It still reaches the file system and trains on by itself, next to its successor, until it wants to save."""
    run = train(place, "train.steps=120", nodes=1, STEP_SECONDS="1")
    run.until_step(9)
    cable = hosts(run)[0].replace("n", "v")
    place.lab.run("ip", "link", "set", cable, "down")
    place.lab.until(lambda: "has taken the run over" in run.rank_log(0, 0), "the older rank stopped")
    assert run.ended() == "COMPLETED", run.log
    place.lab.run("ip", "link", "set", cable, "up")
    first, second = hosts(run)
    assert first != second
    assert [step for step, _ in run.losses()] == list(range(1, 121))
    assert run.whole()[-1] == 120


def a_preempted_run_saves_and_goes_on_later(place: Place) -> None:
    run = train(place, nodes=1, sbatch=("--exclusive", "--partition=low", "--nodelist=n20"), STEP_SECONDS="0.5")
    run.until_step(3)
    rival = place.lab.sbatch(
        "--partition=high", "--exclusive", "--nodelist=n20", "--output=/dev/null", "--wrap=sleep 3"
    )
    assert run.ended() == "COMPLETED", run.log
    assert place.lab.state(rival) == "COMPLETED"
    assert int(place.lab.show(run.job)["Restarts"]) >= 1
    assert [step for step, _ in run.losses()] == list(range(1, STEPS + 1))
    assert "continuing from" in run.rank_log(1, 0)


def a_drained_node_is_left_for_a_spare(place: Place) -> None:
    run = count(place, "to=60", nodes=3, sbatch=("--exclusive", "--exclude=n[11-20]"), SPARES="1")
    run.until_said("trains on")
    first = hosts(run)[0].split(",")
    place.lab.until(lambda: (run.folder / "heartbeat").exists())
    place.lab.run("scontrol", "update", f"nodename={first[0]}", "state=drain", "reason=test")
    assert run.ended() == "COMPLETED", run.log
    place.lab.run("scontrol", "update", f"nodename={first[0]}", "state=resume")
    assert len(hosts(run)) == 2 and first[0] not in hosts(run)[1].split(",")
    assert "back to the queue" not in run.log


def without_a_spare_a_drained_node_sends_the_run_to_the_queue(place: Place) -> None:
    run = count(place, "to=60", sbatch=("--exclusive", "--exclude=n[11-20]"))
    run.until_said("trains on")
    first = hosts(run)[0].split(",")
    place.lab.until(lambda: (run.folder / "heartbeat").exists())
    place.lab.run("scontrol", "update", f"nodename={first[1]}", "state=drain", "reason=test")
    assert run.ended() == "COMPLETED", run.log
    place.lab.run("scontrol", "update", f"nodename={first[1]}", "state=resume")
    assert len(hosts(run)) == 2 and first[1] not in hosts(run)[1].split(",")
    assert "back to the queue" in run.log


def a_spare_takes_the_place_of_a_node_that_lost_its_power(place: Place) -> None:
    """With --no-kill the job goes on: no wait in the queue."""
    options = ("--exclusive", "--no-kill", "--exclude=n[11-20]")
    run = count(place, "to=500", "save_every=5", nodes=3, sbatch=options, SPARES="1")
    place.lab.until(lambda: (run.folder / "latest").exists())
    lost = hosts(run)[0].split(",")[1]
    place.lab.run("labnode", "down", lost)
    place.lab.until(lambda: len(hosts(run)) == 2, "the second attempt")
    assert lost not in hosts(run)[1].split(",") and "back to the queue" not in run.log
    place.lab.run("scancel", run.job)


def broken_node(place: Place) -> str:
    """A check that fails on the last node of the first list it sees."""
    path = place.folder / "check node"
    path.write_text('#!/bin/bash\n[ "$SLURMD_NODENAME" != "$(cat "$1/sick" 2>/dev/null)" ]\n')
    path.chmod(0o755)
    return str(path)


def a_sick_node_is_left_out_after_the_requeue(place: Place) -> None:
    (place.folder / "run").mkdir()
    (place.folder / "run" / "sick").write_text("n17\n")
    # one of the two that it may have at first is sick; after that, any will do
    run = count(place, "to=10", sbatch=("--exclude=n[1-15,18-20]",), CHECK_NODE=broken_node(place))
    run.until_said("back to the queue, without n17")
    place.lab.until(lambda: place.lab.show(run.job)["ExcNodeList"] != "n[1-15,18-20]", "n17 on the list")
    time.sleep(3)  # in which the script may put it there once more, and then is ended
    place.lab.run("scontrol", "update", f"JobId={run.job}", "ExcNodeList=n[1-11,17]")
    assert run.ended() == "COMPLETED", run.log
    assert "not fit to train: n17" in run.log and len(hosts(run)) == 1
    assert "n17" not in hosts(run)[0].split(",")


def a_spare_takes_the_place_of_a_sick_node(place: Place) -> None:
    (place.folder / "run").mkdir()
    (place.folder / "run" / "sick").write_text("n12\n")
    run = count(place, "to=10", nodes=3, sbatch=("--nodelist=n[11-13]",), SPARES="1", CHECK_NODE=broken_node(place))
    assert run.ended() == "COMPLETED", run.log
    assert hosts(run) == ["n11,n13"]


SCENARIOS = [
    at_the_time_limit_a_run_saves_requeues_and_ends_with_the_losses_of_an_uninterrupted_one,
    after_a_power_cut_the_run_goes_on_with_another_node_as_if_nothing_had_been,
    a_rank_behind_a_cut_cable_cannot_write_once_the_run_goes_on_elsewhere,
    a_preempted_run_saves_and_goes_on_later,
    a_drained_node_is_left_for_a_spare,
    without_a_spare_a_drained_node_sends_the_run_to_the_queue,
    a_spare_takes_the_place_of_a_node_that_lost_its_power,
    a_sick_node_is_left_out_after_the_requeue,
    a_spare_takes_the_place_of_a_sick_node,
]
