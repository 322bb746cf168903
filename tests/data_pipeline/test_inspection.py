"""What `ponder-data inspect` shows: lengths against a count by hand, memory that does not grow, boundaries."""

import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.tokenize.training import train_tokenizer
from data_pipeline.write.lengths import Lengths
from ponder_scale.shards.format import ShardWriter
from ponder_scale.shards.manifest import Manifest, seal, tokenizer_sha256


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_and_bars_are_those_of_the_lengths(seed):
    generator = np.random.default_rng(seed)
    values = np.concatenate([generator.lognormal(6, 2, 5000).astype(np.int64), [0, 1, 4095, 4096, 8191, 2**31 - 1]])
    lengths = Lengths()
    for some in np.array_split(values, 7):
        lengths.add(some)
    parts = [0.0, 0.1, 0.5, 0.9, 0.99]
    expected = np.quantile(values, parts, method="nearest").tolist()
    for found, value in zip(lengths.quantiles(parts), expected, strict=True):
        assert found == value if value < 8192 else value * (1 - 2**-12) <= found <= value
    rows = [line.rpartition("%")[0].split() for line in lengths.bars()]
    spans = [(0, 0), (1, 1), *((2**bit, 2 ** (bit + 1) - 1) for bit in range(1, 31))]
    assert len(rows) == len(spans)
    for row, (low, high) in zip(rows, spans, strict=True):
        inside = values[(values >= low) & (values <= high)]
        assert row[:-2] == ([str(low)] if low == high else [f"{low:,}", "to", f"{high:,}"])
        assert int(row[-2].replace(",", "")) == len(inside)
        assert float(row[-1]) == pytest.approx(100 * inside.sum() / values.sum(), abs=0.06)


def test_memory_does_not_grow_with_documents(tmp_path, tiny_tokenizer):
    writer = ShardWriter(tmp_path, "train-00000", 300)
    for _ in range(8):
        writer.add(np.zeros(2**20, np.uint16), np.ones(2**20, np.int64))
    sha256 = tokenizer_sha256([tiny_tokenizer / "tokenizer.json"])
    seal(tmp_path, Manifest("uint16", 300, 0, None, sha256, {"train": [writer.close()], "heldout": []}))
    (tmp_path / "tokenizer").symlink_to(tiny_tokenizer)
    # private memory: pages of mapped files are the kernel's to take back
    program = (
        "import sys, threading, time\n"
        "from data_pipeline.cli import main\n"
        "most = 0\n"
        "def private():\n"
        "    return int([l for l in open('/proc/self/status') if l.startswith('RssAnon')][0].split()[1]) / 1024\n"
        "def watch():\n"
        "    global most\n"
        "    while True:\n"
        "        most = max(most, private()); time.sleep(0.002)\n"
        "before = private()\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "assert main(['inspect', sys.argv[1]]) == 0\n"
        "print('GREW', most - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    grew = float(done.stdout.rpartition("GREW")[2])
    assert "8,388,608 documents" in done.stdout and grew < 150  # the lengths alone, as quantiles take them, are 64 MB


def test_samples_show_where_documents_meet(tmp_path, capsys):
    from data_pipeline.cli import main

    words = tmp_path / "tokenizer"
    train_tokenizer([f"one two three four {i}" for i in range(50)], 300, "bpe", words)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the first"}\n{"text": "' + "long " * 200 + '"}\n{"text": "the last"}\n')
    out = tmp_path / "out"
    build = ["build", f"out={out}", f"tokenizer={words}", "heldout_fraction=0"]
    assert main([*build, "sources.x.kind=jsonl", f"sources.x.path={texts}"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--samples", "3"]) == 0
    shown = capsys.readouterr().out.split("--- ")[1:]
    assert shown[0].splitlines()[1].startswith("|== document 0 of 3: ") and "'the first<|endoftext|>'" in shown[0]
    before, boundary, text, end = shown[1].splitlines()[1:]
    assert before == "'the first<|endoftext|>'" and boundary.startswith("|== document 1 of 3: ")
    assert text.startswith("'long long") and " tokens ... '" in text and end == "==|"
    before, _, text, _ = shown[2].splitlines()[1:]
    assert "tokens ... '" in before and before.endswith("long <|endoftext|>'") and text == "'the last<|endoftext|>'"
