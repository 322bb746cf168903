"""A source gives no more than its cap: its first documents, the same for any number of workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.caps import find_cut, is_behind
from data_pipeline.cli import main
from data_pipeline.config import SourceConfig
from ponder_scale.shards.manifest import read_manifest, verify
from tests.data_pipeline.builds import arguments, contents, documents, make_texts, write_jsonl

COUNT = 240
SMALL = "shard_bytes=3000"
ALONE = "workers=1"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "web.jsonl", make_texts(COUNT))


def lengths_in_order(corpus: Path, tokenizer: Path, out: Path) -> list[int]:
    """The tokens of each document, as one split of one shard holds them."""
    assert main(arguments(corpus, tokenizer, out, "heldout_fraction=0")) == 0
    return list(map(len, documents(out, "train")))


def taken(out: Path, tokens: bool = False) -> int:
    infos = [info for infos in read_manifest(out).splits.values() for info in infos if info.source == "web"]
    return sum(info.tokens if tokens else info.documents for info in infos)


@pytest.mark.parametrize("cap", [1, 100, COUNT - 1, COUNT])
def test_so_many_documents_are_the_first_of_their_source(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, cap: int, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", make_texts(COUNT)[:cap])
    expected, out = tmp_path / "expected", tmp_path / "out"
    assert main(arguments(first, tiny_tokenizer, expected)) == 0
    capsys.readouterr()
    assert main(arguments(corpus, tiny_tokenizer, out, SMALL, ALONE, f"sources.web.max_documents={cap}")) == 0
    said = capsys.readouterr().out
    for split in ("train", "heldout"):
        assert documents(out, split) == documents(expected, split)
    assert taken(out) == min(cap, COUNT) and verify(out) == []
    counts = read_manifest(out).provenance["sources"]["web"]
    behind = counts["drops"].get("behind the cap", 0)
    read = sum(json.loads(line)["bytes"] for line in (out / "inputs.jsonl").read_text().splitlines())
    left = corpus.stat().st_size - read
    assert counts.get("bytes_behind_cap", 0) == left
    assert (f"{behind:,} behind the cap" in said) == bool(behind)
    assert (f"left out of web: {left:,} bytes of input behind the cap" in said) == bool(left)
    assert bool(behind or left) == (cap < COUNT)
    assert main(["inspect", str(out)]) == 0
    assert ("behind the cap" in capsys.readouterr().out) == (cap < COUNT)


@pytest.mark.parametrize("shuffle", [False, True])
def test_so_many_tokens_are_the_documents_before_the_first_that_exceeds_them(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, shuffle: bool
) -> None:
    ends = np.cumsum(lengths_in_order(corpus, tiny_tokenizer, tmp_path / "whole"))
    for number, cap in enumerate((int(ends[5]), int(ends[5]) - 1, int(ends[100]) + 3, int(ends[-1]))):
        out = tmp_path / f"out-{number}"
        more = [SMALL, ALONE, f"sources.web.max_tokens={cap}", f"shuffle={str(shuffle).lower()}"]
        assert main(arguments(corpus, tiny_tokenizer, out, *more)) == 0
        fitting = int(np.searchsorted(ends, cap, side="right"))
        assert taken(out) == fitting and taken(out, tokens=True) == ends[fitting - 1] <= cap
        assert verify(out) == [] and (fitting < 50 or documents(out, "heldout"))


@pytest.mark.parametrize("more", [["shuffle=true"], ["deduplicate=exact", "keep_dropped=true"]])
def test_what_a_cap_leaves_does_not_depend_on_who_did_what(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, more: list[str]
) -> None:
    with corpus.open("a") as stream:
        stream.write(corpus.read_text()[: corpus.stat().st_size // 2].rsplit("\n", 1)[0] + "\n")
    other = write_jsonl(tmp_path / "books.jsonl", make_texts(40, seed=3))
    books = ["sources.books.kind=jsonl", f"sources.books.path={other}"]
    made = []
    for workers in (1, 2):
        out = tmp_path / f"out-{workers}"
        caps = ["sources.web.max_documents=60", "sources.web.max_tokens=3000"]
        command = arguments(corpus, tiny_tokenizer, out, SMALL, f"workers={workers}", *caps, *books, *more)
        assert main(command) == 0 and verify(out) == []
        made.append({name: content for name, content in contents(out).items() if name != "manifest.json"})
        provenance = {**read_manifest(out).provenance, "command": ""}
        assert provenance["sources"]["books"]["documents"] == 40
        made.append(provenance)
    assert made[0] == made[2] and made[1] == made[3]


def test_ranks_of_mpi_take_the_same(corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("no MPI")
    made = []
    for ranks in (1, 2):
        out = tmp_path / f"out-{ranks}"
        command = arguments(corpus, tiny_tokenizer, out, SMALL, "sources.web.max_tokens=2000", "shuffle=true")
        alone = [sys.executable, "-m", "data_pipeline.cli", *command]
        subprocess.run([mpiexec, "-n", "2", *alone] if ranks == 2 else alone, check=True, capture_output=True)
        made.append({name: content for name, content in contents(out).items() if name != "manifest.json"})
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("where", "shuffle"), [("cut", "false"), ("cut", "true"), ("placed", "false"), ("seal", "true")]
)
def test_a_capped_build_killed_anywhere_goes_on(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, where: str, shuffle: str
) -> None:
    more = [SMALL, "sources.web.max_documents=97", "shard_tokens=300", ALONE, f"shuffle={shuffle}"]
    expected, out = tmp_path / "expected", tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, expected, *more)) == 0
    kill = {
        "cut": "stages.Room = lambda *left: os._exit(9) if any(left) else room(*left)",
        "placed": "placed = shard.placed\n"
        "shard.placed = lambda *a: (placed(*a), os._exit(9) if len(calls) == 4 else calls.append(1))[0]",
        "seal": "finish.seal = lambda *_: os._exit(9)",
    }[where]
    imports = "import os, sys\nfrom data_pipeline import cli\nfrom data_pipeline.build import finish, shard, stages\n"
    command = arguments(corpus, tiny_tokenizer, out, *more)
    run = f"{imports}calls, room = [], stages.Room\n{kill}\nsys.exit(cli.main(sys.argv[1:]))"
    code = subprocess.run([sys.executable, "-c", run, *command], capture_output=True, env={**os.environ}).returncode
    assert code == 9
    assert main(command) == 0
    assert verify(out) == []
    same = [{k: v for k, v in contents(one).items() if k != "manifest.json"} for one in (out, expected)]
    assert same[0] == same[1]


def test_a_unit_behind_the_cap_is_not_read(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.read import records

    read, count = records.read, []
    monkeypatch.setattr(records, "read", lambda piece, *more: (count.append(piece.begin), read(piece, *more))[1])
    more = [ALONE, SMALL, "sources.web.max_documents=10"]
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", *more)) == 0
    assert count == [0]


def test_the_tokenizer_learns_from_capped_sources(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["sources.web.kind=jsonl", f"sources.web.path={corpus}", "sources.web.max_tokens=10"]
    out = ["--vocab-size", "280", "--out", str(tmp_path / "tokenizer")]
    assert main(["train-tokenizer", *source, "sources.web.max_documents=50", *out]) == 0
    said = capsys.readouterr()
    assert "learned from web: 50 documents" in said.out and f"{COUNT - 50} behind the cap" in said.out
    assert "warning: sources.web.max_tokens: ignored" in said.err


def test_where_a_cap_lies_by_the_journals_of_units() -> None:
    """By an account of its own: documents are taken one after the other until one does not fit."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        units = [generator.integers(1, 9, generator.integers(0, 5)).tolist() for _ in range(6)]
        most, tokens = (int(generator.integers(1, bound)) if generator.random() < 0.7 else None for bound in (12, 60))
        if most is None and tokens is None:
            continue
        source = SourceConfig(kind="jsonl", path="x", max_documents=most, max_tokens=tokens)

        def alone(lengths: list[int], most: int | None = most, tokens: int | None = tokens) -> tuple[int, bool]:
            count = 0
            while count < len(lengths):
                if most is not None and count == most:
                    return count, True
                if tokens is not None and sum(lengths[: count + 1]) > tokens:
                    return count, True
                count += 1
            return count, False

        whole = [length for unit in units for length in unit]
        expected, _ = alone(whole)
        journals = []
        for unit in units:
            count, full = alone(unit)
            exactly = count == most or sum(unit[:count]) == tokens
            journals.append({"documents": count, "tokens": sum(unit[:count]), "full": full or exactly})
        cut = find_cut(source, enumerate(journals))
        assert cut is not None
        found = 0
        for number, unit in enumerate(units):
            if number in cut.behind:
                continue
            if number == cut.unit:
                found += alone(unit, cut.documents, cut.tokens)[0]
            else:
                assert journals[number]["documents"] == len(unit) or journals[number]["full"]
                found += journals[number]["documents"]
        assert found == expected
        for number in range(len(units)):
            some = [journals[i] for i in range(number) if generator.random() < 0.6]
            assert not is_behind(source, some) or number in cut.behind
