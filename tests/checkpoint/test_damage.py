"""Whatever reads a checkpoint verifies it: each file is damaged in each way, and every reader is tried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.checkpoint.find import check, find, newest_whole, verify
from ponder_scale.checkpoint.index import INDEX, read_index
from ponder_scale.checkpoint.parts import Parts, part_name
from ponder_scale.checkpoint.weights import read_weights
from ponder_scale.errors import CheckpointError
from ponder_scale.evaluate.perplexity import trajectory
from ponder_scale.export.huggingface import export
from ponder_scale.export.verify import verify_in_fresh_process
from ponder_scale.shards.manifest import tokenizer_sha256
from tests.checkpoint.sealing import seal, write_index
from tests.commands import run_command
from tests.faults import Fault
from tests.ranks import run_ranks
from tests.train.runs import overrides, train_on_a_rank

FILES = [part_name(0), "state.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", INDEX]


@pytest.fixture(scope="module")
def shards(tiny_shards: Any, tiny_tokenizer: Path) -> Any:
    made = tiny_shards(vocab_size=300, tokenizer=tokenizer_sha256([tiny_tokenizer / "tokenizer.json"]))
    shutil.copytree(tiny_tokenizer, made.folder / "tokenizer", dirs_exist_ok=True)
    return made


@pytest.fixture(scope="module")
def trained(shards: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, both saved, with an average of its weights."""
    run = tmp_path_factory.mktemp("trained") / "run"
    settings = overrides(run, shards, "train.steps=2", "optim.ema=0.5", "evaluate.every_steps=null")
    assert run_ranks(train_on_a_rank, [{"overrides": settings}], world_size=1) == [["done"]]
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def readers(newest: Path, shards: Any, out: Path) -> dict[str, Callable[[], object]]:
    """Every way to read a checkpoint that is named, or all of a run."""
    data = {"a": shards.folder}
    return {
        "find": lambda: find(newest),
        "check": lambda: check(newest),
        "export": lambda: export(newest, out),
        "export --ema": lambda: export(newest, out, average=True),
        "export --verify": lambda: verify_in_fresh_process(newest, out, dtype="float32"),
        "evaluate run": lambda: trajectory(newest.parents[1], data, sequences=2),
    }


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 3
    path.write_bytes(content)


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
def test_no_reader_takes_a_checkpoint_with_two_flipped_bits(
    name: str, run: Path, shards: Any, tmp_path: Path, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = (run / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    flip(newest / name, 0.9)
    for reader, read in readers(newest, shards, tmp_path / "out").items():
        with pytest.raises(CheckpointError) as caught:
            read()
        message = str(caught.value)
        assert name in message and str(newest) in message and "\n" not in message, reader
    assert not (tmp_path / "out").exists()
    caplog.clear()
    assert newest_whole(run) == older == find(run) and name in caplog.messages[0]
    fault(f"two bits of {name}", "export, evaluate run", detected="by hashes", after="refused", lost="nothing")


@pytest.mark.faults
@pytest.mark.parametrize(
    "name",
    ["rank-00001.safetensors", "rank-00000.safetensors.bak", "tokenizer/tokenizer.model", "tokenizer/more/a.json"],
)
def test_a_file_that_was_not_saved_is_named_and_refused(
    name: str, run: Path, shards: Any, tmp_path: Path, fault: Fault
) -> None:
    newest = run / "checkpoints/step-00000002"
    (newest / name).parent.mkdir(exist_ok=True)
    shutil.copy(newest / part_name(0), newest / name)
    assert verify(newest) == [f"{name} is not in {INDEX}, so it was added after the save; move it away"]
    for reader, read in readers(newest, shards, tmp_path / "out").items():
        with pytest.raises(CheckpointError, match=f"{name} is not in {INDEX}"):
            read()
        assert not (tmp_path / "out").exists(), reader
    fault(f"{name} put beside", "resume, export", detected="not in the index", after="refused", lost="nothing")


def test_what_a_file_system_or_a_person_leaves_is_no_damage(run: Path) -> None:
    newest = run / "checkpoints/step-00000002"
    for name in ("NOTES.txt", ".nfs0000", "tokenizer/.nfs0001", "tokenizer/.DS_Store"):
        (newest / name).write_text("left")
    assert verify(newest) == []


def test_parts_are_those_of_the_index(run: Path) -> None:
    newest = run / "checkpoints/step-00000002"
    expected = dict(read_weights(newest))
    shutil.copy(newest / part_name(0), newest / part_name(1))
    assert {stretch.file for stretches in Parts(newest).table.values() for stretch in stretches} == {part_name(0)}
    assert dict(read_weights(newest)).keys() == expected.keys()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../state.json": [1, "a"]}, "expected a file in the folder"),
        ({"/etc/passwd": [1, "a"]}, "expected a file in the folder"),
        ({"tokenizer/../../x": [1, "a"]}, "expected a file in the folder"),
        ({"state.json": ["1", "a"]}, "expected a file in the folder, its size and hash"),
        ({"state.json": [True, "a"]}, "expected a file in the folder, its size and hash"),
        ({"state.json": [1]}, "cannot be read"),
        ({"state.json": None}, "cannot be read"),
        ([], "cannot be read"),
    ],
)
def test_an_index_that_is_no_list_of_files_is_refused(files: Any, message: str, tmp_path: Path) -> None:
    write_index(tmp_path, files)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)
    assert message in verify(tmp_path)[0]


def test_a_state_of_another_program_is_answered(run: Path, tmp_path: Path) -> None:
    newest = run / "checkpoints/step-00000002"
    for content, message in (
        ("[]", "it has no step, tokens, model, config"),
        ('{"step": 2}', "it has no tokens, model, config"),
        ("[" * 10**5, "cannot be read"),
    ):
        (newest / "state.json").write_text(content)
        seal(newest)
        with pytest.raises(CheckpointError, match=message):
            export(newest, tmp_path / "out")


def test_shapes_that_no_part_has_are_refused_before_memory_is_taken(run: Path) -> None:
    newest = run / "checkpoints/step-00000002"
    state = json.loads((newest / "state.json").read_text())
    name = next(iter(state["parameters"]))
    for shape, message in (
        ([2**60], "its files lack some of the 1,152,921,504,606,846,976 elements"),
        ([-1], "has shape"),
    ):
        (newest / "state.json").write_text(json.dumps({**state, "parameters": {name: shape}}))
        with pytest.raises(CheckpointError, match=message):
            list(read_weights(newest))


@pytest.mark.faults
def test_the_commands_answer_in_one_line_and_a_resumed_run_goes_behind_the_damage(
    run: Path, shards: Any, tmp_path: Path, fault: Fault
) -> None:
    newest = run / "checkpoints/step-00000002"
    flip(newest / part_name(0), 0.5)
    for words in (
        ("export", newest, tmp_path / "out", "--verify"),
        ("export", newest, tmp_path / "out", "--ema"),
        ("evaluate", "run", run, "--data", f"a={shards.folder}"),
    ):
        done = run_command("ponder-scale", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"checkpoint {newest} is damaged ({part_name(0)}: its hash differs" in done.stderr
    settings = overrides(run, shards, "train.steps=2", "optim.ema=0.5", "evaluate.every_steps=null")
    assert run_ranks(train_on_a_rank, [{"overrides": settings}], world_size=1) == [["done"]]
    assert json.loads((run / "attempts.jsonl").read_text().splitlines()[-1])["resumed_from"] == "step-00000001"
    assert verify(newest) == [] and (run / "checkpoints/aside-step-00000002").is_dir()
    fault("two bits of a part", "every command", detected="by hashes", after="refused", lost="one step")
