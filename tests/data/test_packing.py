"""Best-fit packing: bins hold every token once, cut no document that fits, and nothing leaks between documents."""

import json
import shutil
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.loader import Loader, heldout_batches, open_sources
from ponder_scale.errors import ConfigError, ShardError
from ponder_scale.shards import packing
from ponder_scale.shards.format import ShardWriter, open_shards
from ponder_scale.shards.manifest import Manifest, seal
from ponder_scale.shards.packing import PIECE, best_fit_decreasing, open_packing, pack, verify_packings

SEQ_LEN = 16
FILLER = 59_999


def naive(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as its definition reads: what each bin holds."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [some for some in bins if sum(some) + length <= capacity]
        if not fitting:
            fitting = [[]]
            bins.append(fitting[0])
        max(fitting, key=sum).append(length)
    return [sum(some) for some in bins]


@pytest.mark.parametrize("seed", range(30))
def test_bins_are_those_of_the_definition(seed):
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(1, 60))
    lengths = generator.integers(1, capacity + 1, int(generator.integers(0, 300)))
    bin_of, bins = best_fit_decreasing(lengths, capacity)
    found = [int(lengths[bin_of == number].sum()) for number in range(bins)]
    assert sorted(found) == sorted(naive(lengths.tolist(), capacity))  # bins with equal room are interchangeable


def make(folder, train: list[int], heldout: list[int] = (), first: int = 1):
    """Shards of documents of these lengths, every token of which is another one."""
    splits = {}
    for split, lengths in (("train", train), ("heldout", heldout)):
        writer = ShardWriter(folder, f"{split}-00000", 60_000)
        for length in lengths:
            writer.add(np.arange(first, first + length), np.array([length]))
            first += length
        splits[split] = [writer.close()]
    seal(folder, Manifest("uint16", 60_000, FILLER, None, "a" * 64, splits))
    return open_shards(folder)


def documents(lengths: list[int], first: int = 1) -> list[list[int]]:
    ends = np.cumsum(lengths) + first
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    generator = np.random.default_rng(3)
    special = [0, 1, 2, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, SEQ_LEN + 2, 2 * SEQ_LEN, 2 * SEQ_LEN + 1, 2 * SEQ_LEN + 2]
    return [*special, *generator.integers(1, 40, 300).tolist(), 500, 1, 1, 0]


