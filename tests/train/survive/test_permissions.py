"""Shards that nobody may write, folders of a group, places without permission: as an ordinary user meets them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ponder_scale.checkpoint.find import find, verify
from ponder_scale.checkpoint.index import CHECKPOINTS, SAVING, saved_steps
from ponder_scale.export.folder import making
from ponder_scale.files.shipped import SLURM
from ponder_scale.files.write import copy_file
from tests.faults import Fault
from tests.ranks import run_ranks
from tests.train.runs import STEPS, overrides, train_on_a_rank

pytestmark = pytest.mark.faults
CAPABILITY_VERSION = 0x20080522  # of capset(2)


def train_as_an_ordinary_user(case: dict[str, Any]) -> str:
    """Train on a rank as one to whom modes apply, in a group that shares its folders (umask 002)."""
    give_up_privileges()
    os.umask(0o002)
    return train_on_a_rank(case)


def give_up_privileges() -> None:
    """Root may write anything; without its capabilities it is the owner of its files and nothing more."""
    if os.geteuid() == 0:
        for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER: nor what it executes
            assert ctypes.CDLL(None).prctl(24, capability) == 0  # PR_CAPBSET_DROP
        header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0, os.strerror(ctypes.get_errno())


def close(folder: Path) -> None:
    """Let nobody write in a folder."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.fixture
def closed(shards: Any, tmp_path: Path) -> Iterator[Any]:
    """Shards that nobody may write."""
    folder = tmp_path / "shards"
    shutil.copytree(shards.folder, folder)
    close(folder)
    yield SimpleNamespace(folder=folder)
    subprocess.run(["chmod", "-R", "u+rwX", tmp_path], check=True)


def test_shards_that_nobody_may_write_cost_no_save_and_no_group_its_folders(
    closed: Any, tmp_path: Path, fault: Fault
) -> None:
    run_dir = tmp_path / "run"
    remains = run_dir / CHECKPOINTS / f"{SAVING}step-00000009" / "tokenizer"  # as an older version left them
    remains.mkdir(parents=True)
    (remains / "tokenizer.json").write_text("{}")
    close(remains.parent)
    case = {"overrides": overrides(run_dir, closed, "train.sanity_step=true", "checkpoint.keep=2")}
    assert run_ranks(train_as_an_ordinary_user, [case]) == [["done", "done"]]
    assert sorted(saved_steps(run_dir)) == [STEPS - 1, STEPS]
    assert [path.name for path in (run_dir / CHECKPOINTS).iterdir() if path.name.startswith(".")] == []
    assert verify(find(run_dir)) == []
    made = list(find(run_dir).rglob("*"))
    assert {path.name for path in made} > {"tokenizer", "tokenizer.json", "state.json", "rank-00001.safetensors"}
    assert all(path.stat().st_mode & 0o060 == 0o060 for path in made)  # the group may change what it shares
    fault("shards and tokenizer 0444, 0555", "save", detected="not a fault", after="saved, group may write", lost="-")


def test_a_save_without_permission_is_told_as_that_before_step_1_and_after(
    closed: Any, tmp_path: Path, fault: Fault
) -> None:
    cases, troubles = [], ("closed from the start", "closed, and not rehearsed", "unreadable tokenizer")
    for number, trouble in enumerate(troubles):
        run_dir = tmp_path / str(number)
        (run_dir / CHECKPOINTS).mkdir(parents=True)
        if trouble != "unreadable tokenizer":
            (run_dir / CHECKPOINTS).chmod(0o555)
        sanity = str(trouble != "closed, and not rehearsed").lower()
        cases.append({"overrides": overrides(run_dir, closed, f"train.sanity_step={sanity}")})
    first, second = run_ranks(train_as_an_ordinary_user, cases[:2], world_size=1)
    (closed.folder / "tokenizer" / "tokenizer.json").chmod(0)
    (third,) = run_ranks(train_as_an_ordinary_user, cases[2:], world_size=1)
    for run, error in zip(troubles, (first, second, third), strict=True):
        said = error[0]["error"]
        assert "Permission denied" in said and "space is not the cause" in said and "free space" not in said, (
            run,
            said,
        )
    assert all("CheckpointError: a checkpoint cannot be saved in" in one[0]["error"] for one in (first, third))
    assert second[0]["error"].startswith("SaveError: the checkpoint of step 3 could not be saved: rank 0: Permission")
    for number in "02":
        assert '"event":"step"' not in (tmp_path / number / "metrics.jsonl").read_text()
    for injected in troubles:
        fault(f"checkpoints: {injected}", "save", detected="by its error", after="cause named, exit", lost="nothing")


def test_copies_have_the_modes_of_new_files_and_stay_executable(tmp_path: Path) -> None:
    script, out = tmp_path / "script", tmp_path / "out"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o555)
    before = os.umask(0o002)
    try:
        copy_file(script, tmp_path / "copy")
        with making(out) as folder:
            (folder / "weights").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o775
    assert [path.stat().st_mode & 0o777 for path in sorted(out.iterdir())] == [0o664, 0o664]


def test_shards_that_nobody_may_write_are_copied_to_a_node_after_a_copy_that_was_cut_off(
    closed: Any, tmp_path: Path
) -> None:
    to = tmp_path / "local"
    copy = [SLURM / "copy_shards.sh", to, closed.folder]
    subprocess.run(copy, check=True, umask=0o002, preexec_fn=give_up_privileges)
    (made,) = (path for path in to.iterdir() if path.is_dir())
    assert all(path.stat().st_mode & 0o060 == 0o060 for path in (made, *made.rglob("*")))
    made.rename(f"{made}.part")
    close(Path(f"{made}.part"))  # cut off by an older version, which copied modes
    subprocess.run(copy, check=True, preexec_fn=give_up_privileges)
    assert made.is_dir() and not Path(f"{made}.part").exists()
