"""Compressed inputs, whole, damaged, and followed by something else."""

import bz2
import contextlib
import json
import lzma
import random
import zlib

import pytest
import zstandard

from data_pipeline.config import SourceConfig
from tests.data_pipeline.reading import SUFFIXES, drops, records, stored, texts

DAMAGED = "compressed data is damaged or cut off"
LINES = [b'{"text": "%d %s"}' % (i, bytes(random.Random(i).choices(b"abcdefgh", k=30))) for i in range(8_000)]


def whole_texts(count: int) -> list[str]:
    return [json.loads(line)["text"] for line in LINES[:count]]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_all_records_before_the_damage_are_kept_and_the_damage_is_counted(tmp_path, suffix, damage):
    path = stored(tmp_path / f"a.jsonl{suffix}", b"\n".join(LINES) + b"\n")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) * 3 // 4 :]
    else:
        content[len(content) * 3 // 4] ^= 0xFF
    path.write_bytes(content)
    config = SourceConfig(kind="jsonl", path=str(path))
    found = records(config)
    assert (found[-1].text, found[-1].reason) == (None, DAMAGED)
    good = [record.text for record in found if record.text is not None]
    if damage == "cut":
        patient = patiently(bytes(content), suffix)
        assert good == whole_texts(patient.count(b"\n"))
    assert len(good) >= 4_000 and good[:4_000] == whole_texts(4_000)  # of the first of two members
    assert drops(SourceConfig(kind="text", path=str(path), document="paragraph"))[-1][1] == DAMAGED


def patiently(content: bytes, suffix: str) -> bytes:
    """What a decompressor gives that gets one byte at a time."""
    make = {
        ".gz": lambda: zlib.decompressobj(31),
        ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lzma.LZMADecompressor,
    }[suffix]
    current, found = make(), []
    with contextlib.suppress(zlib.error, zstandard.ZstdError, OSError, lzma.LZMAError):
        for position in range(len(content)):
            found.append(current.decompress(content[position : position + 1]))
            if current.eof:
                current = make()
    return b"".join(found)


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_compressed_file_that_is_cut_anywhere_is_damaged(tmp_path, suffix):
    path = stored(tmp_path / f"a.jsonl{suffix}", b"")
    half = len(path.read_bytes()) // 2
    content = stored(path, b'{"text": "one"}\n{"text": "two"}\n').read_bytes()
    whole = 0
    for end in range(len(content)):
        path.write_bytes(content[:end])
        for kind in ("jsonl", "text"):
            reasons = [record.reason for record in records(SourceConfig(kind=kind, path=str(path)))]
            if end > half and DAMAGED not in reasons and kind == "jsonl":  # between two members a file may end
                whole += 1
                continue
            assert whole or reasons[-1] == DAMAGED, (end, reasons)
    assert whole <= 1


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("garbage", [b"\n", b"x" * 300_000])
def test_what_follows_compressed_data_loses_nothing_of_it_and_is_counted(tmp_path, suffix, garbage):
    for content, kind, expected in (
        (b"\n".join(LINES), "jsonl", whole_texts(len(LINES))),
        (b"a whole file", "text", ["a whole file"]),
    ):
        path = stored(tmp_path / f"a.txt{suffix}", content)
        path.write_bytes(path.read_bytes() + garbage)
        config = SourceConfig(kind=kind, path=str(path))
        assert texts(config) == expected
        assert [reason for _, reason in drops(config)] == [DAMAGED]


def test_zeros_may_follow_gzip(tmp_path):
    path = stored(tmp_path / "a.txt.gz", b"a whole file")
    path.write_bytes(path.read_bytes() + b"\0" * 200_000)
    assert [record.text for record in records(SourceConfig(kind="text", path=str(path)))] == ["a whole file"]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_compressed_file_of_no_bytes_or_of_something_else_is_damaged(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for content in (b"", b'{"text": "not compressed"}\n', b"\0\0\0"):
        path.write_bytes(content)
        for kind in ("jsonl", "text"):
            assert drops(SourceConfig(kind=kind, path=str(path))) == [(0, DAMAGED)]
    stored(path, b"")
    assert [record.reason for record in records(SourceConfig(kind="jsonl", path=str(path)))] == []


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_compressed_data_under_a_plain_name_is_called_so(tmp_path, suffix):
    stored(tmp_path / f"a{suffix}", b"\n".join(LINES)).rename(tmp_path / "a.jsonl")
    for kind in ("jsonl", "text"):
        reason = drops(SourceConfig(kind=kind, path=str(tmp_path / "a.jsonl")), limit=2**24)[0][1]
        assert reason == "compressed or packed under a name that does not say so"
