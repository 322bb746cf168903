"""What a tokenizer learns from: which texts, in which shares, and what is said of those that it does not."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cli import main
from data_pipeline.progress import Progress
from data_pipeline.tokenize import texts
from data_pipeline.tokenize.tokenizer import open_tokenizer
from tests.data_pipeline.builds import make_texts, write_jsonl


def train(out, *arguments) -> int:
    return main(["train-tokenizer", *map(str, arguments), "--vocab-size", "300", "--out", str(out)])


@pytest.fixture
def learned(monkeypatch):
    """The texts that the tokenizers of a test have learned from."""
    found = []

    def take(texts, *_):
        found.extend(texts)
        return 300

    monkeypatch.setattr("data_pipeline.tokenize.training._train_bpe", take)
    return found


@pytest.fixture
def inputs(tmp_path):
    """Parquet whose column is content, and more jsonl whose key is text."""
    rows = make_texts(40)
    pq.write_table(pa.table({"content": rows[:10]}), tmp_path / "a.parquet")
    return tmp_path / "a.parquet", write_jsonl(tmp_path / "b.jsonl", rows[10:])


def test_records_that_a_field_leaves_out_end_the_training(inputs, tmp_path, capsys):
    """15,218 of 17,062 documents were once left out without a word."""
    assert train(tmp_path / "out", *inputs, "--field", "content") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"30 of 30 records of .*b.jsonl are bad \(30 field missing\), more than max_bad_fraction 0.01", error
    )
    assert re.search(r"the first is .*b.jsonl at 0: field missing; correct the input, name the right field", error)
    assert not (tmp_path / "out").exists()
    pq.write_table(pa.table({"content": make_texts(5000)}), inputs[0])  # and if they are less than the bound of all
    assert train(tmp_path / "out", *inputs, "--field", "content") == 2


def test_what_is_left_out_is_counted(inputs, tmp_path, capsys, learned):
    path = inputs[1]
    path.write_text(path.read_text() + '{"text": broken\n{"text": ""}\n{"text": 1}\n')
    assert train(tmp_path / "out", path) == 2
    error = capsys.readouterr().err
    assert "2 of 33 records are bad" in error and "1 malformed JSON" in error and "1 field is not a string" in error
    learned.clear()
    assert train(tmp_path / "out", path, "--max-bad-fraction", "0.1") == 0
    out = capsys.readouterr().out
    assert f"learned from {path}: 30 documents, {sum(len(text.encode()) for text in learned):,} bytes of text" in out
    for reason in ("empty", "field is not a string", "malformed JSON"):
        assert f"dropped from {path}: 1 {reason}\n" in out
    assert learned == make_texts(40)[10:]


def test_a_recipe_gives_each_source_its_field_and_filters(inputs, tmp_path, capsys, learned):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
sources:
  code: {{kind: parquet, path: {inputs[0]}, field: content}}
  web: {{kind: jsonl, path: {inputs[1]}, filters: {{length: {{min_characters: 40}}}}}}
deduplicate: minhash
"""
    )
    rows = make_texts(40)
    expected = rows[:10] + [text for text in rows[10:] if len(text) >= 40]
    dropped = 40 - len(expected)
    assert dropped
    for number, arguments in enumerate(([recipe], ["--recipe", recipe], [recipe, "out=anywhere", "tokenizer=any"])):
        learned.clear()
        assert train(tmp_path / str(number), *arguments) == 0
        assert learned == expected
        assert f"dropped from web: {dropped} length: too short" in capsys.readouterr().out
    assert train(tmp_path / "other", recipe, "sources.web.filters.length.min_characters=0") == 0
    source = ["sources.only.kind=jsonl", f"sources.only.path={inputs[1]}"]
    learned.clear()
    assert train(tmp_path / "settings", *source) == 0
    assert learned == rows[10:]


