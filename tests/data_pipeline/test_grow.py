"""A corpus grows without a text being read again: what is there keeps its bytes, names and side of the split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.cli import main
from data_pipeline.commands import grow
from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.errors import ConfigError
from ponder_scale.shards.format import open_shards
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
    for setting in ("heldout_fraction=0.2", "tokenizer=x", "seed=3", "eod_token=a", "out=y", "overwrite=true"):
        assert f"append: {setting.partition('=')[0]} is what" in refused(capsys, *added(out, two, setting))
    assert "give the new ones the same" in refused(capsys, *added(out, two, "sources.web.weight=2"))
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


def test_a_run_and_a_packing_notice_that_their_set_has_grown(
    halves: tuple[Path, Path], tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = built(halves[0], tiny_tokenizer, tmp_path / "out")
    assert main(["pack", str(out), "--seq-len", "16"]) == 0
    data = DataConfig(seq_len=16, sources={"web": SourceConfig(path=str(out))})

    def loader() -> Loader:
        return Loader(data, open_sources(data), seed=1, global_batch=2, micro_batch=2)

    state = loader().state()
    assert main(added(out, halves[1])) == 0
    assert not (out / "packing-16").exists() and "pack it again" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.sources"):
        loader().restore(state)
    assert open_shards(out)
