"""Sources by URL: what is read is what lies there, whatever the server is like and however often it fails."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipeline.cli import main
from data_pipeline.config import SourceConfig
from data_pipeline.read import remote
from data_pipeline.read.readers import read
from data_pipeline.read.sources import LeftOut, files, split
from data_pipeline.read.units import check_unchanged
from ponder_scale.errors import ConfigError
from ponder_scale.shards.manifest import read_manifest
from tests.data_pipeline.builds import contents, documents, make_texts, write_jsonl
from tests.data_pipeline.reading import SUFFIXES, stored

from .webserver import serving

ROWS = [f"{i}: größe {'x' * (i * 37 % 500)}" for i in range(2000)]


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))


@pytest.fixture(params=["ranges", "whole", "memory"])
def store(request, tmp_path):
    """(a folder, the URL under which its files are found, a function to call when they have changed)."""
    folder = tmp_path / "served"
    folder.mkdir()
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        name = f"/{tmp_path.name}"

        def publish():
            if memory.exists(name):
                memory.rm(name, recursive=True)
            for path in folder.rglob("*"):
                if path.is_file():
                    memory.pipe(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

        yield folder, f"memory:/{name}", publish
        memory.rm(name, recursive=True)
        return
    with serving(folder, ranges=request.param == "ranges") as server:
        yield folder, server.url, lambda: None


def records(config: SourceConfig, size: int = 2**60):
    """All records of a source, and the hash of each piece."""
    found, hashes = [], []
    for file in files({"it": config}):
        for piece in split(file, config, size):
            hasher = xxhash.xxh3_128()
            found += [tuple(record) for record in read(piece, config, 2**16, hasher)]
            check_unchanged(piece)
            hashes.append((piece.begin, piece.end, hasher.hexdigest()))
    return found, hashes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lines_of_a_url_are_those_of_the_file(store, suffix):
    folder, url, publish = store
    content = "".join(json.dumps({"text": row}) + "\n" for row in [*ROWS, "nul"]).encode()
    path = stored(folder / f"a.jsonl{suffix}", content)
    publish()
    local = SourceConfig(kind="jsonl", path=str(path))
    distant = replace(local, path=f"{url}/{path.name}")
    assert records(distant) == records(local)
    cut = records(distant, 50_000)
    whole = suffix or ("http" in url and not remote.takes_ranges(distant.path))
    assert cut == records(local, 2**60 if whole else 50_000)
    assert len(cut[1]) == (1 if whole else 12)


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_what_is_whole_in_a_damaged_file_of_a_url_is_read(store, suffix):
    folder, url, publish = store
    path = stored(folder / f"a.jsonl{suffix}", "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode())
    path.write_bytes(path.read_bytes()[:-200])
    publish()
    local = SourceConfig(kind="jsonl", path=str(path))
    expected, _ = records(local)
    assert expected[-1][3] == "compressed data is damaged or cut off" and len(expected) > 500
    assert records(replace(local, path=f"{url}/{path.name}")) == records(local)


def test_parquet_of_a_url_is_read_in_parts_of_it(store):
    folder, url, publish = store
    table = pa.table({"id": range(2000), "data": [{"text": row} for row in ROWS], "other": ["y" * 2000] * 2000})
    pq.write_table(table, folder / "a.parquet", row_group_size=300, compression="none", use_dictionary=False)
    publish()
    local = SourceConfig(kind="parquet", path=str(folder / "a.parquet"), field="data.text")
    distant = replace(local, path=f"{url}/a.parquet")
    if "http" in url and not remote.takes_ranges(distant.path):
        with pytest.raises(ConfigError, match="only sends whole files, but parquet is read in parts; copy the file"):
            records(distant)
        return
    for size in (2**60, 700_000):
        assert records(distant, size) == records(local, size)
    (folder / "b.parquet").write_bytes(b"PAR1 and nothing else")
    publish()
    with pytest.raises(ConfigError, match=r"b.parquet is no parquet file that can be read"):
        records(replace(distant, path=f"{url}/b.parquet"))


def test_a_glob_of_urls_names_what_it_names_in_a_folder(store):
    folder, url, publish = store
    for name in ("b.txt", "a.txt", "in/c.txt", "in/deep/d.txt", ".e.txt", "in/.git/f.txt", "g.md", "x[1].txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    publish()
    for pattern in (
        "*.txt",
        "**/*.txt",
        "in/**/*.txt",
        "**/.*.txt",
        ".e*",
        "{b,a}.txt",
        "{in/c,in/deep/*}.txt",
        "[ab].*",
    ):
        local, distant = LeftOut(), LeftOut()
        expected = files({"it": SourceConfig(kind="text", path=f"{folder}/{pattern}")}, local)
        found = files({"it": SourceConfig(kind="text", path=f"{url}/{pattern}")}, distant)
        assert [piece.path.removeprefix(f"{url}/") for piece in found] == [
            piece.path.removeprefix(f"{folder}/") for piece in expected
        ], pattern
        assert distant.counts == local.counts, pattern
    config = SourceConfig(kind="folder", path=f"{url}/in/", pattern="**/*", exclude=["deep"])
    assert [piece.name for piece in files({"it": config})] == ["c.txt"]
    assert [piece.name for piece in files({"it": SourceConfig(kind="text", path=f"{url}/x[1].txt")})] == [
        f"{url}/x[1].txt"
    ]


def test_urls_that_name_no_file_are_refused_in_one_line(store):
    folder, url, publish = store
    (folder / "in").mkdir()
    (folder / "in" / "a.txt").write_text("a")
    publish()
    for path, message in (
        ("b.txt", "b.txt: no such file"),
        ("*.md", r"\*.md; no such file, and no file matches it as a glob"),
        ("in/", "in/: is a folder; name its files, such as .*in/\\*.jsonl"),
    ):
        with pytest.raises(ConfigError, match=f"sources.it.path is {url}/{message}"):
            files({"it": SourceConfig(kind="text", path=f"{url}/{path}")})
    with pytest.raises(ConfigError, match=r"sources.it.pattern is \*.py; it matches no file in"):
        files({"it": SourceConfig(kind="folder", path=f"{url}/in", pattern="*.py")})
    for path, message in (
        ("nothing://x/y.jsonl", "fsspec knows no nothing://; expected s3, gs, https, hf or the like"),
        (f"file://{folder}/in/a.txt", "write the path of a file on this machine without file://"),
    ):
        with pytest.raises(ConfigError, match=message):
            files({"it": SourceConfig(kind="text", path=path)})
    with pytest.raises(ConfigError, match="kind=dataset expects a name on the hub or a folder; read files at a URL"):
        files({"it": SourceConfig(kind="dataset", path=url)})


def test_a_library_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"library that reads s3:// is missing; pip install ponder-scale\[remote\]"):
        files({"it": SourceConfig(kind="text", path="s3://bucket/a.txt")})


def test_a_url_may_go_on_behind_the_name_of_the_file(tmp_path):
    stored(tmp_path / "a.jsonl.gz", b'{"text": "one"}\n')
    with serving(tmp_path) as server:
        found, _ = records(SourceConfig(kind="jsonl", path=f"{server.url}/a.jsonl.gz?download=true&x=*"))
    assert [record[2] for record in found] == ["one"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_network_that_fails_for_a_while_costs_no_record_and_doubles_none(
    tmp_path, capsys, ranges, suffix, monkeypatch
):
    monkeypatch.setattr(remote, "READ_BYTES", 2**17)
    rows = [f"{i}: {os.urandom(200).hex()}" for i in range(2000)]  # which no compression makes small
    path = stored(tmp_path / f"a.jsonl{suffix}", "".join(json.dumps({"text": row}) + "\n" for row in rows).encode())
    local = SourceConfig(kind="jsonl", path=str(path))
    expected = records(local)
    with serving(tmp_path, ranges=ranges) as server:
        distant = replace(local, path=f"{server.url}/{path.name}")
        (file,) = files({"it": distant})
        server.failures += [500, 0]
        hasher, found = xxhash.xxh3_128(), []
        for record in read(file, distant, 2**16, hasher):
            found.append(tuple(record))
            if len(found) in (300, 900) and ranges and not server.failures:
                server.failures += [0, 429]
        assert (found, hasher.hexdigest()) == (expected[0], expected[1][0][2])
        assert not server.failures
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 6 and all(line.startswith(f"warning: {server.url}/{path.name}: ") for line in said)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_fails_for_good_is_one_line_and_no_damage(tmp_path, suffix, ranges, monkeypatch):
    monkeypatch.setattr(remote, "READ_BYTES", 2**17)
    content = os.urandom(2**19).hex().encode()  # which no compression makes small
    path = stored(tmp_path / f"a.txt{suffix}", content)
    with serving(tmp_path, ranges=ranges) as server:
        config = SourceConfig(kind="text", path=f"{server.url}/{path.name}")
        (file,) = files({"it": config})
        server.failures += [0, 500, 500, 500, 500]
        with pytest.raises(
            ConfigError, match=rf"{path.name} cannot be read: 500 Internal .* \(tried 3 times\)"
        ) as error:
            list(read(file, config, 2**24, xxhash.xxh3_128()))
        assert str(error.value).startswith(f"sources.it: {server.url}/{path.name}") and "\n" not in str(error.value)


@pytest.mark.parametrize(("code", "said"), [(403, "403 Forbidden"), (401, "401 Unauthorized")])
def test_what_is_forbidden_is_not_tried_again(tmp_path, code, said, capsys):
    (tmp_path / "a.txt").write_text("a")
    with serving(tmp_path) as server:
        config = SourceConfig(kind="text", path=f"{server.url}/a.txt")
        (file,) = files({"it": config})
        server.failures += [code] * 9
        with pytest.raises(ConfigError, match=f"a.txt cannot be read: {said}$"):
            list(read(file, config, 2**16, xxhash.xxh3_128()))
        assert len(server.failures) == 8
    assert capsys.readouterr().err == ""


def test_a_server_that_is_not_there_is_not_a_missing_file(tmp_path):
    with serving(tmp_path) as server:
        pass
    server.server_close()
    for path in ("a.jsonl", "*.jsonl"):
        with pytest.raises(ConfigError, match=r"jsonl: Cannot connect to host .*\(tried 3 times\)"):
            files({"it": SourceConfig(kind="jsonl", path=f"{server.url}/{path}")})


def arguments(url, tokenizer, out, *more):
    source = ["sources.web.kind=jsonl", f"sources.web.path={url}"]
    return ["build", f"out={out}", f"tokenizer={tokenizer}", *source, "heldout_fraction=0.1", *more]


def test_a_build_from_urls_is_that_from_files(tiny_tokenizer, tmp_path, capsys):
    (tmp_path / "served").mkdir()
    path = write_jsonl(tmp_path / "served" / "a.jsonl", make_texts(1500))
    stored(tmp_path / "served" / "b.jsonl.zst", write_jsonl(tmp_path / "b", make_texts(200, seed=1)).read_bytes())
    evaluation = write_jsonl(tmp_path / "served" / "quiz.json", make_texts(3, seed=2))
    evaluation.rename(tmp_path / "served" / "quiz.jsonl")
    with serving(tmp_path / "served") as server:
        for name, place, workers in (("local", tmp_path / "served", 1), ("distant", server.url, 2)):
            more = ["shard_bytes=40000", f"workers={workers}"]
            against = f"sources.web.filters={{decontaminate: {{against: ['{place}/quiz.jsonl'], n: 8}}}}"
            glob = f"{place}/[ab].jsonl*"
            assert main(["plan", *arguments(glob, tiny_tokenizer, tmp_path / name, against, *more)[1:]]) == 0
            assert main(arguments(glob, tiny_tokenizer, tmp_path / name, against, *more)) == 0
        learn = ["train-tokenizer", f"{server.url}/a.jsonl?x=y", "--vocab-size", "260", "--out", str(tmp_path / "tok")]
        assert main(learn) == 0
        capsys.readouterr()
        assert main(arguments(glob, tiny_tokenizer, tmp_path / "distant", against, *more)) == 0
        assert "was built from these inputs and settings already" in capsys.readouterr().out
        stored(path.parent / "quiz.jsonl", b'{"text": "an evaluation set of eight words that is another"}\n')
        assert main(arguments(glob, tiny_tokenizer, tmp_path / "distant", against, *more)) == 2
        assert "files that filters read" in capsys.readouterr().err
    local, distant = contents(tmp_path / "local"), contents(tmp_path / "distant")
    assert local.keys() == distant.keys() and len([name for name in local if name.endswith(".bin")]) > 8
    for name, content in local.items():
        if name.endswith((".bin", ".idx")):
            assert content == distant[name]
    inputs = distant["inputs.jsonl"].decode().replace(server.url, str(tmp_path / "served"))
    assert inputs == local["inputs.jsonl"].decode()
    counts = [read_manifest(tmp_path / name).provenance["sources"] for name in ("local", "distant")]
    assert counts[0] == counts[1]


@pytest.fixture
def four(tmp_path):
    """A folder with four files of one size, each of which is a unit of a build with these settings."""
    folder = tmp_path / "served"
    folder.mkdir()
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", make_texts(100))
    return folder, [f"shard_bytes={(folder / '0.jsonl').stat().st_size}", "workers=1"]


def read_by(server) -> set[str]:
    return {path for method, path, wanted in server.requests if method == "GET" and wanted}


@pytest.mark.faults
def test_a_build_that_lost_its_server_goes_on_from_the_units_that_are_done(tiny_tokenizer, tmp_path, capsys, four):
    folder, more = four
    assert main(arguments(folder / "*.jsonl", tiny_tokenizer, tmp_path / "local", *more)) == 0
    with serving(folder) as server:
        build = arguments(f"{server.url}/*.jsonl", tiny_tokenizer, tmp_path / "out", *more)
        server.broken.add("/2.jsonl")
        assert main(build) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: sources.web: {server.url}/2.jsonl cannot be read: 503 ")
        server.broken.clear()
        before = read_by(server)
        server.requests.clear()
        assert main(build) == 0
    assert "/2.jsonl" in read_by(server) and not read_by(server) & (before - {"/2.jsonl"})
    assert documents(tmp_path / "out", "train") == documents(tmp_path / "local", "train")


@pytest.mark.faults
def test_a_killed_build_notices_a_url_whose_content_has_changed_since(tiny_tokenizer, tmp_path, capsys, four):
    folder, more = four
    with serving(folder) as server:
        build = arguments(f"{server.url}/*.jsonl", tiny_tokenizer, tmp_path / "out", *more)
        server.silent["/3.jsonl"] = threading.Event()
        with subprocess.Popen([sys.executable, "-m", "data_pipeline.cli", *build], stderr=subprocess.PIPE) as process:
            assert server.asked.wait(120)
            process.kill()
        server.silent.pop("/3.jsonl").set()
        old = (folder / "0.jsonl").read_bytes()
        (folder / "0.jsonl").write_bytes(old.replace(b"0: ", b"9: "))  # of the same size
        capsys.readouterr()
        assert main(build) == 2
        assert "out.partial holds an unfinished build from other inputs; restore these" in capsys.readouterr().err
        (folder / "0.jsonl").write_bytes(old)
        server.requests.clear()
        assert main(build) == 0
        assert "/3.jsonl" in read_by(server) and "/0.jsonl" not in read_by(server)


def test_a_url_whose_content_changes_while_it_is_read_is_noticed(four):
    folder, _ = four
    with serving(folder) as server:
        config = SourceConfig(kind="jsonl", path=f"{server.url}/0.jsonl")
        (file,) = files({"web": config})
        list(read(file, config, 2**16, xxhash.xxh3_128()))
        (folder / "0.jsonl").write_bytes((folder / "0.jsonl").read_bytes().replace(b"0: ", b"9: "))
        with pytest.raises(ConfigError, match=r"0.jsonl was changed while it was read; when it no longer changes, run"):
            check_unchanged(file)
