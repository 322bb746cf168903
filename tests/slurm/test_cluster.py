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
from tests.slurm import ends, moves, work
from tests.slurm.lab import REPOSITORY, SCRIPT, Lab, missing
from tests.slurm.runs import Place, Run, train

pytestmark = pytest.mark.xdist_group("slurm")

AT_ONCE = 6
SCENARIOS = [*moves.SCENARIOS, *work.SCENARIOS, *ends.SCENARIOS]  # those that wait long come first


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


def test_the_lab_needs_no_root() -> None:
    if missing():
        pytest.skip("no Slurm here")
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


def test_ranks_that_do_not_come_condemn_their_nodes() -> None:
    """The all-reduce check with two ranks of three: they name their own nodes as those that are well."""
    port, script = free_port(), REPOSITORY / "slurm" / "all_reduce.py"
    ranks = []
    for rank in (0, 1):
        shared = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank}", "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, str(script), "20"]
        ranks.append(subprocess.Popen(words, env={**os.environ, **shared, **own}, stdout=subprocess.PIPE, text=True))
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["n0\n", "n1\n"]
