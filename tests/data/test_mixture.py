import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ponder_scale.config import DataConfig, PhaseConfig, RunConfig, SourceConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.data.mixture import mixture, not_skipped, run_order
from ponder_scale.data.order import Mixture, Order, Phase
from ponder_scale.data.sequences import IGNORE_INDEX
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.shards.format import ShardWriter, open_shards
from ponder_scale.shards.manifest import Manifest, seal
from ponder_scale.shards.packing import pack

SEQ_LEN = 16


@pytest.fixture(scope="module")
def folders(tiny_shards):
    sizes = {"code": (900, 33), "math": (700,), "web": (3000, 500)}
    made = {name: tiny_shards(train=sizes[name], seed=seed) for seed, name in enumerate(sizes)}
    for shards in made.values():
        pack(shards, SEQ_LEN)
    return {name: str(shards.folder) for name, shards in made.items()}


@pytest.fixture
def make(folders):
    made = []

    def loader(seed=1, global_batch=8, micro_batch=1, rank=0, world_size=1, limits=None, **settings) -> Loader:
        limits = limits or {}
        sources = {
            name: SourceConfig(path=path, weight=weight, max_epochs=limits.get(name))
            for (name, path), weight in zip(folders.items(), (0.3, 0.2, 0.5), strict=True)
        }
        data = DataConfig(sources=sources, seq_len=SEQ_LEN, **settings)
        made.append(
            Loader(
                data,
                open_sources(data),
                seed=seed,
                global_batch=global_batch,
                micro_batch=micro_batch,
                rank=rank,
                world_size=world_size,
            )
        )
        return made[-1]

    yield loader
    for some in made:
        some.close()


def steps(loader: Loader, count: int) -> torch.Tensor:
    return torch.cat([batch.tokens for _ in range(count) for batch in loader.next_batches()])


