import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipeline.cli import main
from data_pipeline.config import SourceConfig
from data_pipeline.read.readers import read
from data_pipeline.read.sources import LeftOut, files
from data_pipeline.read.units import Plan, share, units, write_plan
from ponder_scale.errors import ConfigError


def names(config: SourceConfig) -> list[str]:
    return [piece.name.rpartition("/")[2] for piece in files({"it": config})]


def test_a_glob_names_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert names(SourceConfig(kind="text", path=str(tmp_path / "*.txt"))) == ["a.txt", "b.txt", "c.txt"]


def test_a_relative_glob_is_taken_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert names(SourceConfig(kind="text", path="*.txt")) == ["a.txt"]


def test_a_folder_yields_each_file_that_is_not_excluded(tmp_path):
    for name in ("z.py", "a/b.py", "a/c.txt", "skip/d.py", "a/skip.d/e.py", "f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    config = SourceConfig(kind="folder", path=str(tmp_path), pattern="**/*.py", exclude=["skip", "skip.*"])
    assert [piece.name for piece in files({"it": config})] == ["a/b.py", "f.py", "z.py"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "jsonl", "path": "nothing.jsonl"}, "sources.web.path is nothing.jsonl; no such file"),
        ({"kind": "text", "path": "nothing/*.txt"}, r"sources.web.path is nothing/\*.txt; no such file"),
        ({"kind": "folder", "path": "nothing"}, "sources.web.path is nothing; no such folder"),
        ({"kind": "folder", "path": ".", "pattern": "*.none"}, r"sources.web.pattern is \*.none; it matches no file"),
        ({"kind": "folder", "path": ".", "pattern": "/*"}, "expected a relative glob"),
        ({"kind": "folder", "path": ".", "pattern": ""}, "expected a relative glob"),
        ({"kind": "jsonl", "path": "."}, r"sources.web.path is ., which is a folder; name its files, such as \*.jsonl"),
        ({"kind": "text", "path": "."}, r"which is a folder; name its files, such as \*.txt, or set kind=folder"),
        ({"kind": "folder", "path": "/dev/null/x"}, "sources.web.path is /dev/null/x; no such folder"),
        ({"kind": "folder", "path": __file__}, "which is a file; kind=text reads it"),
    ],
)
def test_a_source_that_names_no_file_is_refused(tmp_path, monkeypatch, config, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        files({"web": SourceConfig(**config)})


def tree(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(config: SourceConfig) -> tuple[list[str], list[str]]:
    """(names of the files relative to the folder of a source, what is said to be left out)."""
    left_out = LeftOut()
    pieces = files({"it": config}, left_out)
    return [piece.name for piece in pieces], list(left_out)


def test_linked_folders_are_entered_and_each_file_is_read_once(tmp_path):
    tree(tmp_path / "disk", "far/b.txt", "far/deep/c.txt")
    tree(tmp_path / "in", "a.txt", "sub/d.txt")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "disk" / "far")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "disk" / "far")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "sub" / "up").symlink_to("..")
    (tmp_path / "disk" / "far" / "deep" / "round").symlink_to(tmp_path / "disk")
    expected = ["a.txt", "again/b.txt", "again/deep/c.txt", "sub/d.txt"]
    assert found(SourceConfig(kind="folder", path=str(tmp_path / "in"), pattern="**/*.txt")) == (expected, [])
    for pattern in ("**/*.txt", "**/**/*.txt"):
        names, said = found(SourceConfig(kind="text", path=str(tmp_path / "in" / pattern)))
        assert (names, said) == ([str(tmp_path / "in" / name) for name in expected], [])


def test_a_file_that_is_named_twice_is_read_once_and_that_is_said(tmp_path):
    tree(tmp_path, "b.txt", "c.txt")
    (tmp_path / "a.txt").symlink_to("b.txt")
    (tmp_path / "d.txt").symlink_to("nowhere.txt")
    names, said = found(SourceConfig(kind="folder", path=str(tmp_path), pattern="*.txt"))
    assert names == ["b.txt", "c.txt"]
    assert said == [
        f"left out of it: 1 files that are there by another name too, the first is {tmp_path / 'a.txt'}",
        f"left out of it: 1 links that lead nowhere, the first is {tmp_path / 'd.txt'}",
    ]


def test_copies_and_hard_links_are_files_of_their_own(tmp_path):
    tree(tmp_path, "a.txt")
    (tmp_path / "b.txt").hardlink_to(tmp_path / "a.txt")
    assert found(SourceConfig(kind="folder", path=str(tmp_path), pattern="*.txt")) == (["a.txt", "b.txt"], [])


def test_hidden_files_are_left_out_counted_and_named(tmp_path):
    tree(
        tmp_path,
        "a.jsonl",
        "._a.jsonl",
        ".git/config",
        ".git/x/deep.jsonl",
        "in/.ipynb_checkpoints/a.jsonl",
        "in/b.jsonl",
    )
    folder = SourceConfig(kind="folder", path=str(tmp_path))
    names, said = found(folder)
    assert names == ["a.jsonl", "in/b.jsonl"]
    first = f"left out of it: 4 hidden files, the first is {tmp_path / '._a.jsonl'}"
    assert said == [f"{first}; a pattern that spells the dot reads them"]
    names, said = found(SourceConfig(kind="jsonl", path=str(tmp_path / "**" / "*.jsonl")))
    assert names == [str(tmp_path / "a.jsonl"), str(tmp_path / "in/b.jsonl")] and "3 hidden files" in said[0]
    assert found(replace(folder, pattern=".git/*")) == ([".git/config"], [])
    assert found(replace(folder, pattern="**/.*.jsonl")) == (["._a.jsonl"], [])
    hidden = SourceConfig(kind="jsonl", path=str(tmp_path / ".git" / "x" / "*.jsonl"))
    assert found(hidden) == ([str(tmp_path / ".git/x/deep.jsonl")], [])
    assert found(replace(folder, exclude=["._*", ".git", ".ipynb*"])) == (["a.jsonl", "in/b.jsonl"], [])
    with pytest.raises(ConfigError, match=r"every file that .* names is left out: left out of it: 1 hidden files"):
        found(SourceConfig(kind="jsonl", path=str(tmp_path / "*_a.jsonl")))


def test_a_plan_and_the_training_of_a_tokenizer_say_what_they_leave_out(tiny_tokenizer, tmp_path, capsys):
    for name in ("a.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_text('{"text": "some text to learn from"}\n')
    said = "left out of web: 1 hidden files, the first is"
    source = ["sources.web.kind=jsonl", f"sources.web.path={tmp_path}/*.jsonl"]
    assert main(["plan", *source, f"tokenizer={tiny_tokenizer}", f"out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().err.count(said) == 1
    assert main(["train-tokenizer", *source, "--vocab-size", "260", "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().err.count(said) == 1


def test_braces_stand_for_several_paths(tmp_path):
    tree(tmp_path, "a/x.txt", "b/x.txt", "c/x.txt", "d{1}.txt", "e,f.txt")

    def names(path: str) -> list[str]:
        paths, _ = found(SourceConfig(kind="text", path=str(tmp_path / path)))
        return [name.removeprefix(f"{tmp_path}/") for name in paths]

    assert names("{b,a}/*.txt") == ["b/x.txt", "a/x.txt"]
    assert names("{a,{c,b}}/x.txt") == ["a/x.txt", "c/x.txt", "b/x.txt"]
    assert names("{a,*}/x.txt") == ["a/x.txt", "b/x.txt", "c/x.txt"]
    assert names("d{1}.txt") == ["d{1}.txt"]
    folder = SourceConfig(kind="folder", path=str(tmp_path), pattern="{c,a}/*.txt")
    assert found(folder) == (["a/x.txt", "c/x.txt"], [])
    with pytest.raises(ConfigError, match=r"nowhere/x.txt; no such file"):
        names("{a,nowhere}/x.txt")


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    tree(tmp_path, "a.txt", "in/b.txt")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("/in"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", closed)  # root may read everything
    with pytest.raises(ConfigError, match=r"sources.it: .*/in cannot be read: Permission denied"):
        files({"it": SourceConfig(kind="folder", path=str(tmp_path))})


def corpus(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text("x" * (100 + i))
    (tmp_path / "lines.jsonl").write_text('{"text": "some text"}\n' * 1000)
    return {
        "many": SourceConfig(kind="folder", path=str(tmp_path), pattern="*.txt"),
        "one": SourceConfig(kind="jsonl", path=str(tmp_path / "lines.jsonl")),
    }


def test_units_gather_small_files_and_cut_large_ones_and_never_mix_sources(tmp_path):
    planned = list(units(corpus(tmp_path), 1000))
    assert {unit.source for unit in planned} == {"many", "one"}
    assert all({piece.source for piece in unit.pieces} == {unit.source} for unit in planned)
    assert all(1000 <= unit.size < 2200 for unit in planned[:4])
    of_lines = [unit for unit in planned if unit.source == "one"]
    assert len(of_lines) > 10
    assert [unit.pieces[0].begin for unit in of_lines[1:]] == [unit.pieces[-1].end for unit in of_lines[:-1]]
    assert sum(unit.size for unit in planned) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_each_shard_of_a_stream_is_a_unit(tmp_path):
    """Nobody knows how large one is before it is read; together they would be one worker's."""
    for number in range(5):
        rows = pa.table({"text": [f"row {number}"]})
        pq.write_table(rows, tmp_path / f"train-{number:05d}-of-00005.parquet")
    planned = list(units({"it": SourceConfig(kind="dataset", path=str(tmp_path), streaming=True)}, None))
    assert [[(piece.begin, piece.end) for piece in unit.pieces] for unit in planned] == [[(i, i + 1)] for i in range(5)]


def test_a_written_plan_is_read_back_unit_by_unit(tmp_path):
    (tmp_path / "in").mkdir()
    planned = list(units(corpus(tmp_path / "in"), 1000))
    digest = write_plan(tmp_path / "plan.jsonl", planned, {"engine": "x"})
    plan = Plan(tmp_path / "plan.jsonl")
    assert plan.header == {"engine": "x"}
    assert [plan.unit(i) for i in range(len(plan))] == planned
    assert list(plan.sizes) == [unit.size for unit in planned]
    assert write_plan(tmp_path / "again.jsonl", planned, {"engine": "y"}) == digest
    assert write_plan(tmp_path / "less.jsonl", planned[1:], {}) != digest
    assert not (tmp_path / "plan.jsonl.tmp").exists()


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
def test_shares_cover_each_task_once_and_are_balanced(workers):
    sizes = [(i * 7919) % 1000 + 1 for i in range(200)]
    shares = share(sizes, workers)
    assert sorted(task for tasks in shares for task in tasks) == list(range(200))
    loads = [sum(sizes[task] for task in tasks) for tasks in shares]
    assert max(loads) - min(loads) <= max(sizes)


def test_a_list_of_paths_is_read_in_its_order_and_each_file_once(tmp_path):
    tree(tmp_path, "a/x.txt", "a/.y.txt", "b/x.txt", "b/z.txt")
    (tmp_path / "linked").symlink_to("b")
    config = SourceConfig(
        kind="text", path=[f"{tmp_path}/b/*.txt", f"{tmp_path}/a/*", f"{tmp_path}/{{linked,b}}/x.txt"]
    )
    names, said = found(config)
    assert [name.removeprefix(f"{tmp_path}/") for name in names] == ["b/x.txt", "b/z.txt", "a/x.txt"]
    assert said == [
        f"left out of it: 1 hidden files, the first is {tmp_path}/a/.y.txt; a pattern that spells the dot reads them",
        f"left out of it: 1 files that are there by another name too, the first is {tmp_path}/linked/x.txt",
    ]
    for path, message in (("c.txt", "c.txt; no such file"), ("a", "a, which is a folder"), ("a/[.]*", "is left out")):
        with pytest.raises(ConfigError, match=message):
            files({"it": replace(config, path=[str(tmp_path / "b" / "*"), str(tmp_path / path)])})


def test_several_folders_are_read_and_reported_apart(tmp_path):
    tree(tmp_path, "a/x.py", "b/x.py", "b/deep/y.py")
    config = SourceConfig(kind="folder", path=[str(tmp_path / "b"), str(tmp_path / "a")], pattern="**/*.py")
    names, said = found(config)
    assert ([name.removeprefix(f"{tmp_path}/") for name in names], said) == (["b/deep/y.py", "b/x.py", "a/x.py"], [])


def test_several_data_sets_are_read_one_after_another(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, rows in (("one", ["1", "2"]), ("two", ["3"])):
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / name))
    config = SourceConfig(kind="dataset", path=[str(tmp_path / "two"), str(tmp_path / "one")])
    units_of = [piece for unit in units({"it": config}, 1) for piece in unit.pieces]
    hasher = xxhash.xxh3_128()
    texts = [record.text for piece in units_of for record in read(piece, config, 2**20, hasher)]
    assert texts == ["3", "1", "2"]


def test_a_build_and_the_training_of_a_tokenizer_read_lists_of_paths(tiny_tokenizer, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "some text of {name} to learn from"}}\n')
    source = ["sources.web.kind=jsonl", f"sources.web.path=[{tmp_path}/b.jsonl, {tmp_path}/a.jsonl]"]
    build = ["build", *source, f"tokenizer={tiny_tokenizer}", "heldout_fraction=0", "workers=1"]
    assert main([*build, f"out={tmp_path / 'out'}"]) == 0
    assert "kept of web: 2 documents" in capsys.readouterr().out
    assert main(["train-tokenizer", *source, "--vocab-size", "260", "--out", str(tmp_path / "new")]) == 0
    assert "learned from web: 2 documents" in capsys.readouterr().out
    assert main([*build, f"out={tmp_path}", "overwrite=true"]) == 2
    (tmp_path / "own.partial").mkdir()
    (tmp_path / "own.partial" / "c.jsonl").write_text('{"text": "kept"}\n')
    source[1] = f"sources.web.path=[{tmp_path}/b.jsonl, {tmp_path}/own.partial/c.jsonl]"
    assert main(["build", *source, f"tokenizer={tiny_tokenizer}", f"out={tmp_path / 'own'}"]) == 2
    assert "own.partial/c.jsonl, which lies in" in capsys.readouterr().err
