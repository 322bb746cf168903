import time

import numpy as np
import pytest

from ponder_scale.data.order import Order, Phase, epoch_key, permute

MIXTURES = {
    "one source": [1.0],
    "equal shares": [1.0] * 7,
    "shares of every size": [0.6, 0.25, 0.1, 0.04, 0.009, 0.001],
    "one large, many small": [0.9, *[0.1 / 30] * 30],
    "irrational shares": [2**0.5, 3**0.5, 5**0.5, 0.1],
}


def order(counts, weights=None, seed=1, names=None) -> Order:
    names = names or [f"source{i}" for i in range(len(counts))]
    return Order(names, counts, weights or [1.0] * len(counts), seed)


def permutation(size: int, key: int = 1) -> np.ndarray:
    everything = np.arange(size)
    return permute(everything, np.full(size, size), np.full(size, key, dtype=np.uint64))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 255, 256, 257, 1000, 65535, 65536, 65537, 300_001])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_the_shuffle_is_a_permutation(size, key):
    assert np.array_equal(np.sort(permutation(size, key)), np.arange(size))


def test_the_shuffle_of_a_trillion_stays_inside_and_never_repeats():
    size, count = 10**12 + 39, 200_000
    index = np.random.default_rng(0).choice(size, count, replace=False)
    result = permute(index, np.full(count, size), np.ones(count, dtype=np.uint64))
    assert result.min() >= 0 and result.max() < size
    assert len(np.unique(result)) == len(np.unique(index))


def test_the_shuffle_reaches_every_order_of_few_sequences_about_equally():
    keys = epoch_key(np.uint64([5]), np.arange(24_000))
    columns = [permute(np.full(24_000, i), np.full(24_000, 4), keys) for i in range(4)]
    orders, times = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
    assert len(orders) == 24
    assert times.min() > 850 and times.max() < 1150  # 1000 expected, standard deviation 31


def test_the_shuffle_looks_random():
    size = 100_000
    shuffled = permutation(size)
    position = np.arange(size)
    assert abs(np.corrcoef(position, shuffled)[0, 1]) < 0.015
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.015
    assert (shuffled == position).sum() < 8  # 1 expected
    assert (np.abs(np.diff(shuffled)) == 1).sum() < 12  # 2 expected
    tens, _, _ = np.histogram2d(position, shuffled, bins=10)
    chi_square = ((tens - 1000) ** 2 / 1000).sum()
    assert 40 < chi_square < 140  # 81 expected, standard deviation 13


def test_epochs_seeds_and_names_shuffle_differently():
    first, second = (order([1000]).locate(epoch * 1000, 1000).sequence for epoch in (0, 1))
    assert (first == second).sum() < 10
    assert (first == order([1000], seed=2).locate(0, 1000).sequence).sum() < 10
    assert (first == order([1000], names=["other"]).locate(0, 1000).sequence).sum() < 10


def test_adding_a_source_keeps_the_shuffle_of_the_others():
    def of_web(some: Order, source: int) -> np.ndarray:
        places = some.locate(0, 4000)
        return places.sequence[places.source == source][:1000]

    alone = of_web(order([700], names=["web"]), 0)
    mixed = of_web(order([50, 700], [0.3, 0.7], names=["code", "web"]), 1)
    assert np.array_equal(alone, mixed)


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES.keys())
def test_each_sequence_is_seen_once_before_any_is_seen_twice(weights):
    counts = [37 * (i + 1) for i in range(len(weights))]
    places = order(counts, weights).locate(0, 20_000)
    for source, count in enumerate(counts):
        mine = places.source == source
        index, epoch = places.sequence[mine], places.epoch[mine]
        assert np.array_equal(epoch, np.arange(len(index)) // count)
        for begin in range(0, len(index) - count + 1, count):
            assert np.array_equal(np.sort(index[begin : begin + count]), np.arange(count))


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES.keys())
def test_every_prefix_keeps_the_shares_to_about_one_sequence(weights):
    total, shares = 50_000, np.array(weights) / sum(weights)
    source = order([10**9] * len(weights), weights).locate(0, total).source
    for i, share in enumerate(shares):
        served = np.cumsum(source == i)
        assert np.abs(served - share * np.arange(1, total + 1)).max() < 2


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("first", [0, 1, 17, 12_345, 10**9 + 7, 10**12])
def test_windows_of_any_size_agree(weights, first):
    some = order([1000 + i for i in range(len(weights))], weights)
    whole = np.stack(some.locate(first, 200))
    singles = np.concatenate([np.stack(some.locate(first + i, 1)) for i in range(200)], axis=1)
    parts = [np.stack(some.locate(first + begin, size)) for begin, size in ((0, 3), (3, 64), (67, 133))]
    assert np.array_equal(whole, singles)
    assert np.array_equal(whole, np.concatenate(parts, axis=1))


def test_the_mixture_is_that_of_the_definition_written_out():
    weights = [0.5, 0.3, 0.2]
    phases = [(0.5 + i * 0.6180339887498949) % 1 for i in range(3)]
    by_time = sorted(((k + phases[i]) / weights[i], i) for i in range(3) for k in range(1000))
    expected = [i for _, i in by_time[:1000]]
    assert order([10**6] * 3, weights).locate(0, 1000).source.tolist() == expected


def test_scaling_all_weights_changes_nothing():
    one, other = order([10, 20], [1, 3]).locate(0, 100), order([10, 20], [2, 6]).locate(0, 100)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("counts", "weights"), [([], []), ([0], [1.0]), ([5], [0.0]), ([5, 5], [1.0])])
def test_sources_without_sequences_or_share_are_refused(counts, weights):
    with pytest.raises(ValueError, match="expected as many positive numbers"):
        Order([f"source{i}" for i in range(len(counts))], counts, weights, 1)


def test_a_look_up_costs_the_same_anywhere_in_a_trillion_sequences():
    some = order([10**11 + i for i in range(10)], [1.0 + i for i in range(10)])

    def seconds(first: int) -> float:
        begin = time.process_time()
        for _ in range(20):
            some.locate(first, 1024)
        return time.process_time() - begin

    seconds(0)
    assert seconds(10**12) < 3 * seconds(0) + 0.1


def test_what_each_source_serves_of_a_run_is_counted_without_going_through_it():
    phases = [Phase(40, [1, 3, 0]), Phase(100, [1, 1, 1]), Phase(None, [0, 1, 5])]
    some = Order(["a", "b", "c"], [30, 20, 10], [1, 1, 1], 7, [None, 70, None], phases)
    source = some.locate(0, 600).source
    for count in (1, 39, 40, 41, 139, 140, 141, 333, 600):
        assert some.served(count) == np.bincount(source[:count], minlength=3).tolist()
    ended = Order(["a"], [30], [1], 7, [50])
    assert ended.served(10**9) == [50]
