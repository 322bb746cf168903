import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipeline.config import SourceConfig
from data_pipeline.document import LONG_LINE
from data_pipeline.read.readers import read
from data_pipeline.read.sources import files
from ponder_scale.errors import ConfigError
from tests.data_pipeline.reading import LIMIT, SUFFIXES, drops, pieces, records, stored, texts


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_jsonl_yields_the_field_of_each_line(tmp_path, suffix):
    rows = ["one", "zwei\nlines", "\u00e9\u2028\U0001f600", " padded "]
    content = "".join(json.dumps({"content": row, "id": 7}) + "\n" for row in rows)
    path = stored(tmp_path / f"a.jsonl{suffix}", content.encode())
    config = SourceConfig(kind="jsonl", path=str(path), field="content")
    assert texts(config) == rows
    assert [record.offset for record in records(config)][:2] == [0, 28]
    assert sum(record.size for record in records(config)) == len(content)


BAD_LINES = [
    (b'{"text": "good"}', None),
    (b'{"text": "cut', "malformed JSON"),
    (b'{"other": "x"}', "field missing"),
    (b'{"text": null}', "field is not a string"),
    (b'{"text": ["x"]}', "field is not a string"),
    (b"[1]", "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "lone surrogate in a string"),
    (b'{"text": "good", "other": "\\ude00 \\ud83d"}', "lone surrogate in a string"),
    (b'{"text": NaN}', "NaN or an infinite number, which JSON has not"),
    (b'{"text": "good", "score": -Infinity}', "NaN or an infinite number, which JSON has not"),
    (b'{"text": "good", "score": 1e999}', "NaN or an infinite number, which JSON has not"),
    (b'{"text": "good", "tree": ' + b"[" * 2000 + b"]" * 2000 + b"}", "JSON nested too deeply"),
    (b"[" * 100_000, "JSON nested too deeply"),
    (b'{"html": "' + b"x" * (6 * LIMIT + 2**21) + b'", "text": "short"}', LONG_LINE),
    (b'{"text": "short", "html": "' + b"x" * (6 * LIMIT + 2**21) + b'"}', LONG_LINE),
    (b'{"html": {"text": "' + b"x" * (6 * LIMIT + 2**21) + b'"}}', LONG_LINE),
    (b'{"text": "' + b"x" * (LIMIT + 1) + b'"}', "longer than max_document_bytes"),
    (b'{"text": "' + b"y" * (6 * LIMIT + 2**21) + b'"}', "longer than max_document_bytes"),
    (b'{"text": " \\n\\t"}', "empty"),
    (b"", "empty"),
    (b'{"text": "last, with no newline"}', None),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_bad_line_is_a_drop_with_its_offset_and_reason(tmp_path, suffix):
    path = stored(tmp_path / f"a.jsonl{suffix}", b"\n".join(line for line, _ in BAD_LINES))
    config = SourceConfig(kind="jsonl", path=str(path))
    assert texts(config) == ["good", "last, with no newline"]
    offsets = [sum(len(line) + 1 for line, _ in BAD_LINES[:i]) for i in range(len(BAD_LINES))]
    expected = [(offset, reason) for offset, (_, reason) in zip(offsets, BAD_LINES, strict=True) if reason is not None]
    assert drops(config) == expected


@pytest.mark.parametrize("size", [1, 7, 50, 1000, 2**18])
def test_records_are_the_same_for_pieces_of_any_size(tmp_path, size):
    lines = stored(tmp_path / "a.jsonl", b"\n".join(line for line, _ in BAD_LINES) + b"\n")
    blocks = stored(tmp_path / "a.txt", b"\n\none\nmore\n \t\n\ntwo\n\n\xff\n\n" + b"z\n" * LIMIT + b"\nthree")
    for config in (
        SourceConfig(kind="jsonl", path=str(lines)),
        SourceConfig(kind="text", path=str(blocks), document="paragraph"),
    ):
        whole = [record for record in records(config) if record.reason != "empty"]
        assert [record for record in records(config, size=size) if record.reason != "empty"] == whole
        parts = pieces(config, size)
        assert [part.begin for part in parts[1:]] == [part.end for part in parts[:-1]]
        assert len(parts) > 1 or size == 2**18


@pytest.mark.parametrize("suffix", SUFFIXES[:3])
def test_one_enormous_line_takes_little_memory(tmp_path, suffix):
    huge = b'{"text": "' + b"a" * 200_000_000 + b'"}\n{"text": "after"}\n'
    path = stored(tmp_path / f"a.jsonl{suffix}", huge)
    del huge
    tracemalloc.start()
    for kind in ("jsonl", "text"):
        config = SourceConfig(kind=kind, path=str(path), document="paragraph")
        for piece in pieces(config, 2**20):
            for record in read(piece, config, 2**20, xxhash.xxh3_128()):
                assert record.reason == "longer than max_document_bytes" or record.text in (
                    "after",
                    '{"text": "after"}\n',
                )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6


def test_the_library_errors_of_gzip_are_those_expected():
    assert issubclass(zlib.error, Exception) and not issubclass(zlib.error, OSError)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"))) == ["one"]
    assert texts(SourceConfig(kind="text", path=str(tmp_path / "a.txt"))) == ["one"]


def test_a_text_file_is_a_document_up_to_the_limit(tmp_path):
    config = SourceConfig(kind="text", path=str(stored(tmp_path / "a.txt.gz", b"x" * LIMIT)))
    assert texts(config) == ["x" * LIMIT]
    stored(tmp_path / "a.txt.gz", b"x" * (LIMIT + 1))
    assert drops(config) == [(0, "longer than max_document_bytes")]


def test_paragraphs_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\nmore\n \t\n\ntwo\n\n\xff\n\nthree")
    config = SourceConfig(kind="text", path=str(path), document="paragraph")
    assert texts(config) == ["one\nmore\n", "two\n", "three"]
    for record in records(config):
        if record.text is not None:
            assert path.read_bytes()[record.offset : record.offset + record.size].decode() == record.text
    assert drops(config) == [(20, "not UTF-8")]


def write_parquet(path, rows, groups: int = 3):
    pq.write_table(pa.table({"body": rows, "id": list(range(len(rows)))}), path, row_group_size=groups)
    return SourceConfig(kind="parquet", path=str(path), field="body")


def test_parquet_yields_the_column_of_each_row_in_any_groups(tmp_path):
    rows = ["one", None, "", "zwei\nlines", "x" * (LIMIT + 1), "\u00e9", "last"]
    config = write_parquet(tmp_path / "a.parquet", rows)
    assert texts(config) == ["one", "zwei\nlines", "\u00e9", "last"]
    assert drops(config) == [(1, "field is not a string"), (2, "empty"), (4, "longer than max_document_bytes")]
    assert len(pieces(config, 1)) == 3
    assert records(config, size=1) == records(config)
    assert sum(piece.size for piece in pieces(config, 1)) == pieces(config)[0].size


def test_parquet_text_that_is_not_utf8_is_a_bad_record(tmp_path):
    broken = pa.array([b"\xff\xfe", b"good"]).view(pa.binary()).cast(pa.binary())
    column = pa.StringArray.from_buffers(2, *broken.buffers()[1:])
    pq.write_table(pa.table({"body": column}), tmp_path / "a.parquet")
    config = SourceConfig(kind="parquet", path=str(tmp_path / "a.parquet"), field="body")
    assert drops(config) == [(0, "not UTF-8")]
    assert texts(config) == ["good"]


def test_the_hash_of_a_parquet_piece_is_of_its_column(tmp_path):
    def digest(name, rows):
        config = write_parquet(tmp_path / name, rows)
        hasher = xxhash.xxh3_128()
        (piece,) = pieces(config)
        list(read(piece, config, LIMIT, hasher))
        return hasher.hexdigest()

    assert digest("a", ["one", "two"]) == digest("b", ["one", "two"]) != digest("c", ["one", "six"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 no parquet", "a.parquet is no parquet file that can be read"),
        ("b.parquet", None, r"sources.it.field is 'text'; the columns of .* are: body, id"),
    ],
)
def test_a_parquet_file_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    if content is None:
        write_parquet(tmp_path / name, ["x"])
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        pieces(SourceConfig(kind="parquet", path=str(tmp_path / name)))


def test_a_row_group_is_read_piece_by_piece(tmp_path):
    """Whole, its column would be in memory: files of one row group of 1 GB are common."""
    generator = random.Random(0)
    for name, count in (("small", 1_000), ("large", 20_000)):
        write_parquet(tmp_path / name, [generator.randbytes(2_500).hex() for _ in range(count)], groups=count)
    program = (
        "import sys, xxhash\n"
        "from data_pipeline.config import SourceConfig\n"
        "from data_pipeline.read.readers import read\n"
        "from data_pipeline.read.sources import files, split\n"
        "for path in sys.argv[1:]:\n"
        "    config = SourceConfig(kind='parquet', path=path, field='body')\n"
        "    (piece,) = split(files({'it': config})[0], config, 2**60)\n"
        "    assert all(record.text for record in read(piece, config, 2**20, xxhash.xxh3_128()))\n"
        "    print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "small"), str(tmp_path / "large")]
    small, large = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert large - small < (tmp_path / "large").stat().st_size / 1024 / 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("dataset")
    rows = ["one", None, "", "zwei", "x" * (LIMIT + 1), *map(str, range(100))]
    table = datasets.Dataset.from_dict({"text": rows})
    table.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(str(folder / "splits"))
    table.to_parquet(str(folder / "files" / "test-00000.parquet"))
    table.to_json(str(folder / "files" / "test-00001.jsonl"))
    return folder


def test_a_data_set_on_disk_is_read_by_rows_in_any_pieces(dataset):
    saved = SourceConfig(kind="dataset", path=str(dataset / "saved"))
    assert texts(saved) == ["one", "zwei", *map(str, range(100))]
    assert drops(saved) == [(1, "field is not a string"), (2, "empty"), (4, "longer than max_document_bytes")]
    assert len(pieces(saved, 10_000)) > 3
    assert records(saved, size=10_000) == records(saved)
    test_split = SourceConfig(kind="dataset", path=str(dataset / "splits"), split="test")
    assert records(test_split) == records(saved)
    assert texts(replace(test_split, split="train")) == ["one"]


def test_a_row_of_a_data_set_that_is_not_utf8_is_a_bad_record(tmp_path):
    datasets = pytest.importorskip("datasets")
    broken = pa.array([b"\xff\xfe", b"good"]).cast(pa.binary())
    column = pa.StringArray.from_buffers(2, *broken.buffers()[1:])
    datasets.Dataset(pa.table({"text": column})).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"text": column}), tmp_path / "hub" / "train-00000-of-00001.parquet")
    saved = SourceConfig(kind="dataset", path=str(tmp_path / "saved"))
    for config in (saved, replace(saved, path=str(tmp_path / "hub"), streaming=True)):
        assert drops(config) == [(0, "not UTF-8")]
        assert texts(config) == ["good"]


