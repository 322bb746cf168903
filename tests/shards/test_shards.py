import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ponder_scale.shards.manifest as manifest_module
from ponder_scale.errors import ConfigError, ShardError, TokenizerError
from ponder_scale.files.write import hash_file
from ponder_scale.shards.format import ShardWriter, check_vocabulary, dtype_for, open_shards, same_tokenizer
from ponder_scale.shards.manifest import Manifest, read_manifest, seal, tokenizer_sha256, verify

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [60, 61]]


def write(folder: Path, name: str, documents: list[list[int]], vocab_size: int = 100):
    writer = ShardWriter(folder, name, vocab_size)
    for document in documents:
        writer.add(np.array(document, dtype=np.int64), np.array([len(document)]))
    return writer.close()


def build(folder: Path, vocab_size: int = 100, tokenizer: str = "a" * 64, documents=DOCUMENTS) -> Path:
    """A finished folder: two shards of `documents` for training, one held-out, and one other file."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    splits = {
        "train": [write(folder, f"train-0000{i}", documents, vocab_size) for i in range(2)],
        "heldout": [write(folder, "heldout-00000", documents[:1], vocab_size)],
    }
    files = {"tokenizer/tokenizer.json": hash_file(folder / "tokenizer" / "tokenizer.json")}
    dtype = dtype_for(vocab_size).name
    seal(folder, Manifest(dtype, vocab_size, 0, None, tokenizer, splits, files, {"command": "made by a test"}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build(tmp_path / "shards")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(65499, 8, "H"), (65500, 4, "i"), (70000, 4, "i")])
def test_both_files_are_byte_for_byte_the_indexed_dataset_of_megatron(tmp_path, vocab_size, code, letter):
    info = write(tmp_path, "train-00000", DOCUMENTS, vocab_size)
    flat = [token for document in DOCUMENTS for token in document]
    lengths = [len(document) for document in DOCUMENTS]
    itemsize = struct.calcsize(letter)
    offsets = [sum(lengths[:i]) * itemsize for i in range(len(lengths))]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 4, 5)
    index += struct.pack("<4i", *lengths) + struct.pack("<4q", *offsets) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "train-00000.idx").read_bytes() == index
    assert (tmp_path / "train-00000.bin").read_bytes() == struct.pack(f"<{len(flat)}{letter}", *flat)
    assert (info.documents, info.tokens, info.bytes) == (4, 11, 11 * itemsize)


def test_what_was_written_is_read(folder):
    shards = open_shards(folder)
    first = shards.split("train")[0]
    assert first.tokens.tolist() == [token for document in DOCUMENTS for token in document]
    assert first.lengths.tolist() == [3, 1, 5, 2]
    assert shards.split("heldout")[0].tokens.tolist() == DOCUMENTS[0]
    assert shards.tokenizer_folder == folder / "tokenizer"
    first.will_need(1, 4)


def test_the_tokens_of_a_split_are_those_of_its_shards(folder):
    manifest, length = read_manifest(folder), sum(map(len, DOCUMENTS))
    assert (manifest.tokens("train"), manifest.tokens("heldout")) == (2 * length, len(DOCUMENTS[0]))
    assert manifest.tokens("other") == 0


def test_documents_added_together_and_one_by_one_make_the_same_shard(tmp_path):
    one_by_one = write(tmp_path, "a", DOCUMENTS)
    writer = ShardWriter(tmp_path, "b", 100)
    writer.add(np.concatenate([np.array(document) for document in DOCUMENTS]), np.array([3, 1, 5, 2]))
    together = writer.close()
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert (together.idx_hash, together.bin_hashes) == (one_by_one.idx_hash, one_by_one.bin_hashes)


def test_an_empty_shard_can_be_written_and_read(tmp_path):
    info = ShardWriter(tmp_path, "empty", 100).close()
    seal(tmp_path, Manifest("uint16", 100, 0, None, "a" * 64, {"train": [info]}))
    shard = open_shards(tmp_path).split("train")[0]
    assert len(shard.tokens) == len(shard.lengths) == 0
    assert verify(tmp_path) == []


def test_a_shard_has_its_name_only_when_it_is_closed(tmp_path):
    writer = ShardWriter(tmp_path, "train-00000", 100)
    writer.add(np.array([1, 2]), np.array([2]))
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.bin.tmp"]
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.bin", "train-00000.idx"]


@pytest.mark.parametrize("token", [-1, 100, 70000])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, token):
    writer = ShardWriter(tmp_path, "train-00000", 100)
    with pytest.raises(ShardError, match=rf"token id {token:,}; expected 0 to 99"):
        writer.add(np.array([1, token]), np.array([2]))


@pytest.mark.parametrize("vocab_size", [0, 2**31])
def test_a_vocabulary_that_no_dtype_holds_is_refused(vocab_size):
    with pytest.raises(ShardError, match=f"vocabulary of {vocab_size:,} tokens"):
        dtype_for(vocab_size)


def test_identity_follows_tokens_order_and_tokenizer_and_nothing_else(tmp_path):
    def identity(name, **changes):
        return read_manifest(build(tmp_path / name, **changes)).identity

    base = identity("base")
    again = read_manifest(tmp_path / "base")
    again.provenance["command"] = "another"
    again.files.clear()
    assert again.identity == base == identity("again")
    assert identity("tokenizer", tokenizer="b" * 64) != base
    assert identity("order", documents=DOCUMENTS[::-1]) != base
    assert identity("token", documents=[[1, 2, 4], *DOCUMENTS[1:]]) != base
    assert identity("boundary", documents=[[1, 2], [3, 4], *DOCUMENTS[2:]]) != base
    swapped = read_manifest(tmp_path / "base")
    swapped.splits["train"], swapped.splits["heldout"] = swapped.splits["heldout"], swapped.splits["train"]
    assert swapped.identity != base


def test_the_identity_of_a_tokenizer_is_that_of_its_files(tmp_path):
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text("1")
    other.write_text("2")
    known = tokenizer_sha256([one, other])
    assert tokenizer_sha256([other, one]) == known
    other.write_text("3")
    assert tokenizer_sha256([one, other]) != known


def test_a_whole_folder_verifies_and_progress_is_told_every_byte(folder):
    seen = []
    assert verify(folder, seen.append) == []
    assert sum(seen) == sum(path.stat().st_size for path in folder.glob("*.bin"))


def test_verify_finds_each_flipped_byte_and_names_the_file(folder, tmp_path):
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            name = path.relative_to(folder).as_posix()
            for position in range(path.stat().st_size):
                flip(path, position)
                (finding,) = verify(folder)
                assert finding.startswith(f"{name}: ") and "differs from its hash" in finding
                flip(path, position)
    assert verify(folder) == []


def test_verify_names_the_damaged_block(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 8)
    folder = build(tmp_path / "shards")
    assert [len(info.bin_hashes) for info in read_manifest(folder).splits["train"]] == [3, 3]
    flip(folder / "train-00001.bin", 9)
    assert verify(folder) == ["train-00001.bin: block 1 (bytes 8 to 15) differs from its hash"]


def test_verify_finds_an_edited_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("made by a test", "made by hand"))
    (finding,) = verify(folder)
    assert finding.startswith("manifest.json: edited or damaged")


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.idx", "tokenizer/tokenizer.json"])
def test_verify_finds_missing_and_foreign_files(folder, name):
    (folder / name).unlink()
    (folder / "tokenizer" / "notes.txt").write_text("mine")
    assert verify(folder) == [
        f"{name}: missing",
        "tokenizer/notes.txt: not in the manifest, no part of these shards",
    ]


def test_verify_finds_a_truncation(folder):
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert verify(folder)[0] == "train-00000.bin: truncated: 21 bytes; the manifest says 22"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train-00000.bin").write_bytes(b"\0" * 20), "index says 11 tokens, file holds 10"),
        (lambda f: (f / "train-00000.bin").write_bytes(b"\0" * 23), r"file holds 11 \(23 bytes\)"),
        (lambda f: (f / "train-00000.bin").unlink(), "train-00000.bin: missing in"),
        (lambda f: (f / "train-00000.idx").unlink(), "train-00000.idx: missing in"),
        (lambda f: flip(f / "train-00000.idx", 0), "not an indexed dataset"),
        (lambda f: flip(f / "train-00000.idx", 17), "dtype code 9; the manifest says uint16"),
        (lambda f: (f / "train-00000.idx").write_bytes(b"MMIDIDX"), "7 bytes, less than the header"),
        (
            lambda f: (f / "train-00000.idx").write_bytes((f / "train-00000.idx").read_bytes()[:-1]),
            "121 bytes; its header announces 122",
        ),
        (lambda f: (f / "manifest.json").unlink(), "its build did not finish"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest of token shards"),
        (
            lambda f: (f / "manifest.json").write_text('{"version": 4}'),
            "version 4; this program reads versions 1 to 3",
        ),
        (lambda f: (f / "manifest.json").write_text('{"version": 1}'), "not a manifest of token shards"),
    ],
)
def test_a_damaged_folder_is_refused_on_opening(folder, damage, message):
    damage(folder)
    with pytest.raises(ShardError, match=message) as error:
        open_shards(folder)
    assert "\n" not in str(error.value)


def test_a_shard_of_another_build_is_refused_on_opening(folder, tmp_path):
    write(folder, "train-00000", [[1, 2]])
    with pytest.raises(ShardError, match="1 documents; the manifest says 4"):
        open_shards(folder)
    write(folder, "train-00000", [*DOCUMENTS[:3], [1, 2, 3]])
    with pytest.raises(ShardError, match="manifest says 11 tokens, file holds 12"):
        open_shards(folder)


def test_a_shard_can_be_removed_from_the_manifest(folder):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["splits"]["train"][0]
    path.write_text(json.dumps(content))
    (folder / "train-00000.bin").unlink()
    assert len(open_shards(folder).split("train")) == 1


def test_an_unknown_dtype_split_or_folder_is_named(folder, tmp_path):
    with pytest.raises(ShardError, match="no split 'test'; its splits are: train, heldout"):
        open_shards(folder).split("test")
    with pytest.raises(ShardError, match="no such folder"):
        open_shards(tmp_path / "nowhere")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"uint16"', '"uint8"'))
    with pytest.raises(ShardError, match="dtype is 'uint8'; expected one of: int32, uint16"):
        open_shards(folder)


def test_sources_of_different_tokenizers_are_not_read_together(folder, tmp_path):
    sets = {"web": open_shards(folder), "code": open_shards(build(tmp_path / "code", tokenizer="b" * 64))}
    with pytest.raises(TokenizerError, match=r"sources web .* and code .* have different tokenizers"):
        same_tokenizer(sets)
    same_tokenizer({"web": sets["web"], "again": sets["web"]})


def test_sources_whose_documents_end_differently_are_not_read_together(folder):
    web = open_shards(folder)
    none, other = (replace(web, manifest=replace(web.manifest, eod_id=end)) for end in (None, 7))
    same_tokenizer({"web": web, "none": none})
    with pytest.raises(TokenizerError, match=r"sources web .* and other .* end documents with different tokens, 0 and"):
        same_tokenizer({"none": none, "web": web, "other": other})


def test_a_model_with_too_small_a_vocabulary_is_refused(folder):
    check_vocabulary({"web": open_shards(folder)}, 100)
    with pytest.raises(ConfigError, match=r"model.vocab_size is 99; source web .* needs at least 100"):
        check_vocabulary({"web": open_shards(folder)}, 99)
