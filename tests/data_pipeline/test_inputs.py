"""Inputs that are not as they should be: what is read of them, what is said, and how a build goes on."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cli import main
from data_pipeline.tokenize.tokenizer import open_tokenizer
from ponder_scale.shards.manifest import read_manifest, verify
from tests.data_pipeline.builds import arguments, contents, documents, make_texts, write_jsonl


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "web.jsonl", make_texts(300))


def test_a_file_whose_name_is_no_utf8_is_read(tiny_tokenizer, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"a\xff.jsonl", b"b.jsonl"):
        lines = [{"text": f"in {name.hex()}"}, {"text": 3}]
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    same = arguments(folder / "*.jsonl", tiny_tokenizer, out, "heldout_fraction=0", "max_bad_fraction=0.5")
    assert main([*same, "shuffle=true"]) == 0
    assert main([*same, "overwrite=true", "workers=2", "shard_bytes=1"]) == 0
    tokenizer = open_tokenizer(out / "tokenizer")
    read = [tokenizer.decode(document[:-1]) for document in documents(out, "train")]
    assert read == ["in " + b"a\xff.jsonl".hex(), "in " + b"b.jsonl".hex()]
    quarantined = [json.loads(line)["file"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert quarantined == [f"{folder}/a\\xff.jsonl", f"{folder}/b.jsonl"]
    assert "Traceback" not in capsys.readouterr().err


def test_what_is_left_out_is_said_and_stands_in_the_manifest(tiny_tokenizer, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    write_jsonl(tmp_path / "._a.jsonl", make_texts(20))
    out = tmp_path / "out"
    assert main(arguments(tmp_path / "*.jsonl", tiny_tokenizer, out)) == 0
    assert "left out of web: 1 hidden files" in capsys.readouterr().err
    assert read_manifest(out).provenance["left_out"] == {"web": {"hidden files": 1}}
    assert main(["inspect", str(out), "--samples", "0"]) == 0
    assert "left out    of web: 1 hidden files" in capsys.readouterr().out


def test_damaged_files_have_a_bound_of_their_own(tiny_tokenizer, tmp_path, capsys):
    texts = make_texts(200)
    content = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(content + b"\n")
    same = arguments(tmp_path / "a.jsonl.gz", tiny_tokenizer, tmp_path / "out")
    assert main(same) == 2
    assert "more than max_damaged_files 0" in capsys.readouterr().err
    assert main([*same, "max_damaged_files=1", "max_bad_fraction=0"]) == 0
    counts = read_manifest(tmp_path / "out").provenance["sources"]["web"]
    assert counts["documents"] == 200 and counts["drops"] == {"compressed data is damaged or cut off": 1}


@pytest.mark.slow  # as many workers as there are processors
@pytest.mark.parametrize("more", [[], ["deduplicate=exact"], ["shuffle=true"]])
def test_when_the_input_is_mended_the_same_command_goes_on(tiny_tokenizer, tmp_path, capsys, more):
    texts = make_texts(300)
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", texts[100 * i : 100 * i + 100])
    with (tmp_path / "1.jsonl").open("a") as stream:
        stream.write('{"text": 7}\n')
    size = max((tmp_path / f"{i}.jsonl").stat().st_size for i in range(3))
    same = arguments(tmp_path / "*.jsonl", tiny_tokenizer, tmp_path / "out", f"shard_bytes={size // 2}", *more)
    assert main(same) == 2
    assert "correct the input and run the same command again" in capsys.readouterr().err
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.bin")}
    write_jsonl(tmp_path / "1.jsonl", texts[100:200])
    assert main([*same, "seed=1"]) == 2  # other settings are another matter
    capsys.readouterr()
    assert main(same) == 0
    assert read_manifest(tmp_path / "out").provenance["sources"]["web"]["documents"] == 300
    assert verify(tmp_path / "out") == []
    if not more:
        now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
        assert [name for name in done if now.get(name) == done[name]]  # not all is read again
        fresh = arguments(tmp_path / "*.jsonl", tiny_tokenizer, tmp_path / "fresh", f"shard_bytes={size // 2}")
        assert main(fresh) == 0
        one, other = contents(tmp_path / "out"), contents(tmp_path / "fresh")
        assert {name for name in one if one[name] != other.get(name)} == {"manifest.json"}  # the command


def test_of_inputs_that_are_gone_when_a_build_goes_on_no_dropped_text_is_left(tiny_tokenizer, tmp_path, monkeypatch):
    texts = make_texts(200)
    write_jsonl(tmp_path / "0.jsonl", [*texts[:100], "short"])
    write_jsonl(tmp_path / "1.jsonl", [*texts[100:], "tiny"])
    with (tmp_path / "1.jsonl").open("a") as stream:
        stream.write('{"text": 7}\n')
    settings = ["sources.web.filters={length: {min_characters: 10}}", "keep_dropped=true", "shard_bytes=1000"]

    def same(out: str) -> list[str]:
        return arguments(tmp_path / "*.jsonl", tiny_tokenizer, tmp_path / out, *settings)

    assert main(same("out")) == 2
    (tmp_path / "1.jsonl").unlink()
    assert main(same("out")) == 0
    dropped = [json.loads(line)["text"] for line in (tmp_path / "out" / "dropped.jsonl").open()]
    assert dropped == [text for text in [*texts[:100], "short"] if len(text) < 10]
    assert verify(tmp_path / "out") == []

    def stop(*values):
        raise KeyboardInterrupt

    other = [*same("out"), "seed=1", "overwrite=true"]
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build.finish.seal", stop)
        assert main(other) == 130
    assert (tmp_path / "out.partial" / "dropped.jsonl").is_file()
    assert main(other) == 0  # it is the build's own


def test_inputs_that_change_under_a_build_that_did_not_fail_are_not_taken_for_mended(
    corpus, tiny_tokenizer, tmp_path, capsys, monkeypatch
):
    same = arguments(corpus, tiny_tokenizer, tmp_path / "out")

    def stop(*values):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build.finish.write_inputs", stop)
        assert main(same) == 130
    write_jsonl(corpus, make_texts(100))
    assert main(same) == 2
    assert "holds an unfinished build from other inputs; restore these" in capsys.readouterr().err


def test_a_page_of_parquet_that_fails_its_checksum_is_refused(tiny_tokenizer, tmp_path, capsys):
    path = tmp_path / "a.parquet"
    rows = [f"row {i} of some text that is found again" for i in range(2000)]
    table = pa.table({"text": rows})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"row 1000 of some")] ^= 1
    path.write_bytes(content)
    source = ["sources.web.kind=parquet", f"sources.web.path={path}"]
    assert main(["build", f"out={tmp_path / 'out'}", f"tokenizer={tiny_tokenizer}", *source]) == 2
    assert "a.parquet cannot be read" in capsys.readouterr().err
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    assert main(["build", f"out={tmp_path / 'out'}", f"tokenizer={tiny_tokenizer}", *source]) == 0


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["abc", "-1", "0", "1.5", "\u00b2"])
def test_a_number_of_ranks_that_is_none_is_one_clear_line(
    corpus, tiny_tokenizer, tmp_path, capsys, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out")) == 2
    assert f"error: {name} is {value!r} in the environment; expected the number of ranks" in capsys.readouterr().err


def test_what_is_kept_of_each_source_is_said(tiny_tokenizer, tmp_path, capsys):
    for name, count in (("a", 20), ("b", 30)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(count))
    second = ["sources.books.kind=jsonl", f"sources.books.path={tmp_path / 'b.jsonl'}"]
    out = tmp_path / "out"
    assert main(arguments(tmp_path / "a.jsonl", tiny_tokenizer, out, *second)) == 0
    said = capsys.readouterr().out
    infos = [info for infos in read_manifest(out).splits.values() for info in infos]
    for source, count in (("web", 20), ("books", 30)):
        tokens = sum(info.tokens for info in infos if info.source == source)
        assert f"kept of {source}: {count} documents, {tokens:,} tokens\n" in said
    assert main(["inspect", str(out), "--samples", "0"]) == 0
    assert "books: kept 30 documents, " in capsys.readouterr().out


def test_the_help_of_build_lists_its_keys(capsys):
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    said = capsys.readouterr().out
    for key in (
        "out (required): ",
        "heldout_fraction (0.005): ",
        "sources.NAME.kind (required): ",
        "NAME.repair (false)",
    ):
        assert key in said