def test_the_hash_of_a_data_set_is_of_its_texts(dataset, tmp_path):
    """Also of a stream, of which nothing else says what was read."""
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"text": ["one", None, "zwei"]}), tmp_path / "hub" / "train-00000-of-00001.parquet")
    hub = SourceConfig(kind="dataset", path=str(tmp_path / "hub"))
    saved = replace(hub, path=str(dataset / "saved"))
    rest = "x" * (LIMIT + 1) + "".join(map(str, range(100)))
    for config, read_texts in ((hub, "onezwei"), (replace(hub, streaming=True), "onezwei"), (saved, "onezwei" + rest)):
        (piece,) = pieces(config)
        hasher = xxhash.xxh3_128()
        list(read(piece, config, LIMIT, hasher))
        assert hasher.hexdigest() == xxhash.xxh3_128_hexdigest(read_texts.encode())


def test_the_loader_of_the_hub_reads_and_streams_a_data_set(dataset, tmp_path):
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"text": ["one", "two", "three"]}), tmp_path / "hub" / "train-00000-of-00001.parquet")
    stored_once = SourceConfig(kind="dataset", path=str(tmp_path / "hub"))
    assert texts(stored_once) == ["one", "two", "three"]
    assert texts(replace(stored_once, streaming=True)) == ["one", "two", "three"]


