import gzip
import json
import random
from itertools import accumulate

import pytest
import zstandard

from data_pipeline import progress
from data_pipeline.cli import main
from data_pipeline.progress import Progress


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
    monkeypatch.setattr("data_pipeline.estimate.WORTH_SPLITTING", 1000)
    assert main(["plan", *settings, "sources.web.kind=jsonl", f"sources.web.path={path}"]) == 0
    note = "; 1 compressed files cannot be cut: split them to use all cores"
    assert (note in capsys.readouterr().out) == bool(suffix)


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
