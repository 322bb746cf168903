"""Labels of tokens that do not count: none of them is learned, all others are, however sequences are cut and read."""

from collections import Counter

import numpy as np
import pytest
import torch

from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.heldout import heldout_losses
from ponder_scale.data.loader import Loader, heldout_batches, open_sources
from ponder_scale.errors import ConfigError
from ponder_scale.shards.format import ShardWriter, open_shards
from ponder_scale.shards.manifest import Manifest, seal
from ponder_scale.shards.packing import open_packing, pack
from tests.tiny import make_shards

SEQ_LEN, FILLER = 16, 59_999


def make(folder, seed=0, masked=True, first=1):
    """Shards in which every token is another one; (the folder, which of the training tokens count)."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    counted: dict[int, bool] = {}
    splits = {}
    for split in ("train", "heldout"):
        writer = ShardWriter(folder, f"{split}-00000", 60_000, masked)
        for length in generator.integers(1, 60, 40).tolist():
            counts = generator.random(length) < generator.choice([0.0, 0.3, 1.0])
            tokens = np.arange(first, first + length)
            writer.add(tokens, np.array([length]), counts if masked else None)
            counted |= dict(zip(tokens.tolist(), counts.tolist() if masked else [True] * length, strict=True))
            first += length
        splits[split] = [writer.close()]
    seal(folder, Manifest("uint16", 60_000, FILLER, None, "a" * 64, splits))
    return folder, counted


def config(*folders, **more) -> DataConfig:
    sources = {f"s{number}": SourceConfig(path=str(folder)) for number, folder in enumerate(folders)}
    return DataConfig(sources=sources, seq_len=SEQ_LEN, **more)


def batches(data, count, steps=1):
    loader = Loader(data, open_sources(data), seed=0, global_batch=count, micro_batch=1)
    found = [batch for _ in range(steps) for batch in loader.next_batches()]
    loader.close()
    return torch.cat([batch.tokens for batch in found]), torch.cat([batch.labels for batch in found])


def check(tokens, labels, counted, seen):
    """Each label is the next token if that counts, and the tokens are as they are."""
    for row, of_row in zip(tokens.tolist(), labels.tolist(), strict=True):
        for following, label in zip(row[1:], of_row, strict=True):
            assert label in (following, -100) and (label == -100 or counted[following])
            seen[following] += label != -100


@pytest.mark.parametrize("document_mask", [False, True])
def test_under_concat_every_token_that_counts_is_learned_once_and_no_other(document_mask, tmp_path):
    folder, counted = make(tmp_path / "a")
    (shard,) = open_shards(folder).split("train")
    count = (shard.info.tokens - 1) // SEQ_LEN
    tokens, labels = batches(config(folder, document_mask=document_mask), count)
    seen = Counter()
    check(tokens, labels, counted, seen)
    inside = range(2, count * SEQ_LEN + 2)  # the first token of a shard is no label, nor is what fills no sequence
    assert {token: seen[token] for token in inside} == {token: int(counted[token]) for token in inside}


def test_the_labels_of_a_mask_leave_the_tokens_that_the_model_reads_alone(tmp_path):
    tokens, labels = batches(config(make(tmp_path / "a")[0]), 8)
    assert (labels == -100).any() and (tokens.diff() == 1).all() and int(tokens.min()) >= 1


def test_in_bins_a_token_counts_as_its_mask_says_unless_it_is_the_rest_of_a_cut_document(tmp_path):
    folder, counted = make(tmp_path / "a")
    pack(open_shards(folder), SEQ_LEN)
    plain, all_count = make(tmp_path / "b", masked=False)
    pack(open_shards(plain), SEQ_LEN)
    seen, without = Counter(), Counter()
    for where, known, into in ((folder, counted, seen), (plain, all_count, without)):
        (shard,) = open_shards(where).split("train")
        bins = len(open_packing(open_shards(where), SEQ_LEN).of(shard))
        check(*batches(config(where, packing="best-fit"), bins), known, into)
    assert {token for token, times in seen.items() if times} == {
        token for token, times in without.items() if times and counted[token]
    }
    assert max(seen.values()) == 1 and seen.total() < without.total() / 2 + 100


def test_masked_and_unmasked_sources_are_mixed_and_each_keeps_its_labels(tmp_path):
    folder, counted = make(tmp_path / "a")
    plain, rest = make(tmp_path / "b", masked=False, first=30_000)
    tokens, labels = batches(config(folder, plain), 20, steps=3)
    seen = Counter()
    check(tokens, labels, counted | rest, seen)
    of_plain = tokens[:, 0] >= 30_000
    assert 0 < of_plain.sum() < len(tokens)
    assert torch.equal(labels[of_plain], tokens[of_plain][:, 1:])
    assert (labels[~of_plain] == -100).any() and (labels[~of_plain] != -100).any()


def test_a_row_reads_the_same_labels_whichever_rank_and_micro_batch_it_falls_to(tmp_path):
    data = config(make(tmp_path / "a")[0])
    sources = open_sources(data)
    whole, whole_labels = batches(data, 8)
    for micro_batch in (1, 2):
        for rank in (0, 1):
            loader = Loader(data, sources, seed=0, global_batch=8, micro_batch=micro_batch, rank=rank, world_size=2)
            for number, batch in enumerate(loader.next_batches()):
                begin = (number * 2 + rank) * micro_batch
                assert torch.equal(batch.tokens, whole[begin : begin + micro_batch])
                assert torch.equal(batch.labels, whole_labels[begin : begin + micro_batch])
            loader.close()


def test_a_run_goes_on_with_the_mask_it_began_with_and_no_other(tmp_path):
    folder, _ = make(tmp_path / "a")
    data = config(folder)
    loader = Loader(data, open_sources(data), seed=0, global_batch=4, micro_batch=2)
    loader.next_batches()
    state = loader.state()
    expected = loader.next_batches()
    loader.close()
    again = Loader(data, open_sources(data), seed=0, global_batch=4, micro_batch=2)
    again.restore(state)
    for batch, other in zip(expected, again.next_batches(), strict=True):
        assert torch.equal(batch.labels, other.labels)
    again.close()
    other, _ = make(tmp_path / "b", masked=False)
    changed = config(other)
    loader = Loader(changed, open_sources(changed), seed=0, global_batch=4, micro_batch=2)
    with pytest.raises(ConfigError, match="another order"):
        loader.restore(state)
    loader.close()


def test_held_out_losses_are_over_the_tokens_that_count_and_none_is_no_number(tmp_path):
    folder, counted = make(tmp_path / "a")

    class Output:
        def __init__(self, labels):
            kept = labels[labels != -100].double()
            self.pass_losses = torch.stack([kept.sum() / max(1, len(kept))])

    def predict(_tokens, labels, _positions):
        return Output(labels)

    data = config(folder)
    found = heldout_losses(predict, heldout_batches(data, open_sources(data), sequences=1000, micro_batch=3))
    (shard,) = open_shards(folder).split("heldout")
    inside = shard.tokens[1 : (shard.info.tokens - 1) // SEQ_LEN * SEQ_LEN + 1].tolist()
    kept = [token for token in inside if counted[token]]
    assert found.tokens == len(kept) and found.losses == [pytest.approx(np.mean(kept))]

    nothing = config(make_shards(tmp_path, heldout=(40,), train=(60,), masked=True).folder)  # two sequences, one masked
    batch = heldout_batches(nothing, open_sources(nothing), sequences=1000, micro_batch=2)
    none = [one._replace(labels=torch.full_like(one.labels, -100)) for one in batch]
    assert heldout_losses(predict, none) is None
