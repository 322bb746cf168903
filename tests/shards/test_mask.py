"""Which tokens count in the loss, on disk: bit by bit, sealed, and never lost without a word."""

import json

import numpy as np
import pytest

from ponder_scale.errors import ShardError
from ponder_scale.shards.format import ShardWriter, open_shards
from ponder_scale.shards.manifest import MANIFEST, Manifest, read_manifest, seal, verify
from ponder_scale.shards.packing import open_packing, pack
from tests.tiny import make_shards


def write(folder, parts, name="train-00000"):
    """A folder with one masked shard, written in parts, each a document that counts where it says so."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, name, 100, masked=True)
    for part in parts:
        writer.add(np.arange(len(part)), np.array([len(part)]), np.array(part, dtype=bool))
    seal(folder, Manifest("uint16", 100, 0, None, "a" * 64, {"train": [writer.close()], "heldout": []}))
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_any_stretch_of_the_mask_is_what_was_written_however_it_was_cut(seed, tmp_path):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 20, int(generator.integers(1, 12))).tolist()
    parts = [generator.random(size) < 0.5 for size in sizes]
    whole = np.concatenate(parts)
    (shard,) = open_shards(write(tmp_path / "shards", parts)).split("train")
    assert (tmp_path / "shards" / "train-00000.mask").stat().st_size == (len(whole) + 7) // 8
    assert shard.info.tokens_that_count == whole.sum()
    for _ in range(20):
        first, end = sorted(generator.integers(0, len(whole) + 1, 2).tolist())
        assert shard.mask.read(first, end - first).tolist() == whole[first:end].tolist()
        shard.will_need(first, end - first)


def test_the_bits_of_the_file_are_the_tokens_in_order_the_lowest_of_a_byte_first(tmp_path):
    folder = write(tmp_path / "shards", [[1, 0, 0, 0], [1, 1, 0, 0, 1, 1]])
    assert (folder / "train-00000.mask").read_bytes() == bytes([0b00110001, 0b00000011])


def test_shards_without_a_mask_and_their_manifest_are_what_they_were_before_there_were_masks(tmp_path):
    folder = make_shards(tmp_path).folder
    content = json.loads((folder / MANIFEST).read_bytes())
    assert content["version"] == 2
    known = {"name", "documents", "tokens", "bytes", "bin_hashes", "idx_hash", "source"}
    assert all(info.keys() == known for infos in content["splits"].values() for info in infos)
    assert not list(folder.glob("*.mask"))
    info = read_manifest(folder).splits["train"][0]
    assert info.files == ["train-00000.bin", "train-00000.idx"] and info.tokens_that_count == info.tokens


def test_a_program_that_knows_no_masks_refuses_the_folder_by_its_version(tmp_path):
    folder = make_shards(tmp_path, masked=True).folder
    assert json.loads((folder / MANIFEST).read_bytes())["version"] == 3
    info = read_manifest(folder).splits["train"][0]
    assert info.files == ["train-00000.bin", "train-00000.idx", "train-00000.mask"]
    assert 0 < info.tokens_that_count < info.tokens / 2


def test_another_mask_is_other_shards_and_takes_another_packing(tmp_path):
    one, other = (write(tmp_path / name, [[1, 0, 1, 1, bit]] * 9) for name, bit in (("one", 0), ("other", 1)))
    plain = make_shards(tmp_path, train=(45,), heldout=())
    identities = {read_manifest(folder).identity for folder in (one, other, plain.folder)}
    assert len(identities) == 3
    pack(open_shards(one), 8)
    (one / "packing-8").rename(other / "packing-8")
    with pytest.raises(ShardError, match="made for other shards"):
        open_packing(open_shards(other), 8)


@pytest.mark.parametrize(
    ("damage", "opens", "found"),
    [
        (lambda path: path.unlink(), "train-00000.mask: missing", "train-00000.mask: missing"),
        (lambda path: path.write_bytes(b"\1"), "1 bytes; 45 tokens have 6", "differs from its hash"),
        (lambda path: path.write_bytes(b"\1" * 6), None, "train-00000.mask: differs from its hash"),
    ],
)
def test_a_damaged_mask_is_found(damage, opens, found, tmp_path):
    folder = write(tmp_path / "shards", [[1, 0, 1, 1, 0]] * 9)
    assert verify(folder) == []
    damage(folder / "train-00000.mask")
    assert len(verify(folder)) == 1 and found in verify(folder)[0]
    if opens is not None:
        with pytest.raises(ShardError, match=opens):
            open_shards(folder)
        (late,) = open_shards(folder, check=False).split("train")
        with pytest.raises(ShardError, match=opens):
            late.mask.read(0, 4)


def test_a_mask_that_the_manifest_does_not_name_is_no_part_of_the_shards(tmp_path):
    folder = make_shards(tmp_path).folder
    (folder / "train-00000.mask").write_bytes(b"\1")
    assert verify(folder) == ["train-00000.mask: not in the manifest, no part of these shards"]
