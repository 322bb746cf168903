"""Sources in an object store: moto's S3 server on loopback, read by s3fs, as a user's build reads them.

Both packages are installed once into a folder of their own, so that a build runs with them as with the extra `remote`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cli import main
from tests.data_pipeline.builds import contents, make_texts, write_jsonl
from tests.data_pipeline.reading import stored
from tests.export.versions import CACHE, install
from tests.ranks import REPOSITORY

MOTO = "5.2.5"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
PUT = """
import sys, s3fs
store = s3fs.S3FileSystem()
if not store.exists("corpus"):
    store.mkdir("corpus")
store.put(sys.argv[1], f"corpus/{sys.argv[2]}", recursive=True)
store.touch("corpus/in/")
"""


@functools.cache
def packages() -> Path:
    """The folder with s3fs and moto."""
    fsspec = version("fsspec")
    folder = CACHE / f"s3fs-{fsspec}-moto-{MOTO}"
    install(folder, f"s3fs=={fsspec}", f"fsspec=={fsspec}", f"moto[s3]=={MOTO}", "flask", "flask-cors")
    return folder


class Store:
    """A running S3 server, and programs that know of it."""

    def __init__(self, port: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        keys = {"AWS_ACCESS_KEY_ID": "some", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        self.environment = {**kept, **keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "PYTHONPATH": _path()}

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A Python program, whatever it returns."""
        environment = {**self.environment, **more}
        return subprocess.run([sys.executable, *command], env=environment, text=True, capture_output=True, timeout=300)

    def put(self, path: Path, name: str) -> None:
        """Store a file, or all of a folder."""
        done = self.run("-c", PUT, str(path), name)
        assert done.returncode == 0, done.stderr

    def data(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """ponder-data."""
        return self.run("-m", "data_pipeline.cli", *arguments, **more)


def _path() -> str:
    return f"{packages()}:{REPOSITORY}"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "PYTHONPATH": _path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None and server.stdin is not None
        yield Store(server.stdout.readline().strip())
        server.stdin.close()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of jsonl, plain and compressed, and parquet with the text in a struct."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", make_texts(1000))
    write_jsonl(folder / ".hidden.jsonl", ["never read"])
    stored(folder / "deep" / "b.jsonl.zst", write_jsonl(tmp_path / "b", make_texts(300, seed=1)).read_bytes())
    table = pa.table({"data": [{"text": text} for text in make_texts(400, seed=2)], "id": range(400)})
    pq.write_table(table, folder / "c.parquet", row_group_size=100)
    return folder


def recipe(path: Path, place: str) -> str:
    sources: dict[str, Any] = {
        "lines": {"kind": "jsonl", "path": [f"{place}/deep/*.zst", f"{place}/**/[!b].jsonl", f"{place}/**/*.jsonl"]},
        "rows": {"kind": "parquet", "path": f"{place}/*.parquet", "field": "data.text"},
    }
    path.write_text(json.dumps({"sources": sources}))
    return str(path)


def test_a_build_from_an_object_store_is_that_from_files(store, corpus, tiny_tokenizer, tmp_path):
    store.put(corpus, "")
    common = [f"tokenizer={tiny_tokenizer}", "shard_bytes=30000", "workers=1"]
    assert main(["build", recipe(tmp_path / "l.yaml", str(corpus)), f"out={tmp_path / 'local'}", *common]) == 0
    build = ["build", recipe(tmp_path / "d.yaml", "s3://corpus/in"), f"out={tmp_path / 'distant'}", *common]
    done = store.data(*build)
    assert done.returncode == 0, done.stderr
    assert "left out of lines: 1 hidden files, the first is s3://corpus/in/.hidden.jsonl" in done.stderr
    local, distant = contents(tmp_path / "local"), contents(tmp_path / "distant")
    assert local.keys() == distant.keys() and len([name for name in local if name.endswith(".bin")]) > 6
    assert all(distant[name] == content for name, content in local.items() if name.endswith((".bin", ".idx")))
    assert distant["inputs.jsonl"].decode().replace("s3://corpus/in", str(corpus)) == local["inputs.jsonl"].decode()
    again = store.data(*build)
    assert again.returncode == 0 and "built from these inputs and settings already" in again.stdout
    (corpus / "a.jsonl").write_bytes((corpus / "a.jsonl").read_bytes().replace(b"7: ", b"8: "))  # of the same size
    store.put(corpus / "a.jsonl", "in/a.jsonl")
    changed = store.data(*build)
    assert changed.returncode == 2 and "which was made from other inputs" in changed.stderr


def test_what_an_object_store_refuses_is_one_line(store, corpus, tiny_tokenizer, tmp_path):
    store.put(corpus, "")
    for path, more, message in (
        ("s3://nothing/*.jsonl", {}, "s3://nothing/*.jsonl"),
        ("s3://corpus/in/z.jsonl", {}, "sources.web.path is s3://corpus/in/z.jsonl: no such file"),
        ("s3://corpus/in", {}, "s3://corpus/in: is a folder; name its files, such as s3://corpus/in/*.jsonl"),
        ("s3://corpus/in/a.jsonl", {"PYTHONPATH": str(REPOSITORY)}, "pip install ponder-scale[remote]"),
    ):
        source = ["sources.web.kind=jsonl", f"sources.web.path={path}"]
        done = store.data("build", *source, f"tokenizer={tiny_tokenizer}", f"out={tmp_path / 'out'}", **more)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
