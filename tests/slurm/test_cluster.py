"""The templates on a real Slurm: what happens to runs through all that happens to clusters.

Each scenario is a story with its jobs; all those that were chosen run at the same time, since most of them wait. They
train with the real trainer (faulty.py adds faults from outside); where only the job script is under test, contract.py
counts in its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from ponder_scale.train.launch import free_port
from tests.slurm import ends, habits, moves, work
from tests.slurm.lab import REPOSITORY, SCRIPT, Lab
from tests.slurm.runs import Place, Run, train

AT_ONCE = 6
SCENARIOS = [*moves.SCENARIOS, *work.SCENARIOS, *habits.SCENARIOS, *ends.SCENARIOS]  # those that wait long come first


@pytest.fixture(scope="module")
def stories(
    request: pytest.FixtureRequest, lab: Lab, shards: Path, corpus: Path, tiny_tokenizer: Path, tmp_path_factory: Any
) -> Iterator[dict[str, Future[None]]]:
    """The chosen scenarios, all begun."""
    chosen = {item.callspec.params["scenario"] for item in request.session.items if "stories" in item.fixturenames}
    folder, lock = tmp_path_factory.mktemp("runs of the lab"), Lock()

    @cache
    def uninterrupted() -> Run:
        run = train(place("uninterrupted"))
        assert run.ended() == "COMPLETED", run.log
        return run

    def reference() -> Run:
        with lock:  # whoever needs it first trains it
            return uninterrupted()

    def place(name: str) -> Place:
        (folder / name).mkdir()
        return Place(lab, folder / name, shards, corpus, tiny_tokenizer, reference)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            scenario.__name__: pool.submit(scenario, place(scenario.__name__))
            for scenario in SCENARIOS
            if scenario in chosen
        }


def test_every_template_is_what_slurm_accepts(lab: Lab) -> None:
    """Before the scenarios begin: some of them take nodes away."""
    templates = sorted(path.name for path in (REPOSITORY / "slurm").glob("*.sbatch"))
    assert len(templates) == 5
    for name in templates:
        assert "to start at" in lab.run("sbatch", "--test-only", f"slurm/{name}").stderr
    assert "to start at" in lab.run("sbatch", "--test-only", "--nodes=18", "--no-kill", "slurm/train.sbatch").stderr
    refused = lab.run("sbatch", "--test-only", "--nodes=99", "slurm/train.sbatch", check=False)
    assert refused.returncode and "not available" in refused.stderr


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_on_the_cluster(scenario: Callable[[Place], None], stories: dict[str, Future[None]]) -> None:
    stories[scenario.__name__].result()


@pytest.mark.usefixtures("slurm")
def test_the_lab_needs_no_root() -> None:
    with tempfile.TemporaryDirectory() as folder:  # another user may not read the folder of the repository
        script = shutil.copy(SCRIPT, folder)
        Path(folder).chmod(0o755)
        _run_without_root(script)


def _run_without_root(script: str) -> None:
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    words = [*user, script, "-n", "2", "srun", "--nodes=2", "hostname"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if "unshare failed" in done.stderr:
        pytest.skip("this system lets only root make namespaces")
    assert sorted(done.stdout.split()) == ["n1", "n2"], done.stderr


ALL_REDUCE = REPOSITORY / "slurm" / "all_reduce.py"


def exchanged(scripts: list[Path], *, world_size: int) -> list[str]:
    """What ranks of nodes of one rank each print when they check that they can exchange data."""
    port, ranks = free_port(), []
    for rank, script in enumerate(scripts):
        shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank}", "CUDA_VISIBLE_DEVICES": ""}
        variables = {**os.environ, **shared, **own, "MASTER_PORT": port}
        words = [sys.executable, str(script), "30"]
        ranks.append(subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, text=True))
    return [rank.communicate(timeout=120)[0] for rank in ranks]


def test_ranks_that_do_not_come_condemn_their_nodes() -> None:
    assert exchanged([ALL_REDUCE] * 2, world_size=3) == ["n0\n", "n1\n"]


def test_a_node_that_cannot_exchange_within_itself_condemns_itself_alone(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        f"import sys\nsys.path.insert(0, {str(ALL_REDUCE.parent)!r})\nimport all_reduce\n"
        "def exchange(*_):\n    raise RuntimeError('link down')\n"
        "all_reduce.exchange = exchange\nall_reduce.main()\n"
    )
    assert exchanged([ALL_REDUCE, broken, ALL_REDUCE], world_size=3) == ["n0\n", "", "n2\n"]


GPU = "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d2e)\\n"
MIG = "  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4)\\n"


@pytest.mark.parametrize(
    ("listed", "ecc", "slowdown", "said"),
    [
        (2 * GPU, "0, 0\n1, 0", "0, Not Active\n1, Not Active", ""),
        (GPU, "0, 0", "0, Not Active", "Slurm gave 2 GPUs, 1 are visible"),
        (GPU + 2 * MIG, "0, 0", "0, Not Active", ""),  # Slurm counts what one GPU is split into
        (GPU + MIG, "0, 0", "0, Not Active", "Slurm gave 2 GPUs, 1 are visible"),
        (GPU + MIG + GPU, "0, 0\n1, 0", "0, Not Active\n1, Not Active", ""),
        (2 * GPU, "0, 0\n1, 3", "0, Not Active\n1, Not Active", "uncorrected memory errors (GPU, count): 1, 3"),
        (
            2 * GPU,
            "0, 0\n1, [N/A]",
            "0, Active\n1, Not Active",
            "clocks are held back by the hardware on GPU 0, Active",
        ),
    ],
)
def test_a_nodes_gpus_are_looked_at(listed: str, ecc: str, slowdown: str, said: str, tmp_path: Path) -> None:
    """By what nvidia-smi answers, played by a script here."""
    (tmp_path / "nvidia-smi").write_text(
        f"#!/bin/sh\ncase \"$*\" in\n--list-gpus) printf '{listed}' ;;\n"
        f"*ecc*) printf '{ecc}\\n' ;;\n*slowdown*) printf '{slowdown}\\n' ;;\nesac\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "2"}
    words = ["bash", str(REPOSITORY / "slurm" / "check_node.sh"), str(tmp_path)]
    done = subprocess.run(words, env={**variables, "CHECK_FREE_GIB": "0"}, capture_output=True, text=True, timeout=60)
    assert said in done.stdout and done.returncode == (1 if said else 0) and bool(said) == bool(done.stdout)
