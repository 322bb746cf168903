"""A corpus grows without a text being read again: what is there keeps its bytes, names and side of the split."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.cli import main
from data_pipeline.commands import grow
from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.errors import ConfigError
from ponder_scale.shards.manifest import read_manifest, verify
from tests.data_pipeline.builds import arguments, contents, documents, make_texts, write_jsonl


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, Path]:
    texts = make_texts(400)
    return write_jsonl(tmp_path / "one.jsonl", texts[:250]), write_jsonl(tmp_path / "two.jsonl", texts[250:])


def built(file: Path, tokenizer: Path, out: Path, *more: str) -> Path:
    assert main(arguments(file, tokenizer, out, "shard_bytes=4000", "workers=1", *more)) == 0
    return out


def added(out: Path, file: Path, *more: str, name: str = "web") -> list[str]:
    return ["append", str(out), f"sources.{name}.kind=jsonl", f"sources.{name}.path={file}", "workers=1", *more]


def refused(capsys: pytest.CaptureFixture[str], *command: Any) -> str:
    capsys.readouterr()
    assert main(list(map(str, command))) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_what_is_appended_is_what_one_build_makes_and_what_was_there_is_the_same_files(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = halves
    whole = write_jsonl(tmp_path / "whole.jsonl", make_texts(400))
    expected = built(whole, tiny_tokenizer, tmp_path / "expected")
    out = built(one, tiny_tokenizer, tmp_path / "out")
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in out.glob("*.[bi]*")}
    lines = (out / "inputs.jsonl").read_text()
    one.unlink()  # nothing reads it again
    assert main(added(out, two, name="more")) == 0
    assert {name: ((out / name).stat().st_ino, (out / name).read_bytes()) for name in before} == before
    for split in ("train", "heldout"):
        assert documents(out, split) == documents(expected, split)
        assert documents(out, split)[: len(documents(out, split)) // 2]
    assert verify(out) == [] and (out / "inputs.jsonl").read_text().startswith(lines)
    sources = read_manifest(out).provenance["sources"]
    assert {name: counts["documents"] for name, counts in sources.items()} == {"web": 250, "more": 150}
    assert "more: 150 documents" in capsys.readouterr().out
    assert not list(tmp_path.glob("out.*"))
    # and again, by a third file of a source that is there
    assert main(added(out, write_jsonl(tmp_path / "three.jsonl", make_texts(30, seed=5)), name="more")) == 0
    assert read_manifest(out).provenance["sources"]["more"]["documents"] == 180 and verify(out) == []
    assert len(read_manifest(out).provenance["commands"]) == 3
    assert main(["inspect", str(out)]) == 0


def test_sets_are_merged_and_stay_as_they_are(halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path) -> None:
    sets = [built(file, tiny_tokenizer, tmp_path / f"set-{file.stem}") for file in halves]
    before = [contents(each) for each in sets]
    out = tmp_path / "out"
    assert main(["merge", str(out), *map(str, sets)]) == 0
    assert [contents(each) for each in sets] == before and verify(out) == []
    for split in ("train", "heldout"):
        assert documents(out, split) == documents(sets[0], split) + documents(sets[1], split)
    assert (out / "train-00000.bin").stat().st_nlink == 2
    made = contents(out)
    assert main(["merge", str(out), *map(str, sets)]) == 0 and contents(out) == made  # done already
    for each in sets:
        shutil.rmtree(each)
    assert verify(out) == []
    assert main(added(out, write_jsonl(tmp_path / "more.jsonl", make_texts(20, seed=3)))) == 0 and verify(out) == []


def test_what_cannot_be_one_set_is_refused(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = halves
    out = built(one, tiny_tokenizer, tmp_path / "out")
    made = contents(out)
    assert f"{one} is in {out} already" in refused(capsys, *added(out, one))
    (tmp_path / "link.jsonl").symlink_to(one)
    assert "is in" in refused(capsys, *added(out, tmp_path / "link.jsonl"))
    assert "name the new files" in refused(capsys, "append", out)
    for setting in ("heldout_fraction=0.2", "tokenizer=x", "seed=3", "eod_token=a", "out=y"):
        assert f"append: {setting.partition('=')[0]} is fixed by" in refused(capsys, *added(out, two, setting))
    assert "so the new ones need the same" in refused(capsys, *added(out, two, "sources.web.weight=2"))
    assert contents(out) == made and not list(tmp_path.glob("out.*"))

    def merged(*sets: Path) -> str:
        return refused(capsys, "merge", tmp_path / "all", *sets)

    assert "differ in eod_id" in merged(out, built(two, tiny_tokenizer, tmp_path / "open", "append_eod=false"))
    assert "built with seed 0 and 7" in merged(out, built(two, tiny_tokenizer, tmp_path / "seed", "seed=7"))
    assert "one.jsonl is in" in merged(out, built(one, tiny_tokenizer, tmp_path / "again", "shard_tokens=900"))
    assert "named twice" in merged(out, out)
    assert "lies in" in refused(capsys, "merge", out, out, tmp_path / "seed")
    assert "exists" in refused(capsys, "merge", tmp_path / "seed", out, tmp_path / "open")
    assert not (tmp_path / "all").exists() and contents(out) == made
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(capsys, *added(out, two))
    assert (out / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("where", ["_take", "seal", "publish", "delete_set"])
def test_killed_anywhere_the_same_command_goes_on(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    one, two = halves
    expected, out = (built(one, tiny_tokenizer, tmp_path / name) for name in ("expected", "out"))
    assert main(added(expected, two)) == 0

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grow, where, killed)
        assert main(added(out, two)) == 130
    assert verify(out) == []  # the old set, or the new one
    assert main(added(out, two)) == 0
    assert {name: made for name, made in contents(out).items() if name != "manifest.json"} == {
        name: made for name, made in contents(expected).items() if name != "manifest.json"
    }
    assert not list(tmp_path.glob("out.*")) and verify(out) == []


def test_where_the_file_system_has_no_hard_links_shards_are_copied(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    sets = [built(file, tiny_tokenizer, tmp_path / f"set-{file.stem}") for file in halves]
    with monkeypatch.context() as patch:
        patch.setattr(grow.os, "link", without)
        assert main(["merge", str(tmp_path / "out"), *map(str, sets)]) == 0
    assert verify(tmp_path / "out") == [] and (tmp_path / "out/train-00000.bin").stat().st_nlink == 1


def test_a_mask_goes_with_its_shard(halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"ask {number}", "completion": " the shard"} for number in range(60)]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = built(halves[0], tiny_tokenizer, tmp_path / "out")
    completion = ["sources.asked.loss={prompt: prompt, completion: completion}"]
    assert main(added(out, asked, *completion, name="asked")) == 0
    manifest = read_manifest(out)
    masked = [info for info in manifest.splits["train"] if info.source == "asked"]
    assert masked and all((out / f"{info.name}.mask").is_file() for info in masked) and verify(out) == []


def test_a_run_and_a_packing_notice_that_their_set_has_grown_and_how_to_go_on(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, code = built(halves[0], tiny_tokenizer, tmp_path / "out"), tmp_path / "code"
    built(write_jsonl(tmp_path / "code.jsonl", make_texts(50, seed=9)), tiny_tokenizer, code)
    assert main(["pack", str(out), "--seq-len", "16"]) == 0

    def loader(web: Path = out) -> Loader:
        sources = {"web": SourceConfig(path=str(web)), "code": SourceConfig(path=str(code))}
        data = DataConfig(seq_len=16, sources=sources)
        return Loader(data, open_sources(data), seed=1, global_batch=2, micro_batch=2)

    first = loader()
    rows, state = first.next_batches()[0].tokens, first.state()
    then = first.next_batches()[0].tokens
    before = read_manifest(out)
    three = write_jsonl(tmp_path / "three.jsonl", make_texts(30, seed=5))
    assert main(added(out, halves[1])) == 0
    assert main(added(out, three, name="late")) == 0
    assert not (out / "packing-16").exists() and "pack it again" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=rf"data.sources.web.path is {out}, which has grown .*2 x.* --without-last 2"):
        loader().restore(state)
    was = tmp_path / "was"
    again = ["merge", str(was), str(out), "--without-last", "2"]
    assert main(again) == 0 and verify(was) == []
    assert read_manifest(was).identity == before.identity
    assert read_manifest(was).provenance["sources"] == before.provenance["sources"]
    assert (was / "inputs.jsonl").read_text().count("one.jsonl") == (was / "inputs.jsonl").read_text().count("\n")
    restored = loader(was)
    restored.restore(state)
    assert restored.next_batches()[0].tokens.equal(then) and not then.equal(rows)
    assert main(again) == 0  # done already
    assert main(["inspect", str(was)]) == 0 and main(added(was, three, name="late")) == 0
    assert "3 appends" not in refused(capsys, "merge", tmp_path / "no", out, "--without-last", 3)
    nothing = refused(capsys, "merge", tmp_path / "no", code, "--without-last", 1)
    assert f"{code} has had no append, so nothing can be left out; use {code} as it is" in nothing
    assert "but 2 are given; give one" in refused(capsys, "merge", tmp_path / "no", out, was, "--without-last", 1)
    other = loader(code)
    # Another set is no set that has grown.
    with pytest.raises(ConfigError, match="this run has other shards than the checkpoint"):
        other.restore(state)


def held_by(out: Path) -> int:
    return sum(info.documents for infos in read_manifest(out).splits.values() for info in infos)


@pytest.mark.parametrize("way", ["exact", "minhash"])
def test_documents_that_are_in_the_set_are_not_taken_again(
    tiny_tokenizer: Path, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(120)
    more = [*texts[100:], *make_texts(40, seed=4), texts[3], *(f"{text}!" for text in texts[:10])]
    one, two = write_jsonl(tmp_path / "one.jsonl", texts), write_jsonl(tmp_path / "two.jsonl", more)
    whole = write_jsonl(tmp_path / "whole.jsonl", [*texts, *more])
    ways = [f"deduplicate={way}", "shard_bytes=4000"]
    expected = built(whole, tiny_tokenizer, tmp_path / "expected", *ways)
    out = built(one, tiny_tokenizer, tmp_path / "out", *ways)
    assert main(added(out, two, "keep_dropped=true", name="more")) == 0
    for split in ("train", "heldout"):
        assert documents(out, split) == documents(expected, split)
    dropped = read_manifest(out).provenance["sources"]["more"]["drops"]["duplicate"]
    assert dropped >= (21 if way == "exact" else 28) and verify(out) == []
    assert (out / "compared.keys").read_bytes() == (expected / "compared.keys").read_bytes()
    # a third time: nothing of either is taken, nor of what was dropped
    third = write_jsonl(tmp_path / "third.jsonl", [texts[0], "a text that nobody has seen before, not even in part"])
    assert main(added(out, third, name="third")) == 0
    assert read_manifest(out).provenance["sources"]["third"]["documents"] == 1
    # every new document, where that is wanted
    held = held_by(out)
    again = write_jsonl(tmp_path / "again.jsonl", texts[:7])
    capsys.readouterr()
    assert main(added(out, again, "deduplicate=none", name="again")) == 0
    assert "are compared with nothing" in capsys.readouterr().err and held_by(out) == held + 7
    last = write_jsonl(tmp_path / "last.jsonl", ["something else"])
    assert "has no compared.keys" in refused(capsys, *added(out, last, name="last"))


def test_what_was_built_without_keys_says_so_and_other_ways_are_refused(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = built(halves[0], tiny_tokenizer, tmp_path / "out", "deduplicate=exact")
    assert "deduplicate is minhash, in" in refused(capsys, *added(out, halves[1], "deduplicate=minhash"))
    plain = built(halves[0], tiny_tokenizer, tmp_path / "plain")
    assert main(added(plain, halves[1], "deduplicate=exact", name="more")) == 0
    assert "compared with each other only" in capsys.readouterr().err


def test_sets_with_documents_in_common_are_not_merged_unless_asked(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(60)
    files = [texts[:40], texts[35:], make_texts(9, seed=8)]
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", some) for number, some in enumerate(files)]
    sets = [
        built(file, tiny_tokenizer, tmp_path / f"set-{number}", "deduplicate=exact")
        for number, file in enumerate(inputs)
    ]
    assert "5 texts are in more than one" in refused(capsys, "merge", tmp_path / "out", *sets)
    three = write_jsonl(tmp_path / "3.jsonl", texts[38:41])  # two of these are in sets 0 and 1, and count once
    again = built(three, tiny_tokenizer, tmp_path / "set-3", "deduplicate=exact")
    assert "6 texts are in more than one" in refused(capsys, "merge", tmp_path / "out", *sets, again)
    apart = tmp_path / "apart"
    assert main(["merge", str(apart), str(sets[0]), str(sets[2])]) == 0 and verify(apart) == []
    last = write_jsonl(tmp_path / "last.jsonl", [texts[0], files[2][0], "new"])
    assert main(added(apart, last, name="last")) == 0  # compared with both
    assert read_manifest(apart).provenance["sources"]["last"]["documents"] == 1
    assert main(["merge", str(tmp_path / "out"), "--allow-duplicates", *map(str, sets)]) == 0
    assert held_by(tmp_path / "out") == 40 + 25 + 9
    plain = built(inputs[1], tiny_tokenizer, tmp_path / "plain")
    assert "deduplicate exact and none" in refused(capsys, "merge", tmp_path / "no", sets[0], plain)
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_input_under_another_name_is_noticed(
    halves: tuple[Path, Path],
    tiny_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = halves
    (there := tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    out = built(Path("one.jsonl"), tiny_tokenizer, tmp_path / "out")
    shutil.copy(one, there / "copy.jsonl")
    for name in (there / "copy.jsonl", one):
        assert f"{name} is in {out} already as one.jsonl" in refused(capsys, *added(out, name, "shard_bytes=900"))
    with one.open("a") as stream:
        stream.write('{"text": "a line more"}\n')
    for name in (Path("one.jsonl"), one):
        assert "is in" in refused(capsys, *added(out, name))  # its first lines would be there twice
    monkeypatch.chdir(there)
    shutil.copy(two, there / "one.jsonl")  # another file of the same name in another place
    assert main(added(out, Path("one.jsonl"))) == 0 and verify(out) == []
    assert read_manifest(out).provenance["sources"]["web"]["documents"] == 400


def test_a_folder_given_twice_is_refused_and_a_few_equal_files_are_said(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, files in {"old": ("a", "b", "c"), "new": ("a", "x", "y")}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / f"{file}.txt").write_text(f"the text of file {file}")
    (tmp_path / "new" / "empty.txt").touch()
    (tmp_path / "old" / "empty.txt").touch()
    out = tmp_path / "out"
    source = ["sources.code.kind=folder", f"sources.code.path={tmp_path / 'old'}"]
    assert main(["build", f"out={out}", f"tokenizer={tiny_tokenizer}", *source]) == 0
    made = contents(out)
    moved = shutil.copytree(tmp_path / "old", tmp_path / "moved")
    command = ["append", str(out), "sources.more.kind=folder"]
    capsys.readouterr()
    assert main([*command, f"sources.more.path={moved}"]) == 2
    assert "would be there twice" in capsys.readouterr().err.splitlines()[-1]  # behind the progress
    assert contents(out) == made and not list(tmp_path.glob("out.*"))
    assert main([*command, f"sources.more.path={tmp_path / 'new'}"]) == 0
    assert "1 of 3 files of more are in" in capsys.readouterr().err and held_by(out) == 6


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "dataset"])
def test_other_kinds_given_twice_are_noticed(
    kind: str, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(30)
    path, copy = tmp_path / f"one.{kind}", tmp_path / f"two.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10)
        shutil.copy(path, copy)
    elif kind == "dataset":
        pytest.importorskip("datasets").Dataset.from_dict({"text": texts}).save_to_disk(str(path))
        copy = path
    else:
        path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
        shutil.copy(path, copy)
    kind, out = kind.split(".")[0], tmp_path / "out"
    source = [f"sources.web.kind={kind}", f"sources.web.path={path}"]
    assert main(["build", f"out={out}", f"tokenizer={tiny_tokenizer}", *source]) == 0
    assert "already" in refused(capsys, "append", out, f"sources.more.kind={kind}", f"sources.more.path={copy}")


def test_what_is_left_out_of_both_sets_is_counted(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / ".hidden.jsonl").write_text("")
    sets = []
    for number in (1, 2):
        (folder := tmp_path / f"in-{number}").mkdir()
        shutil.copy(halves[number - 1], folder / "a.jsonl")
        (folder / ".hidden.jsonl").write_text("")
        sets.append(built(folder / "*.jsonl", tiny_tokenizer, tmp_path / f"set-{number}"))
    assert main(["merge", str(tmp_path / "out"), *map(str, sets)]) == 0
    assert read_manifest(tmp_path / "out").provenance["left_out"] == {"web": {"hidden files": 2}}


def test_what_was_replaced_in_documents_of_both_sets_is_added_up(tiny_tokenizer: Path, tmp_path: Path) -> None:
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", [f"{number}: write to a@b.org"]) for number in range(2)]
    out = built(inputs[0], tiny_tokenizer, tmp_path / "out", "sources.web.filters={pii: {}}")
    once = read_manifest(out).provenance["sources"]["web"]["replaced"]
    assert main(added(out, inputs[1], "sources.web.filters={pii: {}}")) == 0
    assert once and read_manifest(out).provenance["sources"]["web"]["replaced"] == {
        what: 2 * count for what, count in once.items()
    }


DIES = """
import os, sys
from pathlib import Path
from data_pipeline import cli
rename = Path.rename
Path.rename = lambda self, target: os._exit(9) if self.name == "out.partial" else rename(self, target)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_process_that_dies_between_two_names_of_a_set_is_followed_by_one_that_goes_on(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """The old set has given up its name, and the new one has not got it yet."""
    out = built(halves[0], tiny_tokenizer, tmp_path / "out")
    command = added(out, halves[1], name="more")
    assert subprocess.run([sys.executable, "-c", DIES, *command], capture_output=True).returncode == 9
    assert not out.exists()
    assert main(command) == 0
    assert held_by(out) == 400 and verify(out) == [] and not list(tmp_path.glob("out.*"))


def test_an_append_that_was_given_up_makes_room_for_another(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = built(halves[0], tiny_tokenizer, tmp_path / "out")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grow, "_put_together", killed)
        assert main(added(out, halves[1])) == 130
    other = write_jsonl(tmp_path / "other.jsonl", make_texts(10, seed=6))
    assert "give overwrite=true to replace it" in refused(capsys, *added(out, other, name="other"))
    assert main(added(out, other, "overwrite=true", name="other")) == 0
    assert held_by(out) == 260 and verify(out) == [] and not list(tmp_path.glob("out.*"))
    capsys.readouterr()
    assert main(["inspect", str(out), "--samples", "0"]) == 0
    said = capsys.readouterr().out
    assert "of what was made by ponder-data build out=" in said and "of what was made by ponder-data append" in said


def test_ranks_of_mpi_append_together(halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("no MPI")
    made = []
    for ranks in (1, 2):
        (folder := tmp_path / str(ranks)).mkdir()
        out = built(halves[0], tiny_tokenizer, folder / "out", "deduplicate=exact")
        alone = [sys.executable, "-m", "data_pipeline.cli", *added(out, halves[1], name="more")]
        started = [mpiexec, "-n", "2", *alone] if ranks == 2 else alone
        for expected in (0, 2):  # the second time its file is in the set
            done = subprocess.run(started, capture_output=True, text=True, timeout=300)
            assert bool(done.returncode) == bool(expected), done.stderr
        assert "already" in done.stderr
        made.append({name: some for name, some in contents(out).items() if name != "manifest.json"})
        made[-1].pop("inputs.jsonl")
        assert not list(folder.glob("out.*")) and verify(out) == []
    assert made[0] == made[1]
