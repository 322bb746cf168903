"""What sites and users do in another way than the templates do by themselves."""

from __future__ import annotations

import re
import shutil
import sys

from tests.slurm.lab import REPOSITORY
from tests.slurm.runs import NO_GPUS, Place, Run, count, hosts


def a_job_that_takes_no_environment_along_trains(place: Place) -> None:
    """`--export=NONE`, as some sites demand it: what the tasks have comes from site.sh, the address too."""
    shutil.copytree(REPOSITORY / "slurm", place.folder / "slurm")
    (place.folder / ".venv").symlink_to(sys.prefix)
    with (place.folder / "slurm" / "site.sh").open("a") as site:
        site.write(f"POLL_SECONDS=1\nponder_scale=(python {REPOSITORY}/tests/slurm/contract.py)\n")
        site.write("master_addr() { echo 10.77.0.${1#n}; }\n")
    run_dir = place.folder / "run"
    options = ["--export=NONE", "--nodes=2", "--ntasks-per-node=1", *NO_GPUS, f"--output={run_dir}.log"]
    words = ["slurm/train.sbatch", "-", f"run_dir={run_dir}", "to=3"]
    run = Run(place, run_dir, place.lab.sbatch(*options, *words, cwd=place.folder, MASTER_ADDR="of.another.job"))
    assert run.ended() == "COMPLETED", run.log
    first = hosts(run)[0].split(",")[0]
    assert f"meets at 10.77.0.{first[1:]}" in run.rank_log(0, 1), run.rank_log(0, 1)


def ntasks_of_sbatch_counts_the_ranks(place: Place) -> None:
    """Against the head's `--ntasks-per-node=8`, which then is a bound."""
    bound = ("--ntasks-per-node=8", "--ntasks=2")
    run = count(place, "to=3", nodes=1, sbatch=bound, MASTER_ADDR="of.another.job")
    assert run.ended() == "COMPLETED", run.log
    logs = sorted(path.name for path in (run.folder / "logs" / f"{run.job}-0").iterdir())
    assert logs == ["rank-0000.log", "rank-0001.log"]
    assert f"meets at {hosts(run)[0]}" in run.rank_log(0, 1)
    odd = count(place, "to=3", sbatch=("--ntasks-per-node=8", "--ntasks=3"), name="odd")
    assert odd.ended() == "FAILED"
    assert "error: --ntasks=3 on 2 nodes; expected a multiple" in odd.log


def a_check_that_fails_on_every_node_leaves_none_out(place: Place) -> None:
    """It is the check, or what all nodes share; of a job of one node that is known when a second one fails."""
    check = place.folder / "check"
    check.write_text('#!/bin/bash\n[ -e "$1/mended" ]\n')
    check.chmod(0o755)
    two = count(place, "to=3", CHECK_NODE=str(check))
    one = count(place, "to=3", nodes=1, name="one", CHECK_NODE=str(check))
    for run in (two, one):
        run.until_said("the check fails on every node, so none is left out")
        run.until_said("back to the queue\n")
        (run.folder / "mended").touch()
    assert [run.ended() for run in (two, one)] == ["COMPLETED", "COMPLETED"], (two.log, one.log)
    assert "without" not in two.log and "not fit to train" not in two.log
    assert place.lab.show(two.job)["ExcNodeList"] == "(null)"
    left_out = re.findall(r"back to the queue, without (\S+)", one.log)
    assert len(left_out) == 1 and place.lab.show(one.job)["ExcNodeList"] == left_out[0], one.log


SCENARIOS = [
    a_check_that_fails_on_every_node_leaves_none_out,
    a_job_that_takes_no_environment_along_trains,
    ntasks_of_sbatch_counts_the_ranks,
]
