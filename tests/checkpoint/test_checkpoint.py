"""Checkpoints are whole or not there: saving, finding, verifying, deleting."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ponder_scale
from ponder_scale.checkpoint import save as checkpoint
from ponder_scale.checkpoint.find import Ranks, find, newest_whole, read_state, set_aside, verify
from ponder_scale.checkpoint.index import ASIDE, CHECKPOINTS, INDEX, LATEST, SAVING, STATE, saved_steps
from ponder_scale.checkpoint.parts import part_name, write_part
from ponder_scale.checkpoint.save import Part, Retention, Saver
from ponder_scale.checkpoint.weights import read_folder, read_weights
from ponder_scale.errors import CheckpointError, SaveError
from ponder_scale.files.write import hash_file
from tests.faults import Fault
from tests.train.runs import with_full_disk

PART = Part({"weight/a": torch.arange(99.0)}, {"begins": {"a": 0}})


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))

    def make(step: int, keep: int | None = None) -> Path:
        saver = Saver(tmp_path / "run", tokenizer, ranks=Ranks(), retention=Retention(keep))
        return saver.save(step, {"step": step}, PART)

    return make


def whole(run: Path) -> Path | None:
    return newest_whole(run)


def test_a_saved_checkpoint_is_whole_newest_and_self_contained(make: Callable[..., Path], tmp_path: Path) -> None:
    make(10)
    folder = make(20)
    run = tmp_path / "run"
    assert whole(run) == folder == find(run) == find(folder)
    assert (run / LATEST).read_text().strip() == folder.name
    assert verify(folder) == []
    assert read_state(folder) == {"step": 20}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"state.json", INDEX, "rank-00000.safetensors", "tokenizer/tokenizer.json"}
    assert json.loads((folder / INDEX).read_text())["files"].keys() == names - {INDEX}


@pytest.mark.faults
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "tokenizer/tokenizer.json", INDEX])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_reason(
    make: Callable[..., Path], tmp_path: Path, name: str, damage: str, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = make(10), make(20)
    path = newer / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    path.unlink() if damage == "remove" else path.write_bytes(
        content[: len(content) // 2 if damage == "truncate" else None]
    )
    assert newest_whole(tmp_path / "run") == older
    assert name in caplog.messages[0] and str(newer) in caplog.messages[0]
    assert find(tmp_path / "run") == older
    fault(f"{damage} {name}", "resume", detected="by hashes", after="from the one before", lost="nothing")


def test_a_save_that_fails_leaves_the_older_ones_and_no_remains(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = make(10)

    def fails(*arguments: Any) -> None:
        write_part(*arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_part", fails)
        with pytest.raises(SaveError, match=r"step 20 could not be saved: rank 0: .*No space left"):
            make(20)
    run = tmp_path / "run"
    assert whole(run) == older and (run / LATEST).read_text().strip() == older.name
    assert not list((run / CHECKPOINTS).glob(SAVING + "*"))  # its room is given back
    newer = make(20)
    assert whole(run) == newer
    assert not list((run / CHECKPOINTS).glob(SAVING + "*"))


FILES = {  # what is being written when the disk is full, by the function that writes it
    "the part of a rank": "write_part",
    "state.json": "_write_json",
    "the tokenizer": "copy_folder",
    "checkpoint.json": "_seal",
}


@pytest.mark.faults
@pytest.mark.parametrize("what", FILES)
def test_a_disk_that_is_full_at_any_file_costs_that_save_only(
    what: str, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    older, run, name = make(10), tmp_path / "run", FILES[what]
    original = getattr(checkpoint, name)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, lambda *arguments: with_full_disk(lambda: original(*arguments)))
        with pytest.raises(SaveError, match=r"step 20 could not be saved: rank 0: .*File too large"):
            make(20)
    assert not list((run / CHECKPOINTS).glob(SAVING + "*"))
    assert (run / LATEST).read_text().strip() == older.name
    assert whole(run) == older
    newer = make(30)
    assert whole(run) == newer and (run / LATEST).read_text().strip() == newer.name
    fault(f"disk full at {what}", "save", detected="by all ranks", after="older ones whole, next save", lost="nothing")


def test_what_fails_after_a_checkpoint_has_its_name_does_not_make_it_unsaved(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(10)
    write = checkpoint.write_whole
    monkeypatch.setattr(checkpoint, "write_whole", lambda *arguments: with_full_disk(lambda: write(*arguments)))
    newer = make(20, keep=1)
    assert whole(tmp_path / "run") == newer and sorted(saved_steps(tmp_path / "run")) == [20]
    assert "step-00000020 is saved, but [Errno 27] File too large" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 90 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.faults
def test_a_file_system_without_room_for_another_checkpoint(small_disk: Path, tmp_path: Path, fault: Fault) -> None:
    (tmp_path / "tokenizer").mkdir()

    saver, large = Saver(small_disk / "run", tmp_path / "tokenizer", ranks=Ranks()), {"weight/a": torch.ones(6000)}

    def save_step(step: int) -> Path:
        return saver.save(step, {"step": step}, Part(large, {"begins": {"a": 0}}))

    first, second = save_step(1), save_step(2)
    with pytest.raises(SaveError, match=r"step 3 could not be saved: .*No space left on device"):
        save_step(3)
    assert verify(first) == verify(second) == [] and whole(small_disk / "run") == second
    (first / part_name(0)).unlink()  # somebody makes room
    third = save_step(3)
    assert whole(small_disk / "run") == third
    fault("file system full", "save", detected="No space left", after="older ones whole, next save", lost="nothing")


@pytest.mark.faults
def test_a_half_copied_folder_is_passed_over(make: Callable[..., Path], tmp_path: Path, fault: Fault) -> None:
    older, newer = make(10), make(20)
    for path in sorted(newer.iterdir())[1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert whole(tmp_path / "run") == older
    fault("half-copied folder", "resume", detected="files are missing", after="from the one before", lost="nothing")


@pytest.mark.faults
def test_when_no_checkpoint_is_whole_the_run_does_not_begin_anew_in_silence(
    make: Callable[..., Path], tmp_path: Path, fault: Fault
) -> None:
    for step in (10, 20):
        (make(step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000020 .*step-00000010 .*put one back from a copy, or move"):
        whole(tmp_path / "run")
    fault("every checkpoint damaged", "resume", detected="by hashes", after="refused: what to do", lost="nothing")


def test_what_is_kept(make: Callable[..., Path], tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(step, keep=2)
    assert sorted(saved_steps(tmp_path / "run")) == [3, 4]
    steps = range(10, 101, 10)
    assert Retention(2).doomed(steps) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert Retention(2, every=40).doomed(steps) == [10, 20, 30, 50, 60, 70]
    assert Retention(1, milestones=[20, 50]).doomed(steps) == [10, 30, 40, 60, 70, 80, 90]
    assert Retention(None).doomed(steps) == []


def test_damaged_ones_that_a_run_went_back_behind_do_not_count_as_its_newest(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        make(step)
    moved = set_aside(run, 1)
    assert [path.name for path in moved] == [f"{ASIDE}step-00000002", f"{ASIDE}step-00000003"]
    assert (run / LATEST).read_text().strip() == "step-00000001"
    newer = make(2, keep=1)
    assert whole(run) == newer and sorted(saved_steps(run)) == [2]


def test_a_file_of_yours_in_an_old_checkpoint_keeps_it_and_no_other(
    make: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yours = [make(step) / name for step, name in ((1, "notes.md"), (2, "tokenizer/mine.json"), (3, "plots/loss.svg"))]
    for path in yours:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    make(4)
    (make(5) / INDEX).write_text("no index any more")
    make(6, keep=1)
    assert sorted(saved_steps(tmp_path / "run")) == [1, 2, 3, 6] and all(path.read_text() == "mine" for path in yours)
    for path, message in zip(yours, caplog.messages, strict=True):
        name = path.relative_to(path.parents[len(path.relative_to(tmp_path / "run" / CHECKPOINTS).parts) - 2])
        assert f"holds {name}, which this program has not made" in message and "is kept" in message
    yours[0].unlink()
    make(7, keep=1)
    assert sorted(saved_steps(tmp_path / "run")) == [2, 3, 7]


def test_a_folder_that_a_killed_save_left_goes_away_but_not_with_a_file_of_yours(
    make: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = [make(1), make(2)]
    left, half = (folder.rename(folder.with_name(SAVING + folder.name)) for folder in saved)
    (left / "notes.md").write_text("mine")
    (half / INDEX).unlink()
    make(3)
    assert not half.exists() and (left / "notes.md").read_text() == "mine"
    assert "holds notes.md, which this program has not made" in caplog.text


def test_what_was_put_aside_is_not_replaced_by_the_next_that_is(make: Callable[..., Path], tmp_path: Path) -> None:
    make(1)
    for times in (1, 2, 3):
        (make(2) / "notes.md").write_text(f"mine {times}")
        (moved,) = set_aside(tmp_path / "run", 1)
        assert (moved / "notes.md").read_text() == f"mine {times}" and moved.name.startswith(ASIDE)
    assert len(list((tmp_path / "run" / CHECKPOINTS).glob(ASIDE + "*"))) == 3


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.faults
def test_a_pickle_in_a_checkpoint_or_a_folder_never_runs(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """In place of a part, with a right hash; as a PyTorch file to start from; and the bomb is a real one."""
    ran = tmp_path / "ran"
    bomb = Malicious(f"touch {ran}")

    def write_bomb(path: Path, *_: Any) -> tuple[int, str]:
        torch.save({"weight/a": bomb}, path)
        return path.stat().st_size, hash_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_part", write_bomb)
        folder = make(1)
    (folder / STATE).write_text(json.dumps({"parameters": {"a": [99]}}))
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: cannot be read"):
        list(read_weights(folder))
    torch.save({"a": bomb}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: cannot be read: Weights only load failed"):
        list(read_folder(tmp_path))
    assert not ran.exists()
    pickle.loads(pickle.dumps(bomb))
    assert ran.exists()
    fault("malicious pickle", "resume, export, start", detected="not loaded", after="refused", lost="nothing")


def test_nothing_in_the_package_unpickles() -> None:
    for path in sorted(Path(ponder_scale.__path__[0]).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and ".load_checkpoint(" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True)"), path


def test_a_checkpoint_that_has_its_name_is_never_replaced(make: Callable[..., Path]) -> None:
    folder = make(5)
    before = (folder / INDEX).stat()
    with pytest.raises(SaveError, match="Directory not empty"):
        make(5)
    assert (folder / INDEX).stat() == before and verify(folder) == []


def test_what_is_no_run_and_no_checkpoint_is_refused_by_name(tmp_path: Path, make: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="expected a run folder"):
        find(tmp_path / "nowhere")
    folder = make(1)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"it has no whole checkpoint; checkpoint .*step-00000001 is damaged"):
        find(tmp_path / "run")
