import json
import threading
from collections import Counter

import pytest
import torch

from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.loader import Loader, heldout_batches, open_sources
from ponder_scale.data.order import Order
from ponder_scale.errors import ConfigError, ShardError, TokenizerError

SEQ_LEN = 16
SIZES = {"code": (333, 17, 16, 0, 500), "web": (900, 700)}  # two shards of code hold no sequence
WEIGHTS = {"web": 0.7, "code": 0.3}


@pytest.fixture(scope="module")
def data(tiny_shards) -> DataConfig:
    folders = {
        name: tiny_shards(train=SIZES[name], heldout=(100, 70), seed=seed).folder
        for seed, name in enumerate(sorted(SIZES))
    }
    sources = {name: SourceConfig(path=str(folders[name]), weight=WEIGHTS[name]) for name in WEIGHTS}
    return DataConfig(sources=sources, seq_len=SEQ_LEN)


@pytest.fixture
def make(data):
    """A factory of loaders of `data` that are closed after the test."""
    made = []

    def loader(config: DataConfig = data, seed=1, global_batch=16, micro_batch=2, **ranks) -> Loader:
        arguments = {"seed": seed, "global_batch": global_batch, "micro_batch": micro_batch, **ranks}
        made.append(Loader(config, open_sources(config), **arguments))
        return made[-1]

    yield loader
    for some in made:
        some.close()


def tokens(loader: Loader) -> list[torch.Tensor]:
    """Those of the micro-batches of the next step."""
    return [batch.tokens for batch in loader.next_batches()]


def steps(loader: Loader, count: int) -> list[torch.Tensor]:
    return [torch.cat(tokens(loader)) for _ in range(count)]


def oracle(data: DataConfig, split: str = "train") -> dict[str, list[list[int]]]:
    """Every sequence of every source, cut out of the token files by hand."""
    sequences = {}
    for name in sorted(data.sources):
        sequences[name] = []
        for path in sorted(open_sources(data)[name].folder.glob(f"{split}-*.bin")):
            content = path.read_bytes()
            ids = [int.from_bytes(content[i : i + 2], "little") for i in range(0, len(content), 2)]
            begin = 0
            while begin + SEQ_LEN < len(ids):
                sequences[name].append(ids[begin : begin + SEQ_LEN + 1])
                begin += SEQ_LEN
    return sequences


def test_the_tokens_are_those_cut_out_by_hand_in_the_order_of_the_run(data, make):
    sequences = oracle(data)
    assert {name: len(some) for name, some in sequences.items()} == {"code": 20 + 1 + 0 + 0 + 31, "web": 56 + 43}
    order = Order(["code", "web"], [52, 99], [0.3, 0.7], seed=1)
    places = order.locate(0, 20 * 16)
    expected = [
        sequences[["code", "web"][source]][sequence]
        for source, sequence in zip(places.source, places.sequence, strict=True)
    ]
    assert torch.cat(steps(make(), 20)).tolist() == expected


def test_each_token_is_predicted_once_in_an_epoch(tiny_shards, make):
    shards = tiny_shards(train=(1 + 30 * SEQ_LEN,), vocab_size=60_000)
    config = DataConfig(sources={"only": SourceConfig(path=str(shards.folder))}, seq_len=SEQ_LEN)
    rows = torch.cat(steps(make(config, global_batch=30, micro_batch=1), 1))
    assert Counter(rows[:, 1:].flatten().tolist()) == Counter(shards.split("train")[0].tokens[1:].tolist())


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_has_the_same_sequences_in_the_same_order_for_any_ranks(make, world_size, micro_batch):
    expected = steps(make(global_batch=32, micro_batch=32), 5)
    loaders = [
        make(global_batch=32, micro_batch=micro_batch, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for whole in expected:
        of_ranks = [tokens(loader) for loader in loaders]
        for batches in of_ranks:
            assert len(batches) == 32 // (micro_batch * world_size)
            assert all(batch.shape == (micro_batch, SEQ_LEN + 1) for batch in batches)
            assert all(batch.dtype == torch.int64 and batch.is_contiguous() for batch in batches)
        dealt = [batch for micro in zip(*of_ranks, strict=True) for batch in micro]
        assert torch.equal(torch.cat(dealt), whole)


@pytest.mark.parametrize("done", [0, 1, 7, 30])
def test_a_restored_loader_goes_on_as_if_never_stopped(make, done):
    uninterrupted = steps(make(), done + 5)
    first = make()
    steps(first, done)
    state = json.loads(json.dumps(first.state()))
    assert len(json.dumps(state)) < 1024
    second = make(micro_batch=4, world_size=2)
    steps(second, 3)
    second.restore(state)
    other_rank = make(micro_batch=4, world_size=2, rank=1)
    other_rank.restore(state)
    for whole in uninterrupted[done:]:
        dealt = [batch for pair in zip(tokens(second), tokens(other_rank), strict=True) for batch in pair]
        assert torch.equal(torch.cat(dealt), whole)


def test_the_state_counts_what_was_taken_and_not_what_was_read_ahead(make):
    loader = make()
    assert loader.state()["consumed"] == 0
    steps(loader, 3)
    assert loader.state()["consumed"] == 3 * 16


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 1), (4, 1)])
def test_steps_of_any_size_take_the_same_sequences_in_the_same_order(make, world_size, micro_batch):
    expected = torch.cat(steps(make(), 4))
    sizes = [4, 4, 8, 12, 16, 20]
    ahead = [4, 8, 12, 4, 20, None]  # one of them is not what comes then
    for rank in range(world_size):
        loader = make(micro_batch=micro_batch, rank=rank, world_size=world_size)
        begin = 0
        for number, size in enumerate(sizes):
            found = [batch.tokens for batch in loader.next_batches(size, ahead[number])]
            wanted = expected[begin : begin + size].reshape(-1, world_size, micro_batch, SEQ_LEN + 1)[:, rank]
            assert torch.equal(torch.stack(found), wanted)
            begin += size
            assert loader.consumed == begin
    with pytest.raises(ConfigError, match=r"global_batch is 6; .*micro_batch \(4\)"):
        make(micro_batch=4).next_batches(6)


