"""The benchmark runs every contender that is installed; its numbers are not judged here."""

import contextlib
import dataclasses
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from benchmarks.__main__ import main
from benchmarks.baselines import BASELINES
from benchmarks.data import Runs, _table
from benchmarks.loader import WAYS, megatron_data, ways
from tests.data_pipeline.builds import make_texts, write_jsonl

QUICK_LOADER = """
import json, pathlib, sys
from benchmarks import loader as bench
bench.COLD_BYTES, bench.SECONDS = 2**25, 0.1
print(json.dumps(bench.main(pathlib.Path(sys.argv[1]))))
"""


@pytest.mark.timeout(300)
def test_the_table_has_a_row_for_each_contender_and_the_loader(tiny_tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.data.BASELINES", {"per_document": BASELINES["per_document"]})
    monkeypatch.setattr("benchmarks.data.LOADER", ("-c", QUICK_LOADER))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_texts(40_000))
    assert main(["data", str(corpus), "--tokenizer", str(tiny_tokenizer), "--rounds", "1"]) == 0
    table = capsys.readouterr().out
    for row in ("ponder-data, gigatoken", "ponder-data, tiktoken", "ponder-data, reference", "per_document"):
        assert re.search(rf"^{row} +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9,]+$", table, re.MULTILINE), table
    assert re.search(r"^index: 20\.\d bytes a document$", table, re.MULTILINE)
    rows = re.findall(r"^(\D+) +([\d,.]+) (\S+)$", table.partition("bytes a document")[2], re.MULTILINE)
    assert len(rows) == 7 + 2 * len(ways()) and all(float(value.replace(",", "")) > 0 for _, value, _ in rows), table
    assert {unit for *_, unit in rows} == {"CPU-ms", "bytes", "sequences/CPU-s", "sequences/s", "x"}
    assert [way for way in WAYS if f"Megatron's GPTDataset, {way} " in table] == ways()
    assert "cold, plain memory map" in table


def test_each_way_in_which_megatron_tells_documents_apart_is_read(tiny_shards, tmp_path):
    shards = tiny_shards(train=(9000,))
    newer = "inter_document_masking" in {field.name for field in dataclasses.fields(GPTDatasetConfig)}
    assert ways() == ["positions", "positions and mask", *(["document lengths"] if newer else [])]
    for way in ways():
        sample = megatron_data(shards, way, tmp_path)[0]
        ends = (sample["tokens"] == shards.manifest.eod_id).nonzero().flatten()
        starts = sorted({0, *(ends + 1).tolist()} - {2048})
        assert len(starts) > 10 and (sample["position_ids"] == 0).nonzero().flatten().tolist() == starts
        assert ("attention_mask" in sample) == (way == "positions and mask")
        if way == "document lengths":
            assert sorted(set(sample["cu_seqlens"].tolist())) == [*starts, 2048]


def test_an_engine_that_fell_back_is_said_to_be_the_reference():
    ours = ("ponder-data, tiktoken", "ponder-data, reference")
    runs = {name: Runs([0.5], [1.0], [9.0], [100.0]) for name in (*ours, "per_document")}
    for name in ours:
        runs[name].engines.add("reference")
    lines = list(_table(runs, 1.0, 8.0))
    (said,) = [line for line in lines if "done by" in line]
    assert said == "  done by reference, as the engine gives other tokens than this tokenizer"
    assert re.fullmatch(r"ponder-data, tiktoken +0\.88 +1\.0 +0\.50 +100", lines[lines.index(said) - 1])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (100_000, "int32")])
def test_the_baselines_hold_the_tokens_of_large_vocabularies(tmp_path, monkeypatch, vocab_size, dtype):
    written = []

    class Writer(contextlib.AbstractContextManager):
        def __init__(self, out, columns):
            written.append(columns["tokens"])

        def write(self, sample):
            written.append(sample["tokens"].tolist())

        def __exit__(self, *error):
            pass

    monkeypatch.setitem(sys.modules, "streaming", SimpleNamespace(MDSWriter=Writer))
    vocabulary = {"a": 0, "b": vocab_size - 1} | {f"x{i}": i for i in range(1, vocab_size - 1)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["ab"])
    BASELINES["streaming"](corpus, tmp_path, tmp_path / "out")
    assert written == [f"ndarray:{dtype}", [0, vocab_size - 1]]
    BASELINES["per_document"](corpus, tmp_path, tmp_path / "out")
    assert np.fromfile(tmp_path / "out" / "tokens.bin", dtype).tolist() == [0, vocab_size - 1, 0]


def test_a_corpus_that_cannot_be_measured_is_refused(tiny_tokenizer, tmp_path, capsys):
    assert main(["data", str(tmp_path / "none.txt"), "--tokenizer", str(tiny_tokenizer)]) == 2
    assert "expected a .jsonl file and a folder with tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data x --tokenizer y --rounds 0", "--rounds is 0; expected at least 1"),
        ("step --runs 0", "--runs is 0; expected at least 1"),
        ("memory --steps -1", "--steps is -1; expected at least 0"),
        ("stepp", "no command stepp; did you mean step?"),
    ],
)
def test_a_slip_is_answered_in_one_line(words, message, capsys):
    with contextlib.suppress(SystemExit):
        assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and said.startswith("error: "), said
