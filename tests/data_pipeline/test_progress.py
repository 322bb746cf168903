import gzip
import json
import random
from itertools import accumulate

import pytest
import zstandard

from data_pipeline import progress
from data_pipeline.build.parallel import Team
from data_pipeline.cli import main
from data_pipeline.progress import Done, Progress, told
from ponder_scale.shards.manifest import read_manifest
from tests.data_pipeline.builds import arguments, make_texts, write_jsonl


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_few_seconds_and_one_at_the_end(clock, capsys):
    with Progress("build", 20_000_000) as work:
        for _ in range(10):
            clock[0] += 1.0
            work.add(2_000_000, documents=100, tokens=500_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "build: 10.0 of 20.0 MB (50%), 2.0 MB/s, 100 documents/s, 0.50 M tokens/s, 5 s left",
        "build: 20.0 of 20.0 MB (100%), 2.0 MB/s, 100 documents/s, 0.50 M tokens/s, 0 s left",
        "build: 20.0 of 20.0 MB (100%), 2.0 MB/s, 100 documents/s, 0.50 M tokens/s, 0 s left",
    ]


def test_a_small_input_has_units_that_fit(clock, capsys):
    with Progress("build", 3_210) as work:
        clock[0] += 1.0
        work.add(3_210, documents=10)
    assert capsys.readouterr().err == "build: 3.2 of 3.2 kB (100%), 3.2 kB/s, 10 documents/s, 0 s left\n"


@pytest.mark.parametrize("suffix", [".gz", ".zst", ""])
def test_progress_within_a_file_that_cannot_be_cut_is_by_its_stored_bytes(
    suffix, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    digits = random.Random(0)
    rows = "".join(json.dumps({"text": f"{digits.getrandbits(400):x}"}) + "\n" for _ in range(60_000)).encode()
    path = tmp_path / f"web.jsonl{suffix}"
    path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress, "": bytes}[suffix](rows))
    size, reported = path.stat().st_size, []
    assert suffix == "" or size < len(rows) * 0.7
    monkeypatch.setattr(Progress, "add", lambda self, size, documents=0, tokens=0: reported.append((size, documents)))
    settings = [f"out={tmp_path / 'out'}", f"tokenizer={tiny_tokenizer}", "workers=1", "heldout_fraction=0"]
    assert main(["build", *settings, "sources.web.kind=jsonl", f"sources.web.path={path}"]) == 0
    sizes, documents = (list(accumulate(column)) for column in zip(*reported, strict=True))
    assert sizes[-1] == size and documents[-1] == 60_000 and len(sizes) > 20
    for done, of_documents in zip(sizes, documents, strict=True):
        assert done / size == pytest.approx(of_documents / 60_000, abs=0.25)  # a decompressor reads ahead
    monkeypatch.setattr("data_pipeline.commands.estimate.WORTH_SPLITTING", 1000)
    assert main(["plan", *settings, "sources.web.kind=jsonl", f"sources.web.path={path}"]) == 0
    note = "; 1 compressed files cannot be cut: split them to use all cores"
    assert (note in capsys.readouterr().out) == bool(suffix)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_stage_reports_all_of_its_work(tiny_tokenizer, tmp_path, monkeypatch, workers):
    corpus = write_jsonl(tmp_path / "web.jsonl", make_texts(3000))
    stages = {}

    class Counting(Progress):
        def __init__(self, what, total_bytes, **more):
            super().__init__(what, total_bytes, **more)
            stages.setdefault(what, []).append([total_bytes, 0, 0, 0])

        def add(self, size, documents=0, tokens=0):
            counts = stages[self._what][-1]
            counts[1:] = [counts[1] + size, counts[2] + documents, counts[3] + tokens]

    monkeypatch.setattr("data_pipeline.build.workers.Progress", Counting)
    same = arguments(corpus, tiny_tokenizer, tmp_path / "out", "shard_bytes=60000", f"workers={workers}")
    assert main([*same, "deduplicate=exact", "shuffle=true"]) == 0
    assert list(stages) == ["keys", "duplicates", "build", "gather"]
    tokens = sum(info.tokens for infos in read_manifest(tmp_path / "out").splits.values() for info in infos)
    size = corpus.stat().st_size
    assert stages["keys"] == [[size, size, 3000, 0]]
    assert stages["duplicates"] == [[12 * 3000, 12 * 3000, 0, 0]]
    assert stages["build"] == [[size, size, 3000, tokens]]
    assert stages["gather"] == [[size, size, 3000, tokens]]