def joined(batches) -> list[torch.Tensor]:
    """Tokens, labels and, where there are, positions of some micro-batches."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True) if parts[0] is not None]


PHASES = [
    PhaseConfig(tokens=30 * SEQ_LEN),
    PhaseConfig(tokens=41 * SEQ_LEN, weights={"code": 1, "web": 1}),
    PhaseConfig(weights={"math": 0.9, "web": 0.1}),
]
SETTINGS = {
    "plain": {},
    "phases": {"phases": PHASES},
    "capped": {"limits": {"math": 0.5, "code": 1.0}},
    "skipping": {"skip": [[5, 9], [40, 90]]},
    "all": {"phases": PHASES, "limits": {"web": 0.2}, "skip": [[20, 33]], "document_mask": True},
    "packed": {"packing": "best-fit"},
    "all, packed": {"phases": PHASES, "skip": [[20, 33]], "document_mask": True, "packing": "best-fit"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("world_size", [1, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4, 6, 7, 8))])
def test_the_sequences_are_the_same_for_any_ranks_and_after_any_resume(make, name, world_size):
    settings, batch = SETTINGS[name], 840  # a multiple of every world size
    whole = joined(make(global_batch=3 * batch, micro_batch=3 * batch, **settings).next_batches())
    ranks = [make(global_batch=batch, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    for loader in ranks:
        steps(loader, 2)
    resumed = [make(global_batch=batch, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    state = json.loads(json.dumps(ranks[0].state()))
    for loader in resumed:
        loader.restore(state)
    after = [loader.next_batches() for loader in resumed]
    dealt = joined([batch for micro in zip(*after, strict=True) for batch in micro])
    assert len(dealt) == len(whole) == 2 + ("document_mask" in settings)
    for part, of_whole in zip(dealt, whole, strict=True):
        assert torch.equal(part, of_whole[2 * batch :])
    assert len(json.dumps(state)) < 1024


def shares(order: Order, first: int, count: int) -> list[int]:
    return np.bincount(order.locate(first, count).source, minlength=3).tolist()


def test_phases_follow_each_other_with_their_own_shares():
    phases = [Phase(1000, [1, 1, 2]), Phase(500, [0, 1, 4]), Phase(None, [1, 0, 0])]
    order = Order(["a", "b", "c"], [100, 5000, 5000], [1, 1, 1], 0, None, phases)
    assert np.allclose(shares(order, 0, 1000), [250, 250, 500], atol=1)
    assert np.allclose(shares(order, 1000, 500), [0, 100, 400], atol=1)
    assert shares(order, 1500, 77) == [77, 0, 0]


def test_a_phase_ends_with_the_sequence_in_which_its_tokens_end(make):
    phases = [PhaseConfig(tokens=3 * SEQ_LEN + 1, weights={"code": 1}), PhaseConfig(weights={"math": 1})]
    apart = [make(phases=[PhaseConfig(weights={name: 1})]) for name in ("code", "math")]
    of_code, of_math = ({tuple(row) for row in steps(one, 4).tolist()} for one in apart)
    served = [tuple(row) for row in steps(make(phases=phases), 1).tolist()]
    assert [(row in of_code, row in of_math) for row in served] == [(True, False)] * 4 + [(False, True)] * 4


def test_a_source_goes_on_in_a_new_phase_where_it_was():
    phases = [Phase(137, [1, 1]), Phase(211, [3, 1]), Phase(None, [1, 5])]
    order = Order(["a", "b"], [90, 120], [1, 1], 0, None, phases)
    places = order.locate(0, 1000)
    for source, count in enumerate((90, 120)):
        mine = places.source == source
        assert np.array_equal(places.epoch[mine], np.arange(mine.sum()) // count)
        for begin in range(0, mine.sum() - count, count):
            assert len(set(places.sequence[mine][begin : begin + count].tolist())) == count
    pieces = [order.locate(begin, 7) for begin in range(0, 994, 7)]
    assert np.array_equal(np.concatenate([piece.sequence for piece in pieces]), places.sequence[:994])


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.9, 0.09, 0.01], [5, 1, 1]])
def test_no_source_is_read_more_often_than_its_cap_and_the_others_fill_its_share(weights):
    counts, limits = [50, 60, 70], [50, 90, 700]
    order = Order(["a", "b", "c"], counts, weights, 0, limits)
    assert order.end == sum(limits)
    places = order.locate(0, order.end)
    assert np.bincount(places.source).tolist() == limits
    assert [int(places.epoch[places.source == i].max()) for i in range(3)] == [0, 1, 9]
    plain = Order(["a", "b", "c"], counts, weights, 0).locate(0, order.end)
    same = int(np.argmin(places.source == plain.source))
    assert max(np.bincount(plain.source[: same + 1], minlength=3) / limits) > 1  # they part when a cap is reached


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.5, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]])
def test_how_much_each_source_has_served_is_what_counting_gives(weights):
    mixture = Mixture(weights)
    source, _ = mixture.mix(0, 500)
    for count in range(500):
        assert (
            mixture.served(count, len(weights)).tolist() == np.bincount(source[:count], minlength=len(weights)).tolist()
        )
    assert mixture.served(10**12 + 7, len(weights)).sum() == 10**12 + 7


@pytest.mark.parametrize(("max_epochs", "end"), [(1.5, 7), (1.0, 5), (0.39, 1), (0.01, 1)])
def test_a_cap_within_an_epoch_is_rounded_down_to_at_least_one_sequence(folders, max_epochs, end):
    source = SourceConfig(path=folders["math"], max_epochs=max_epochs)
    data = DataConfig(sources={"math": source}, seq_len=SEQ_LEN)
    assert run_order(data, mixture(data, open_sources(data)), [5], seed=0).end == end


def test_data_that_ends_is_said_and_not_repeated(make):
    loader = make(limits={"code": 1, "math": 1, "web": 1}, global_batch=8)
    with pytest.raises(ConfigError, match=r"data: max_epochs and phases allow 319 sequences"):
        steps(loader, 40)


def test_a_skipped_range_leaves_the_rest_as_it_was(make):
    whole = steps(make(), 20)
    skipping = make(skip=[[16, 24], [30, 31]])
    assert torch.equal(steps(skipping, 12), torch.cat([whole[:16], whole[24:30], whole[31:105]]))
    assert skipping.state()["consumed"] == 12 * 8 + 9
    # A range that lies ahead can be added on resume.
    first = make()
    steps(first, 3)
    second = make(skip=[[32, 40]])
    second.restore(first.state())
    assert torch.equal(steps(second, 2), torch.cat([whole[24:32], whole[40:48]]))


def test_windows_avoid_what_is_skipped():
    assert not_skipped(0, 5, []) == ([(0, 5)], 5)
    assert not_skipped(3, 5, [(2, 4), (5, 7), (6, 8)]) == ([(4, 1), (8, 4)], 12)
    assert not_skipped(5, 2, [(7, 9)]) == ([(5, 2)], 7)


def document_shards(folder, lengths: list[int]):
    writer = ShardWriter(folder, "train-00000", 10_000)
    for number, length in enumerate(lengths):
        document = np.full(length, number + 1)
        writer.add(document, np.array([length]))
    seal(folder, Manifest("uint16", 10_000, 0, None, "a" * 64, {"train": [writer.close()], "heldout": []}))
    return open_shards(folder)


def test_positions_restart_at_the_boundaries_of_the_index_and_not_at_end_tokens(tmp_path):
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(0, 30, 200).tolist(), 100, 1, 1, 1]
    document_shards(tmp_path, lengths)
    data = DataConfig(sources={"x": SourceConfig(path=str(tmp_path))}, seq_len=SEQ_LEN, document_mask=True)
    loader = Loader(data, open_sources(data), seed=0, global_batch=20, micro_batch=4)
    for batch in loader.next_batches():
        assert batch.position_ids.shape == (4, SEQ_LEN) and batch.position_ids.dtype == torch.int64
        for tokens, positions in zip(batch.tokens.tolist(), batch.position_ids.tolist(), strict=True):
            expected, place = [], 0
            for i in range(SEQ_LEN):
                place = 0 if i and tokens[i] != tokens[i - 1] else place + (i > 0)
                expected.append(place)
            assert positions == expected
    loader.close()


def test_without_a_document_mask_there_are_no_positions(make):
    assert all(batch.position_ids is None for batch in make().next_batches())


def test_the_time_spent_waiting_for_data_is_counted(make):
    loader = make()
    assert loader.wait_seconds == 0
    loader.next_batches()
    first = loader.wait_seconds
    assert 0 < first < 5
    loader.next_batches()
    assert loader.wait_seconds >= first


def test_the_weights_of_a_build_mix_its_sources(tmp_path):
    infos = []
    for number, source in enumerate(("books", "web")):
        writer = ShardWriter(tmp_path, f"train-{number:05d}", 100)
        writer.add(np.full(1000, number + 1), np.array([1000]))
        infos.append(writer.close(source))
    weights = {"books": 1.0, "web": 3.0}
    seal(tmp_path, Manifest("uint16", 100, 0, None, "a" * 64, {"train": infos, "heldout": []}, weights=weights))
    data = DataConfig(sources={"all": SourceConfig(path=str(tmp_path))}, seq_len=SEQ_LEN)
    loader = Loader(data, open_sources(data), seed=0, global_batch=40, micro_batch=40)
    ((tokens, _, _),) = loader.next_batches()
    assert tokens[:, 0].bincount().tolist() == [0, 10, 30]
    loader.close()
    annealed = DataConfig(sources=data.sources, seq_len=SEQ_LEN, phases=[PhaseConfig(weights={"all/books": 1})])
    loader = Loader(annealed, open_sources(annealed), seed=0, global_batch=40, micro_batch=40)
    assert loader.next_batches()[0].tokens.unique().tolist() == [1]
    loader.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"phases": [PhaseConfig(weights={"wbe": 1})]},
            "data.phases.0.weights.wbe: no such source; expected some of code",
        ),
        ({"phases": [PhaseConfig(weights={"web": 0})]}, "expected shares of at least 0, not all 0"),
        ({"phases": [PhaseConfig(), PhaseConfig()]}, "data.phases.0.tokens is null; only the last phase"),
        ({"skip": [[5, 5]]}, r"data.skip has \[5, 5\]; expected \[first, end\]"),
    ],
)
def test_phases_and_ranges_that_make_no_sense_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_another_schedule_is_another_order(make):
    state = make().state()
    for settings in ({"phases": PHASES}, {"limits": {"web": 0.5}}):
        with pytest.raises(ConfigError, match="other weights than the checkpoint"):
            make(**settings).restore(state)


@pytest.mark.parametrize("name", ["web/en", "/", "a/", "", "a\nb", "a\0"])
def test_a_name_that_would_be_taken_for_another_ones_is_refused(tmp_path, name):
    """What is packed was looked up by the name before a slash: training read concat while evaluation read packed."""
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"data: {{sources: {{{json.dumps(name)}: {{path: x}}, other: {{path: y}}}}}}\n")
    with pytest.raises(ConfigError, match=r"data\.sources has .*use letters, digits, - and _") as error:
        load(RunConfig, recipe, ["run_dir=r"])
    assert "\n" not in str(error.value)


def test_a_source_of_a_build_may_have_any_name_and_is_packed_with_its_folder(tmp_path, tiny_shards):
    shards = tiny_shards(train=(900, 700))
    first, second = shards.manifest.splits["train"]
    splits = {"train": [replace(first, source="a/b"), replace(second, source="web.en")], "heldout": []}
    seal(shards.folder, replace(shards.manifest, splits=splits, weights={"a/b": 1, "web.en": 3}))
    pack(open_shards(shards.folder), SEQ_LEN)
    data = DataConfig({"x": SourceConfig(str(shards.folder))}, SEQ_LEN, packing="best-fit")
    loader = Loader(data, open_sources(data), seed=0, global_batch=64, micro_batch=64)
    batch = loader.next_batches()[0]
    loader.close()
    assert (batch.labels == IGNORE_INDEX).any()  # bins are filled up; concat is not
