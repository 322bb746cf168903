"""What must hold at any size: memory of a worker, and that no damage goes unseen."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.cli import main
from ponder_scale.errors import ShardError
from ponder_scale.shards.manifest import verify
from tests.data_pipeline.builds import arguments, make_texts, write_jsonl

LIMIT_MB = 512


# A process counts the memory of the one that started it as its own until it runs a program: so a small one does.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_mb(command: list[str]) -> float:
    """Peak memory of a build and of its workers, each on its own, in MB."""
    build = [sys.executable, "-c", MEASURE, sys.executable, "-m", "data_pipeline.cli", *command]
    code, peak = map(int, subprocess.run(build, capture_output=True, text=True, check=True).stdout.split())
    assert code == 0
    return peak / 1024


@pytest.mark.parametrize("backend", ["reference", "gigatoken"])
def test_a_worker_takes_bounded_memory_with_enormous_documents(tiny_tokenizer, tmp_path, backend):
    path = tmp_path / "web.jsonl"
    word = "a sentence of some words, repeated as often as the limit allows. "
    with path.open("w") as stream:
        for _ in range(3):
            stream.write(json.dumps({"text": (word * 40_000)[: 2**20]}) + "\n")
        stream.write('{"text": "')
        for _ in range(200):
            stream.write("b" * 10**6)
        stream.write('"}\n')
        stream.writelines(json.dumps({"text": text}) + "\n" for text in make_texts(2000))
    command = arguments(path, tiny_tokenizer, tmp_path / "out", f"backend={backend}", "workers=1")
    assert peak_mb(command) < LIMIT_MB
    drops = json.loads((tmp_path / "out" / "manifest.json").read_text())["provenance"]["sources"]["web"]["drops"]
    assert drops == {"longer than max_document_bytes": 1}


def test_every_flip_and_every_truncation_of_every_file_is_found_and_named(tiny_tokenizer, tmp_path):
    corpus = write_jsonl(tmp_path / "web.jsonl", [*make_texts(300), "\ud800"[:0]])
    out = tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, out, "shard_bytes=15000", "workers=1")) == 0
    generator = random.Random(0)
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        for _ in range(8):
            place = generator.randrange(len(content))
            damaged = bytearray(content)
            damaged[place] ^= 1 << generator.randrange(8)
            for damage in (bytes(damaged), content[:place], b""):
                path.write_bytes(damage)
                assert path.relative_to(out).as_posix() in " ".join(findings(out)), (path, place)
        path.write_bytes(content)
    assert verify(out) == []


def findings(out: Path) -> list[str]:
    """What `ponder-data verify` says."""
    try:
        return verify(out)
    except ShardError as error:
        return [str(error)]
