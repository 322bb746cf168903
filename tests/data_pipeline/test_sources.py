import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.sources import files
from data_pipeline.units import Plan, share, units, write_plan
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
    ],
)
def test_a_source_that_names_no_file_is_refused(tmp_path, monkeypatch, config, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        files({"web": SourceConfig(**config)})


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
