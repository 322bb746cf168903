"""The command as a user meets it: what it prints, its exit codes, and what it leaves behind."""

import gzip
import json
import os
import random
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.cli import main
from data_pipeline.config import RECIPES, BuildConfig
from data_pipeline.write.manifest import kept
from ponder_scale.settings import load
from ponder_scale.shards.manifest import read_manifest


@pytest.fixture
def settings(tmp_path, tiny_tokenizer):
    """A good build, setting by setting."""
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i} of a web"}) + "\n" for i in range(50)))
    return {
        "out": tmp_path / "out",
        "tokenizer": tiny_tokenizer,
        "sources.web.kind": "jsonl",
        "sources.web.path": path,
    }


def run(command: str, settings: dict) -> int:
    return main([command, *(f"{key}={value}" for key, value in settings.items())])


def test_build_inspect_and_verify_tell_the_same_story(settings, capsys):
    assert run("build", {**settings, "heldout_fraction": 0.1}) == 0
    built = capsys.readouterr().out
    assert f"built {settings['out']}" in built and "train: " in built
    assert main(["inspect", str(settings["out"]), "--samples", "1"]) == 0
    inspected = capsys.readouterr().out
    assert re.search(
        r"\|== document 0 of \d+: \d+ tokens\n'document number 0 of a web<\|endoftext\|>'\n==\|", inspected
    )
    assert "uint16, end of document 0" in inspected
    assert main(["verify", str(settings["out"])]) == 0
    assert "every byte is as it was built" in capsys.readouterr().out


def test_pack_makes_bins_that_inspect_names_and_verify_reads(settings, capsys):
    assert run("build", settings) == 0
    assert main(["pack", str(settings["out"]), "--seq-len", "64"]) == 0
    # documents of 17 or 18 tokens: three fit into the 65 of a sequence
    assert "packed 50 documents into 17 sequences of 64 tokens, 80.54% full" in capsys.readouterr().out
    assert main(["inspect", str(settings["out"])]) == 0
    assert "packed for  sequences of 64 tokens" in capsys.readouterr().out
    assert main(["verify", str(settings["out"])]) == 0
    pieces = settings["out"] / "packing-64" / "train-00000.pieces"
    pieces.write_bytes(pieces.read_bytes()[:-1] + b"\xff")
    assert main(["verify", str(settings["out"])]) == 2
    assert "packing-64/train-00000.pieces: differs from its hash" in capsys.readouterr().out
    assert main(["pack", str(settings["out"]), "--seq-len", "1"]) == 2


def test_verify_names_each_finding_and_fails(settings, capsys):
    assert run("build", settings) == 0
    (settings["out"] / "train-00000.idx").unlink()
    for name in ("notes", "packing-64", "packing-notes.txt"):
        (settings["out"] / name).write_text("mine")
    assert main(["verify", str(settings["out"])]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-4:] == [
        "train-00000.idx: missing",
        "notes: not in the manifest, no part of these shards",
        "packing-64: not in the manifest, no part of these shards",
        "packing-notes.txt: not in the manifest, no part of these shards",
    ]
    assert "error: " in captured.err and "4 findings" in captured.err


def truncated_jsonl(settings):
    with settings["sources.web.path"].open("a") as stream:
        stream.write('{"text": "cut off\n')


def empty_jsonl(settings):
    settings["sources.web.path"].write_text('{"text": " "}\n\n')