def test_weights_are_shares_of_the_bytes_of_text(tmp_path, capsys, learned):
    generator = np.random.default_rng(0)
    sizes = {"large": (2000, 30), "small": (300, 80)}
    for name, (count, words) in sizes.items():
        rows = [f"{name} " + "x" * int(generator.integers(1, words * 6)) for _ in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    source = [f"sources.{name}.{key}" for name in sizes for key in ("kind=jsonl", f"path={tmp_path}/{name}.jsonl")]
    shares = {}
    for weights in ((1, 1), (3, 1), (1, 9)):
        learned.clear()
        weighted = [f"sources.{name}.weight={weight}" for name, weight in zip(sizes, weights, strict=True)]
        assert train(tmp_path / f"out{weights}", *source, *weighted) == 0
        by_name = {name: [text for text in learned if text.startswith(name)] for name in sizes}
        taken = {name: sum(map(len, some)) for name, some in by_name.items()}
        assert taken["large"] / taken["small"] == pytest.approx(weights[0] / weights[1], rel=0.1)
        whole = {name: len(some) == sizes[name][0] for name, some in by_name.items()}
        assert any(whole.values())
        shares[weights] = learned[:]
        assert f"learned from small: {len(by_name['small']):,} documents, {taken['small']:,} bytes of text" in (
            capsys.readouterr().out
        )
    sampled = [text for text in shares[1, 1] if text.startswith("large")]
    places = [i for i, line in enumerate((tmp_path / "large.jsonl").open()) if json.loads(line)["text"] in set(sampled)]
    assert np.mean(places) == pytest.approx(1000, rel=0.1)  # from all of it, not from its beginning


def test_a_whole_training_on_a_recipe_gives_a_tokenizer(inputs, tmp_path):
    source = [
        *("sources.code.kind=parquet", f"sources.code.path={inputs[0]}", "sources.code.field=content"),
        *("sources.web.kind=jsonl", f"sources.web.path={inputs[1]}"),
    ]
    assert train(tmp_path / "out", *source) == 0
    assert open_tokenizer(tmp_path / "out").vocab_size == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to learn from: give files and folders, or a recipe by --recipe"),
        (["recipe.yaml", "b.jsonl"], "b.jsonl cannot be used with a recipe, whose sources say what to read"),
        (["recipe.yaml", "--field", "x"], "--field cannot be used with a recipe, whose sources say what to read"),
        (["nothing.yaml"], "recipe nothing.yaml: no such file"),
        (["b.jsonl", "--max-bad-fraction", "2"], "--max-bad-fraction is 2; expected 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(inputs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("sources: {web: {kind: jsonl, path: b.jsonl}}\n")
    assert train(tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["parquet", "gz", "zst", "jsonl", "folder"])
def test_progress_ends_at_all_of_the_input_and_is_never_beyond(tmp_path, monkeypatch, kind, learned):
    """Records are larger than what they take in parquet or a compressed file: it said 297%."""
    rows = ["the same words again and again " * 200] * 50
    path = tmp_path / f"a.jsonl.{kind}"
    lines = "".join(json.dumps({"text": text, "other": "x" * 100}) + "\n" for text in rows).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"text": rows}), path := tmp_path / "a.parquet", compression="zstd", row_group_size=10)
    elif kind in ("gz", "zst"):
        with pa.output_stream(str(path), compression={"gz": "gzip", "zst": "zstd"}[kind]) as stream:
            stream.write(lines)
    elif kind == "folder":
        (path := tmp_path / "folder").mkdir()
        for number, text in enumerate(rows[:10]):
            (path / f"{number}.txt").write_text(text)
    else:
        (path := tmp_path / "a.jsonl").write_bytes(lines)
    done = []

    class Counting(Progress):
        def add(self, size, documents=0, tokens=0):
            super().add(size, documents, tokens)
            done.append(self._bytes / self._total)
            assert size >= 0

    monkeypatch.setattr(texts, "Progress", Counting)
    assert train(tmp_path / "out", path) == 0
    assert max(done) == done[-1] == 1.0 and len(learned) == (10 if kind == "folder" else 50)