def test_the_global_batch_may_change_on_resume(make):
    whole = torch.cat(steps(make(global_batch=16), 6))
    loader = make(global_batch=16)
    steps(loader, 2)
    larger = make(global_batch=32)
    larger.restore(loader.state())
    assert torch.equal(torch.cat(steps(larger, 2)), whole[32:96])


def test_a_state_of_another_order_is_refused(make, data, tiny_shards):
    def other(**changes) -> DataConfig:
        values = {"sources": data.sources, "seq_len": data.seq_len, **changes}
        return DataConfig(**values)

    state = make().state()
    lighter = {**data.sources, "web": SourceConfig(path=data.sources["web"].path, weight=0.6)}
    replaced = {**data.sources, "web": SourceConfig(path=str(tiny_shards(seed=9).folder), weight=0.7)}
    for loader, message in [
        (make(seed=2), "seed: the checkpoint has seed 1, but this run has 2"),
        (make(other(seq_len=8)), "data.seq_len: the checkpoint has seq_len 16, but this run has 8"),
        (make(other(sources=lighter)), "data.sources: this run has other weights than the checkpoint"),
        (make(other(sources=replaced)), "data.sources: this run has other shards than the checkpoint"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loader.restore(state)


def test_a_moved_folder_of_shards_is_the_same_data(make, data, tiny_shards):
    again = {
        name: SourceConfig(path=str(tiny_shards(train=SIZES[name], heldout=(100, 70), seed=seed).folder), weight=w)
        for seed, (name, w) in enumerate(sorted(WEIGHTS.items()))
    }
    make(DataConfig(sources=again, seq_len=SEQ_LEN)).restore(make().state())


@pytest.mark.parametrize(("global_batch", "micro_batch", "world_size"), [(16, 3, 1), (16, 4, 3), (2, 1, 4)])
def test_a_batch_that_cannot_be_dealt_out_is_refused(make, global_batch, micro_batch, world_size):
    with pytest.raises(ConfigError, match=rf"global_batch is {global_batch}; .*micro_batch \({micro_batch}\)"):
        make(global_batch=global_batch, micro_batch=micro_batch, world_size=world_size)


def test_a_source_without_a_whole_sequence_is_refused(make, data):
    with pytest.raises(ConfigError, match=r"data.sources.code.path .* 1,001 tokens of one sequence"):
        make(DataConfig(sources=data.sources, seq_len=1000))


def test_sources_that_cannot_be_read_together_are_refused(tiny_shards, tmp_path):
    folders = [tiny_shards(tokenizer=letter * 64).folder for letter in "ab"]
    sources = {str(folder.name): SourceConfig(path=str(folder)) for folder in folders}
    with pytest.raises(TokenizerError, match="different tokenizers"):
        open_sources(DataConfig(sources=sources))
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        open_sources(DataConfig(sources={"empty": SourceConfig(path=str(tmp_path))}))


def test_close_ends_the_thread(make):
    loader = make()
    loader.next_batches()
    loader.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_a_reading_error_reaches_the_caller(make, monkeypatch):
    loader = make()
    monkeypatch.setattr(Loader, "_read_step", lambda self, first, sequences: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loader.next_batches()
    assert loader.state()["consumed"] == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("sequences", [1, 7, 10_000])
def test_held_out_batches_are_the_same_sequences_for_any_ranks(data, world_size, micro_batch, sequences):
    def real_rows(micro_batch, world_size):
        rows, counts = [], set()
        for rank in range(world_size):
            batches = list(
                heldout_batches(
                    data,
                    open_sources(data),
                    sequences=sequences,
                    micro_batch=micro_batch,
                    rank=rank,
                    world_size=world_size,
                )
            )
            counts.add(len(batches))
            assert all(batch.tokens.shape == (micro_batch, SEQ_LEN + 1) for batch in batches)
            for batch in batches:
                real = (batch.labels != -100).all(1)
                assert torch.equal(real, (batch.labels != -100).any(1))
                assert torch.equal(batch.labels[real], batch.tokens[real][:, 1:])
                rows += batch.tokens[real].tolist()
        assert len(counts) == 1  # as many batches for each rank
        return sorted(rows)

    everything = sorted(row for rows in oracle(data, "heldout").values() for row in rows)
    rows = real_rows(micro_batch, world_size)
    assert rows == real_rows(1, 1)
    assert len(rows) == min(sequences, len(everything))
    if sequences == 10_000:
        assert rows == everything


def test_without_held_out_shards_there_are_no_held_out_batches(tiny_shards):
    config = DataConfig(sources={"only": SourceConfig(path=str(tiny_shards(heldout=()).folder))}, seq_len=SEQ_LEN)
    assert list(heldout_batches(config, open_sources(config), sequences=5, micro_batch=1)) == []