def write_data_set(form: str, folder: Path, rows: list[str]) -> SourceConfig:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": rows})
    if form in ("saved", "split"):
        shutil.rmtree(folder, ignore_errors=True)
        (table if form == "saved" else datasets.DatasetDict({"train": table})).save_to_disk(str(folder))
    else:
        folder.mkdir(exist_ok=True)
        pq.write_table(table.data.table, folder / "train-00000-of-00001.parquet")
    return SourceConfig(kind="dataset", path=str(folder), streaming=form == "stream")


@pytest.mark.parametrize("form", ["saved", "split", "files", "stream"])
def test_a_changed_data_set_of_equal_rows_and_bytes_is_another_input(tmp_path, form):
    config = write_data_set(form, tmp_path / "set", ["one", "two"])
    (before,) = pieces(config)
    assert pieces(config) == [before]
    list(read(before, config, LIMIT, xxhash.xxh3_128()))
    assert write_data_set(form, tmp_path / "set", ["six", "ten"]) == config
    (after,) = pieces(config)
    assert (after.begin, after.end, after.size, after.name) == (before.begin, before.end, before.size, before.name)
    assert after != before
    assert texts(config) == ["six", "ten"]
    with pytest.raises(ConfigError, match=r"sources.it: data set .* was changed while it was read"):
        list(read(before, config, LIMIT, xxhash.xxh3_128()))