@pytest.mark.parametrize(
    ("changes", "before", "message"),
    [
        ({"heldout_fracton": 0.1}, None, "unknown key heldout_fracton; did you mean heldout_fraction?"),
        ({"sources.web.knd": "jsonl"}, None, "unknown key sources.web.knd; did you mean sources.web.kind?"),
        ({"heldout_fraction": 0.7}, None, "heldout_fraction is 0.7; expected at most 0.5"),
        ({"heldout_fraction": "much"}, None, "heldout_fraction is 'much'; expected a number"),
        ({"sources.web.kind": "xml"}, None, "sources.web.kind is 'xml'; expected one of jsonl"),
        ({"shard_tokens": 0}, None, "shard_tokens is 0; expected at least 1 tokens"),
        ({"tokenizer": "nowhere"}, None, "tokenizer nowhere: no such file or folder"),
        ({"eod_token": "<none>"}, None, "eod_token is '<none>', which is not in its vocabulary"),
        ({"sources.web.path": "nowhere.jsonl"}, None, "sources.web.path is nowhere.jsonl; no such file"),
        ({"sources.web.field": "body"}, None, "50 of 50 records are bad (50 field missing)"),
        ({}, truncated_jsonl, "1 of 51 records are bad (1 malformed JSON), more than max_bad_fraction 0.001"),
        ({}, empty_jsonl, "they hold no document to write; 2 are empty"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(settings, tmp_path, capsys, changes, before, message):
    if before:
        before(settings)
    names = {path.name for path in tmp_path.iterdir()}
    assert run("build", {**settings, **changes}) == 2
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} - {"out.partial"} == names


def test_a_build_without_sources_is_refused(settings, capsys):
    only = {key: settings[key] for key in ("out", "tokenizer")}
    assert run("build", only) == 2
    assert "sources is empty; name an input" in capsys.readouterr().err


def test_an_unknown_recipe_names_those_there_are(capsys):
    assert main(["build", "nothing-such", "out=x"]) == 2
    assert "recipe nothing-such: no such file" in (error := capsys.readouterr().err) and "python-stdlib" in error


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe):
    needed = ["out=x", "tokenizer=x", "sources.stdlib.path=x"]
    assert load(BuildConfig, recipe, needed).sources


def test_the_recipe_of_the_standard_library_builds(tmp_path, tiny_tokenizer, capsys):
    (tmp_path / "lib" / "site-packages").mkdir(parents=True)
    (tmp_path / "lib" / "abc.py").write_text("import this\n")
    (tmp_path / "lib" / "site-packages" / "other.py").write_text("import that\n")
    overrides = [f"sources.stdlib.path={tmp_path / 'lib'}", f"tokenizer={tiny_tokenizer}", f"out={tmp_path / 'out'}"]
    assert main(["build", "python-stdlib", *overrides]) == 0
    assert "1 documents" in capsys.readouterr().out


def test_a_tokenizer_is_trained_on_folders_jsonl_and_text(tmp_path, settings, capsys):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a.py").write_text("def f(): pass\n")
    (tmp_path / "b.txt").write_text("a text")
    inputs = [str(tmp_path / "tree"), str(settings["sources.web.path"]), str(tmp_path / "b.txt")]
    out = tmp_path / "tokenizer"
    assert main(["train-tokenizer", *inputs, "--vocab-size", "290", "--out", str(out)]) == 0
    assert f"trained {out}: 290 tokens" in capsys.readouterr().out
    assert run("build", {**settings, "tokenizer": out}) == 0


def test_a_vocabulary_that_the_texts_do_not_support_is_said(tmp_path, settings, capsys):
    out = tmp_path / "tokenizer"
    path = str(settings["sources.web.path"])
    assert main(["train-tokenizer", path, "--vocab-size", "5000", "--out", str(out)]) == 0
    assert "of 5,000 asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.txt"], "no such file"),
        (["web.jsonl", "--field", "body"], "no text to train on"),
        (["web.jsonl", "--vocab-size", "10"], "--vocab-size is 10; bpe needs more than 257"),
    ],
)
def test_bad_input_to_training_is_one_clear_line(settings, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train-tokenizer", "--vocab-size", "300", "--out", "new", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_that_is_no_finished_build_is_refused(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 2
    assert "it has no manifest.json, so its build did not finish" in capsys.readouterr().err


def test_the_command_runs_as_a_program_and_never_imports_torch():
    listing = "import sys, data_pipeline.cli; print({'torch', 'transformers', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    failed = subprocess.run(
        [sys.executable, "-m", "data_pipeline.cli", "verify", "nowhere"], capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr == "error: nowhere: no such folder; expected a folder of token shards\n"


def test_libraries_are_loaded_when_their_threads_are_limited(settings):
    """Those of numpy alone cost a small build a fifth of its processor time."""
    settings = [f"{key}={value}" for key, value in settings.items()]
    program = (
        "import os, sys\n"
        "from data_pipeline import cli\nfrom data_pipeline.build import parallel\n"
        "assert not {'numpy', 'tokenizers', 'gigatoken'} & set(sys.modules)\n"
        "assert cli.main(['build', *sys.argv[1:]]) == 0\n"
        "assert 'numpy' in sys.modules and os.environ['OPENBLAS_NUM_THREADS'] == '1'\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    command = [sys.executable, "-c", program, *settings, "workers=1"]
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "1"


def test_plan_estimates_what_a_build_then_makes(settings, capsys):
    rows = [json.dumps({"text": f"document number {i} of a web, with some words more"}) for i in range(3000)]
    settings["sources.web.path"].write_text("\n".join([*rows, '{"text": 1}']))
    assert run("plan", settings) == 0
    told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert told["documents"] == "about 3,000; dropped: 0.03% field is not a string"
    assert "1 units" in told["input"] and "by gigatoken" in told["sampled"] and "of one core" in told["time"]
    assert not settings["out"].exists()
    assert run("build", settings) == 0
    tokens = sum(info.tokens for infos in read_manifest(settings["out"]).splits.values() for info in infos)
    assert told["tokens"].startswith(f"about {tokens:,}")
    assert run("plan", {**settings, "sources.web.field": "body"}) == 0
    assert "100.00% field missing" in capsys.readouterr().out


def planned(settings, capsys, *more):
    assert main(["plan", *(f"{key}={value}" for key, value in settings.items()), *more]) == 0
    return capsys.readouterr().out


def test_plan_says_what_each_source_gives_and_how_often_a_run_reads_it(settings, capsys):
    books = settings["sources.web.path"].with_name("books.jsonl")
    for path, count in ((settings["sources.web.path"], 3000), (books, 200)):
        rows = [json.dumps({"text": f"document number {i} of some, with more"}) for i in range(count)]
        path.write_text("\n".join(rows))
    settings = {**settings, "sources.books.kind": "jsonl", "sources.books.path": books, "heldout_fraction": 0.1}
    weights = {"sources.web.weight": 1, "sources.books.weight": 3}
    assert run("build", {**settings, **weights}) == 0
    of_source = kept(read_manifest(settings["out"]))
    web, books = (tokens for _, tokens in (of_source["web"], of_source["books"]))
    said = planned(settings, capsys)
    assert f"source      web: about 3,000 documents, {web:,} tokens, {web / (web + books):.1%} of a run\n" in said
    said = planned({**settings, **weights}, capsys, "--tokens", "1e6")
    epochs = 250_000 / (0.9 * web)
    assert f"web: about 3,000 documents, {web:,} tokens, 25.0% of a run, {epochs:.3g} epochs in 1.000M tokens" in said
    assert f"books: about 200 documents, {books:,} tokens, 75.0% of a run, {750000 / (0.9 * books):.3g} epochs" in said
    said = planned({**settings, **weights}, capsys)
    assert f"75.0% of a run, an epoch in {round(0.9 * books / 0.75):,} tokens of it" in said
    said = planned({**settings, "sources.web.max_documents": 1000, "sources.books.max_tokens": books // 2}, capsys)
    assert f"web: about 1,000 documents, {round(web / 3):,} tokens (its cap)" in said
    assert f"books: about 100 documents, {books // 2:,} tokens (its cap)" in said
    assert f"tokens      about {round(web / 3) + books // 2:,}" in said


def test_plan_of_a_tiny_input_has_units_that_fit(settings, capsys):
    settings["sources.web.path"].write_text('{"text": "one"}\n')
    said = planned(settings, capsys)
    assert "input       16 bytes in 1 units of up to 16 bytes" in said
    assert not re.search(r"(?<![\d.])0(\.0+)?(?![\d.])(?! million)", said), said


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_plan_reads_no_more_of_a_row_group_or_data_set_than_the_sample(settings, capsys, kind):
    generator = random.Random(0)
    rows = pyarrow.table({"text": [generator.randbytes(500).hex() for _ in range(20_000)]})
    path = settings["sources.web.path"].with_name("rows.parquet")
    pyarrow.parquet.write_table(rows, path, row_group_size=20_000)
    if kind == "dataset":
        path = path.with_name("stored")
        pytest.importorskip("datasets").Dataset(rows).save_to_disk(str(path))
    settings = {**settings, "sources.web.kind": kind, "sources.web.path": path}
    assert main(["plan", *(f"{key}={value}" for key, value in settings.items()), "--sample-mb", "1"]) == 0
    told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert told["sampled"].startswith("1.0 MB at ")
    assert told["documents"] in (f"about {n:,}; dropped: nothing" for n in range(19_900, 20_100))


def test_plan_does_not_guess_how_large_a_stream_is(settings, capsys):
    (folder := settings["out"].with_name("hub")).mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / "train-00000-of-00001.parquet")
    stream = {"sources.s.kind": "dataset", "sources.s.path": folder, "sources.s.streaming": "true"}
    assert run("plan", {**settings, **stream}) == 0
    assert " kB; 1 streamed units, of unknown size, not counted" in capsys.readouterr().out
    alone = {key: value for key, value in settings.items() if not key.startswith("sources")}
    assert run("plan", {**alone, **stream}) == 2
    assert "the size of a stream is unknown before it is read" in capsys.readouterr().err


def test_plan_goes_on_by_the_reference_where_the_engine_fails(settings, capsys):
    rows = [*("some words" for _ in range(50)), " " * 1_000_000 + "x"]
    settings["sources.web.path"].write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    assert run("plan", {**settings, "backend": "tiktoken", "max_document_bytes": 2_000_000}) == 0
    captured = capsys.readouterr()
    assert "tiktoken failed (ValueError" in captured.err and "by reference" in captured.out


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_plan_counts_the_stored_bytes_of_compressed_files(settings, capsys, suffix):
    plain = "\n".join(json.dumps({"text": f"document number {i % 7} of a web"}) for i in range(40_000)).encode()
    path = settings["sources.web.path"].with_suffix(f".jsonl{suffix}")
    path.write_bytes(gzip.compress(plain) if suffix == ".gz" else bytes(pyarrow.compress(plain, "zstd", asbytes=True)))
    assert run("plan", {**settings, "sources.web.path": path}) == 0
    told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert told["documents"].startswith("about 40,000;")