def test_a_restarted_build_begins_where_the_killed_one_ended(tiny_tokenizer, tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "web.jsonl", make_texts(3000))
    same = arguments(corpus, tiny_tokenizer, tmp_path / "out", "shard_bytes=60000", "workers=1")
    told = []

    def stop(self, size, documents=0, tokens=0):
        told.append(size)
        if sum(told) > corpus.stat().st_size / 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", stop)
        assert main(same) == 130
    begun = []

    class Noted(Progress):
        def __init__(self, what, total_bytes, **more):
            super().__init__(what, total_bytes, **more)
            begun.append((total_bytes, more["done"]))

    monkeypatch.setattr("data_pipeline.build.workers.Progress", Noted)
    assert main(same) == 0
    ((total, done),) = begun
    assert total == corpus.stat().st_size and 60_000 <= done <= sum(told)


def test_what_an_engine_did_in_vain_is_taken_back(tiny_tokenizer, tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "web.jsonl", [*make_texts(3000), " " * 1_000_000 + "x"])
    done = []
    monkeypatch.setattr(Progress, "add", lambda self, *news: done.append(news))
    settings = ["workers=1", "max_document_bytes=2000000", "backend=tiktoken"]
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", *settings)) == 0
    sizes, documents, tokens = (list(column) for column in zip(*done, strict=True))
    assert min(sizes) < 0 and sum(sizes) == corpus.stat().st_size
    infos = [info for infos in read_manifest(tmp_path / "out").splits.values() for info in infos]
    assert (sum(documents), sum(tokens)) == (3001, sum(info.tokens for info in infos))


def test_of_a_task_only_what_is_new_is_reported():
    def doing():
        yield Done(10, 1, 5)
        yield Done(10, 1, 5)
        yield Done(0)
        yield Done(20, 2, 9)
        return {"documents": 2}

    reports = []
    assert told(doing(), lambda *news: reports.append(news)) == {"documents": 2}
    assert reports == [(10, 1, 5), (0, 0, 0), (-10, -1, -5), (20, 2, 9)]


def test_a_rank_of_several_workers_sees_what_all_ranks_have_done(tiny_tokenizer, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Progress, "add", lambda self, *news: told.append(news))
    monkeypatch.setattr("data_pipeline.build.workers.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("data_pipeline.build.pipeline.assemble", lambda workers, prepare: (Team(0, 2, 2), prepare()))
    corpus = write_jsonl(tmp_path / "web.jsonl", make_texts(3000))
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", "shard_bytes=60000")) == 0
    size, documents, tokens = (sum(column) for column in zip(*told, strict=True))
    manifest = read_manifest(tmp_path / "out")
    infos = [info for infos in manifest.splits.values() for info in infos]
    assert (size, documents) == (corpus.stat().st_size, 3000)
    assert tokens == sum(info.tokens for info in infos)
    assert sum(news[0] > 0 for news in told) > 1  # while it works, not in the end only


def test_what_is_not_counted_is_not_shown(clock, capsys):
    with Progress("verify", 4_000_000) as work:
        clock[0] += 2.0
        work.add(4_000_000)
    assert capsys.readouterr().err == "verify: 4.0 of 4.0 MB (100%), 2.0 MB/s, 0 s left\n"


def test_what_was_done_before_counts_for_no_speed(clock, capsys):
    with Progress("build", 10_000_000, done=4_000_000) as work:
        clock[0] += 6.0
        work.add(3_000_000)
    assert "build: 7.0 of 10.0 MB (70%), 0.5 MB/s, 6 s left" in capsys.readouterr().err


def test_work_of_no_bytes_is_done(clock, capsys):
    with Progress("read", 0):
        pass
    assert "read: 0.0 of 0.0 MB (100%)" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("build", 1000) as work:
        work.add(1000, documents=3)
    assert "build: 100%" in capsys.readouterr().err