def test_a_stored_data_set_that_changes_under_the_hand_is_noticed(tmp_path):
    config = write_data_set("saved", tmp_path / "set", ["one", "two"])
    (piece,) = pieces(config)
    records = read(piece, config, LIMIT, xxhash.xxh3_128())
    next(records)
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    os.utime(arrow, (1, 1))
    with pytest.raises(ConfigError, match="was changed while it was read"):
        list(records)


def test_what_the_library_caches_beside_a_data_set_is_no_change(tmp_path):
    datasets = pytest.importorskip("datasets")
    config = write_data_set("saved", tmp_path / "set", ["one", "two"])
    before = pieces(config)
    datasets.load_from_disk(config.path).map(lambda row: {"text": row["text"] * 2})
    assert len(list((tmp_path / "set").glob("cache-*"))) == 1
    assert pieces(config) == before


def test_a_data_set_that_cannot_be_used_is_one_clear_line(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"sources.it.field is 'body'; the columns of .* are: text"):
        files({"it": SourceConfig(kind="dataset", path=str(dataset / "saved"), field="body")})
    with pytest.raises(ConfigError, match=r"streaming is true, but .*saved is stored already; set it to false"):
        files({"it": SourceConfig(kind="dataset", path=str(dataset / "saved"), streaming=True)})
    with pytest.raises(ConfigError, match=r"sources.it: data set .*nowhere, split train, cannot be loaded") as error:
        files({"it": SourceConfig(kind="dataset", path=str(tmp_path / "nowhere"))})
    assert "\n" not in str(error.value)