@pytest.fixture(scope="module", params=[2**20, 7], ids=["at once", "seven at a time"])
def shards(request, lengths, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_DOCUMENTS_AT_ONCE", request.param)
        made = make(tmp_path_factory.mktemp("packed"), lengths, [5, 50, 9, 9, 3, 30])
        pack(made, SEQ_LEN)
    return made


def config(*folders, **more) -> DataConfig:
    sources = {f"s{number}": SourceConfig(path=str(folder)) for number, folder in enumerate(folders)}
    return DataConfig(sources=sources, seq_len=SEQ_LEN, packing="best-fit", **more)


def epoch(data: DataConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and positions of one reading of the training split."""
    sources = open_sources(data)
    (shard,) = sources["s0"].split("train")
    count = len(open_packing(sources["s0"], SEQ_LEN).of(shard))
    loader = Loader(data, sources, seed=0, global_batch=count, micro_batch=count)
    (batch,) = loader.next_batches()
    loader.close()
    return batch


def test_each_token_that_follows_another_in_its_document_is_predicted_once(shards, lengths):
    tokens, labels, _ = epoch(config(shards.folder))
    inside, firsts = Counter(), Counter()
    for document in documents(lengths):
        inside.update(document[1:])
        firsts.update(document[:1])
    counted = Counter(labels[labels != -100].tolist())
    assert {token: counted[token] for token in inside} == dict(inside)
    assert set(counted) - set(inside) <= set(firsts) and max(counted.values()) == 1
    after = {document[0] for document in documents(lengths) if len(document) > 1}
    for row, of_row in zip(tokens.tolist(), labels.tolist(), strict=True):
        for token, following, label in zip(row[:-1], row[1:], of_row, strict=True):
            # what follows in the text, or the beginning of a whole document; never the rest of a cut one, or filler
            counts = following == token + 1 or following in after
            assert label == (following if counts and following != FILLER else -100)


def test_no_document_that_fits_is_cut_and_long_ones_share_a_token_at_each_cut(shards, lengths):
    tokens, _, positions = epoch(config(shards.folder, document_mask=True))
    found = []
    for row, places in zip(tokens.tolist(), [*positions.tolist()], strict=True):
        begins = [*[place for place, position in enumerate(places) if position == 0], SEQ_LEN + 1]
        pieces = [row[begin:end] for begin, end in pairwise(begins)]
        found += [[token for token in piece if token != FILLER] for piece in pieces]
    expected = []
    for document in documents(lengths):
        cuts = range(0, max(1, len(document) - 1), SEQ_LEN)
        expected += [document[cut : cut + SEQ_LEN + 1] for cut in cuts]
    assert sorted(piece for piece in found if piece) == sorted(piece for piece in expected if len(piece) > 1)


def test_positions_restart_with_every_piece_and_in_what_is_filled_up(shards):
    tokens, labels, positions = epoch(config(shards.folder, document_mask=True))
    filled = 0
    for row, places in zip(tokens.tolist(), positions.tolist(), strict=True):
        for place in range(1, SEQ_LEN):
            same = row[place] == row[place - 1] + 1 and row[place] != FILLER
            # neighbours in the shard may be neighbours in a bin: then a new document begins with the next number
            assert places[place] in ({0, places[place - 1] + 1} if same or row[place] == FILLER else {0})
        if FILLER in row[:-1]:
            filled += 1
            begin = row.index(FILLER)
            assert places[begin:] == list(range(SEQ_LEN - begin))
    assert filled and (labels[tokens[:, 1:] == FILLER] == -100).all()


def test_the_held_out_split_is_packed_too_and_the_same_for_any_ranks(shards):
    data = config(shards.folder, document_mask=True)

    def rows(micro_batch, world_size):
        found = []
        for rank in range(world_size):
            for batch in heldout_batches(
                data, open_sources(data), sequences=99, micro_batch=micro_batch, rank=rank, world_size=world_size
            ):
                parts = zip(batch.tokens.tolist(), batch.labels.tolist(), batch.position_ids.tolist(), strict=True)
                found += [part for part in parts if any(label != -100 for label in part[1])]
        return sorted(found)

    assert rows(1, 1) == rows(4, 3) == rows(3, 2)
    counted = [label for _, labels, _ in rows(1, 1) for label in labels if label != -100]
    total = 5 + 50 + 9 + 9 + 3 + 30
    first = int(shards.split("train")[0].info.tokens) + 1
    assert set(range(first, first + total)) - set(counted) <= {
        document[0] for document in documents([5, 50, 9, 9, 3, 30], first)
    }


def test_a_packing_is_needed_named_and_known_by_its_seal(shards, tmp_path, lengths):
    (tmp_path / "x").mkdir()
    other = make(tmp_path / "x", lengths)
    with pytest.raises(ShardError, match=rf"not packed for data.seq_len 16; run: ponder-data pack {other.folder} --se"):
        epoch(config(other.folder))
    shutil.copytree(shards.folder / "packing-16", other.folder / "packing-16")
    with pytest.raises(ShardError, match="was made for other shards than the folder now holds; run: ponder-data pack"):
        open_packing(other, SEQ_LEN)
    pack(other, SEQ_LEN)
    open_packing(other, SEQ_LEN)


def test_the_state_knows_the_packing_and_older_states_mean_concat(shards):
    def loader(**more):
        data = DataConfig(sources={"s0": SourceConfig(path=str(shards.folder))}, seq_len=SEQ_LEN, **more)
        return Loader(data, open_sources(data), seed=0, global_batch=4, micro_batch=4)

    plain, packed = loader(), loader(packing="best-fit")
    with pytest.raises(ConfigError, match=r"data\.packing: the checkpoint has packing concat"):
        packed.restore(plain.state())
    old = {key: value for key, value in plain.state().items() if key != "packing"}
    plain.restore(old)
    with pytest.raises(ConfigError, match=r"data\.packing: the checkpoint has packing concat"):
        packed.restore(old)
    packed.restore(json.loads(json.dumps(packed.state())))
    assert len(json.dumps(packed.state())) < 1024
    plain.close(), packed.close()


def test_every_flip_truncation_missing_and_foreign_file_of_a_packing_is_found(lengths, tmp_path):
    shards = make(tmp_path, lengths[:40], [5])
    pack(shards, SEQ_LEN)
    assert verify_packings(tmp_path) == []
    folder = tmp_path / "packing-16"
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), 1 if path.suffix != ".json" else 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            (finding,) = verify_packings(tmp_path)[:1]
            assert path.name in finding
        for size in {0, len(content) // 2, len(content) - 1} - {len(content)}:
            path.write_bytes(content[:size])
            assert any(path.name in finding for finding in verify_packings(tmp_path))
            with pytest.raises(ShardError):
                open_packing(shards, SEQ_LEN)
        path.unlink()
        with pytest.raises(ShardError):
            open_packing(shards, SEQ_LEN)
        path.write_bytes(content)
    (folder / "more").touch()
    assert verify_packings(tmp_path) == ["packing-16/more: no part of this packing"]


def test_a_killed_packing_leaves_the_earlier_one_or_none(lengths, tmp_path, monkeypatch):
    shards = make(tmp_path, lengths)
    monkeypatch.setattr(packing, "sync_folder", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack(shards, SEQ_LEN)
    with pytest.raises(ShardError, match="not packed"):
        open_packing(shards, SEQ_LEN)
    monkeypatch.undo()
    pack(shards, SEQ_LEN)
    assert verify_packings(tmp_path) == []


def test_packing_takes_twelve_bytes_a_piece_and_fills_nearly_every_bin(tmp_path):
    generator = np.random.default_rng(0)
    writer = ShardWriter(tmp_path, "train-00000", 100)
    lengths = np.minimum(generator.lognormal(5.0, 1.1, 20_000), 5000).astype(np.int64) + 1
    writer.add(np.ones(int(lengths.sum()), dtype=np.int64), lengths)
    seal(tmp_path, Manifest("uint16", 100, 0, None, "a" * 64, {"train": [writer.close()], "heldout": []}))
    content = pack(open_shards(tmp_path), 512)
    info = content["shards"]["train-00000"]
    assert info["tokens"] / (info["bins"] * 513) > 0.998
    assert (tmp_path / "packing-512" / "train-00000.pieces").stat().st_size == info["pieces"] * PIECE.itemsize
    begins = np.cumsum(lengths) - lengths
    cut = sum(
        length <= 513 and not any(j <= begin and begin + length <= j + 513 for j in (begin // 512 * 512,))
        for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True)
    )
    assert info["cut_by_concat"] == cut > 1000