def test_a_file_that_vanishes_is_an_error_and_no_drop(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    config = SourceConfig(kind="text", path=str(path))
    (piece,) = pieces(config)
    path.unlink()
    with pytest.raises(ConfigError, match=r"sources.it: .*a.txt cannot be read: No such file"):
        list(read(piece, config, LIMIT, xxhash.xxh3_128()))


def test_a_field_may_stand_in_another(tmp_path):
    rows = [{"data": {"text": "one"}}, {"data.text": "two"}, {"data": "x"}, {"data": {"body": "x"}}, {"a": [1]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"), field="data.text")
    assert texts(config) == ["one", "two"]
    assert [reason for _, reason in drops(config)] == ["field missing"] * 3
    long = b'{"data": {"text": "' + b"x" * (6 * LIMIT + 2**21) + b'"}}'
    (tmp_path / "a.jsonl").write_bytes(long)
    assert drops(config) == [(0, "longer than max_document_bytes")]
    table = pa.table({"data": [{"text": "one", "id": 1}, None, {"text": None, "id": 2}, {"text": "two", "id": 3}]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    nested = replace(config, kind="parquet", path=str(tmp_path / "a.parquet"))
    assert texts(nested) == ["one", "two"]
    assert drops(nested) == [(1, "field is not a string"), (2, "field is not a string")]
    with pytest.raises(ConfigError, match=r"the columns of .* are: data, data.text, data.id"):
        pieces(replace(nested, field="data.body"))


def test_text_that_parquet_holds_as_bytes_is_text(tmp_path):
    for kind in (pa.binary(), pa.large_binary()):
        column = pa.array([b"one", b"\xff", "zw\u00f6lf".encode()], kind)
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        config = SourceConfig(kind="parquet", path=str(tmp_path / "a.parquet"))
        assert texts(config) == ["one", "zw\u00f6lf"]
        assert drops(config) == [(1, "not UTF-8")]


def test_lines_with_nan_and_lone_surrogates_are_read_when_asked(tmp_path):
    lines = [
        b'{"text": "good", "score": NaN}',
        b'{"text": "a\\ud800b\\ude00", "other": -Infinity}',
        b'{"text": "\\ud83d\\ude00 pair, \\ud83d alone"}',
        b'{"text": NaN}',
        b'{"text": "cut',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    config = SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    assert texts(config) == []
    assert texts(replace(config, repair=True)) == ["good", "a\ufffdb\ufffd", "\U0001f600 pair, \ufffd alone"]
    assert [reason for _, reason in drops(replace(config, repair=True))] == ["field is not a string", "malformed JSON"]


NESTED = [{"text": "one", "id": 1}, None, {"text": None, "id": 2}, {"text": "two", "id": 3}]


def test_a_column_whose_own_name_has_a_dot_comes_before_a_field_in_another(tmp_path):
    own = ["own one", "own two", "own three", "own four"]
    for name, table in (
        ("before", pa.table({"data.text": own, "data": NESTED})),
        ("behind", pa.table({"data": NESTED, "data.text": own})),
    ):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3)
        config = SourceConfig(kind="parquet", path=str(tmp_path / f"{name}.parquet"), field="data.text")
        assert texts(config) == own
        datasets = pytest.importorskip("datasets")
        datasets.Dataset(table).save_to_disk(str(tmp_path / name))
        assert texts(replace(config, kind="dataset", path=str(tmp_path / name))) == own


@pytest.mark.parametrize("name", ["a.b", "a", "x.a.b"])
def test_names_with_dots_lead_on_into_other_columns(tmp_path, name):
    inner = [{"c.d": "deep", "c": {"d": "deeper"}}, {"c.d": "last", "c": None}]
    column = [{"a": {"b": value}} for value in inner] if name == "x.a.b" else inner
    table = pa.table({name.split(".a")[0]: column, "text": ["other"] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    pytest.importorskip("datasets").Dataset(table).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    for kind, path in (("parquet", "a.parquet"), ("dataset", "saved"), ("jsonl", "a.jsonl")):
        config = SourceConfig(kind=kind, path=str(tmp_path / path), field=f"{name}.c.d")
        assert texts(config) == ["deep", "last"], kind


@pytest.mark.parametrize("form", ["saved", "hub", "stream", "stream of jsonl"])
def test_a_field_of_a_data_set_may_stand_in_another(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    table = pa.table({"data": NESTED, "text": ["other"] * 4})
    if form == "saved":
        datasets.Dataset(table).save_to_disk(str(tmp_path / "in"))
    else:
        (tmp_path / "in").mkdir()
        if form == "stream of jsonl":  # whose columns nobody knows before it is read
            (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        else:
            pq.write_table(table, tmp_path / "in" / "a.parquet")
    config = SourceConfig(
        kind="dataset", path=str(tmp_path / "in"), field="data.text", streaming=form.startswith("stream")
    )
    assert texts(config) == ["one", "two"]
    assert drops(config) == [(1, "field is not a string"), (2, "field is not a string")]
    with pytest.raises(ConfigError, match=r"sources.it.field is 'data.body'; the columns of .*in are: .*data.text"):
        records(replace(config, field="data.body"))
