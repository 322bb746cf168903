"""Find sequence number n of a run, as a pure function of (sources, weights, seed), in O(1) of the corpus size.

There are two steps. Neither builds or stores an index:

1. The mixture, by stride scheduling. Source i with the share w_i serves its k-th sequence at the virtual time
   (k + phase_i) / w_i, with 0 < phase_i < 1. Number n of the run is the n-th sequence in the order of
   (time, i). About tau sequences are served before time tau, so a window starts without counting up to it.
2. The shuffle. Sequence k of a source of N sequences is number pi(k mod N) of the source. pi is a pseudo-random
   permutation that depends on (seed, source name, epoch k // N). A cipher computes it for one k at a time.

If you add a source or change weights, the shuffle of every other source stays the same.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ponder_scale.shards.mix import mix64

_ROUNDS = 8
_ENDLESS = 2**62
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio


class Places(NamedTuple):
    """The places of the sequences of a window, as int64 arrays of its length."""

    source: np.ndarray
    epoch: np.ndarray  # how often the source has been read completely before
    sequence: np.ndarray  # its number in its source


class Phase(NamedTuple):
    """A stretch of the run with its own mixture."""

    sequences: int | None  # its length; None if it never ends
    weights: Sequence[float]  # of the sources; a source with 0 is not read


class Mixture:
    """Interleaves the sources by their shares. This is step 1 of the order."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.sources = np.flatnonzero(np.array(weights) > 0)
        total = math.fsum(weights)
        self._shares = np.array([weights[i] / total for i in self.sources.tolist()])
        # Multiples of the golden ratio spread any run of sources evenly, so equal shares never fire in bursts.
        self._phases = np.array([math.fmod(0.5 + int(i) * (math.sqrt(5) - 1) / 2, 1.0) for i in self.sources])

    def mix(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sequence, and its number within the source, (count,) each."""
        # Before time tau, source i has served tau w_i sequences, off by less than one. So all together have served tau,
        # off by less than the number of sources.
        margin = len(self._shares) + 1
        begin = self._served(float(max(0, first - margin)))
        end = self._served(float(first + count + margin))
        per_source = end - begin
        source = np.repeat(np.arange(len(begin)), per_source)
        number = np.arange(len(source)) - np.repeat(np.cumsum(per_source) - per_source - begin, per_source)
        chosen = np.lexsort((source, self._time(source, number)))
        skipped = first - int(begin.sum())
        chosen = chosen[skipped : skipped + count]
        return self.sources[source[chosen]], number[chosen]

    def served(self, count: int, sources: int) -> np.ndarray:
        """How many of the first `count` sequences come from each of all `sources`, (sources,) int64."""
        before = self._served(float(max(0, count - len(self._shares) - 1)))  # fewer than `count` together
        known = int(before.sum())
        source, _ = self.mix(known, count - known)
        found = np.bincount(source, minlength=sources)
        found[self.sources] += before
        return found

    def _served(self, tau: float) -> np.ndarray:
        """How many sequences each source serves before time `tau`.

        It compares the values of `_time` themselves, so that neighbouring windows agree to the last bit.
        """
        every = np.arange(len(self._shares))
        served = np.maximum(np.ceil(tau * self._shares - self._phases), 0).astype(np.int64)
        while np.any(late := self._time(every, served) < tau):
            served += late
        while np.any(early := (served > 0) & (self._time(every, served - 1) >= tau)):
            served -= early
        return served

    def _time(self, source: np.ndarray, number: np.ndarray) -> np.ndarray:
        return (number + self._phases[source]) / self._shares[source]


class _Stretch(NamedTuple):
    first: int  # its first sequence in the run
    mixture: Mixture
    before: np.ndarray  # sequences that each source has served until then


class Order:
    """The order of all sequences of a run.

    Args:
        names, counts, weights: for each source its name, its number of sequences and its relative weight.
        limits: how many sequences each source may serve. None sets no limit. After that, the others fill its share.
        phases: mixtures that follow each other and replace `weights`. Every source continues where it was.
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[int],
        weights: Sequence[float],
        seed: int,
        limits: Sequence[int | None] | None = None,
        phases: Sequence[Phase] = (),
    ) -> None:
        if not len(names) == len(counts) == len(weights) > 0 or min(counts) < 1 or not min(weights) > 0:
            raise ValueError(f"sources {names}, counts {counts}, weights {weights}; expected as many positive numbers")
        self._counts = np.array(counts, dtype=np.int64)
        self._keys = np.array([_source_key(seed, name) for name in names], dtype=np.uint64)
        most = [_ENDLESS if limit is None else limit for limit in limits or [None] * len(names)]
        self._stretches, self.end = _stretches(phases or [Phase(None, weights)], np.array(most, dtype=np.int64))
        self._firsts = [stretch.first for stretch in self._stretches]

    def served(self, count: int) -> list[int]:
        """How many of the first `count` sequences of the run come from each source. `count` is cut to `end`."""
        count = min(count, self.end)
        stretch = self._stretches[bisect_right(self._firsts, max(0, count - 1)) - 1]
        return (stretch.before + stretch.mixture.served(count - stretch.first, len(self._counts))).tolist()

    def locate(self, first: int, count: int) -> Places:
        """The places of the sequences [first, first + count) of the run. There are none from `end` on."""
        assert first + count <= self.end
        parts = []
        number = bisect_right(self._firsts, first) - 1
        while count:
            stretch = self._stretches[number]
            next_first = self._firsts[number + 1] if number + 1 < len(self._firsts) else self.end
            some = min(count, next_first - first)
            source, served = stretch.mixture.mix(first - stretch.first, some)
            parts.append((source, served + stretch.before[source]))
            first, count, number = first + some, count - some, number + 1
        source, served = (np.concatenate(column) for column in zip(*parts, strict=True))
        size = self._counts[source]
        epoch, position = np.divmod(served, size)
        sequence = permute(position, size, epoch_key(self._keys[source], epoch))
        return Places(source, epoch, sequence)


def _stretches(phases: Sequence[Phase], limits: np.ndarray) -> tuple[list[_Stretch], int]:
    """The phases, split where a source reaches its limit, and the number of sequences in all."""
    found, first, before = [], 0, np.zeros(len(limits), dtype=np.int64)
    for phase in phases:
        left = _ENDLESS if phase.sequences is None else phase.sequences
        while left:
            weights = np.where(before < limits, np.array(phase.weights, dtype=np.float64), 0.0)
            if not weights.any():
                break
            mixture = Mixture(weights.tolist())
            length = _within(mixture, left, limits - before)
            found.append(_Stretch(first, mixture, before))
            if length == _ENDLESS:
                return found, _ENDLESS
            first, left, before = first + length, left - length, before + mixture.served(length, len(limits))
    return found, first


def _within(mixture: Mixture, length: int, limits: np.ndarray) -> int:
    """The largest number of sequences, up to `length`, for which no source serves more than its limit."""
    if (limits[mixture.sources] >= _ENDLESS // 2).all():
        return length
    low, high = 0, min(length, int(np.minimum(limits, 2**50)[mixture.sources].sum()) + 1)
    while low < high:
        middle = (low + high + 1) // 2
        if (mixture.served(middle, len(limits)) <= limits).all():
            low = middle
        else:
            high = middle - 1
    return low


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """pi(index), (n,) int64, where pi is the pseudo-random permutation of [0, size) that `key` selects.

    All arguments are (n,). A Feistel network permutes the pairs (left, right) of [0, rows) x [0, columns), which is the
    smallest near-square with at least `size` values. It is applied again to a value outside [0, size) until the value
    falls inside.
    """
    size, key = size.astype(np.uint64), key.astype(np.uint64)
    columns = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    rows = (size + columns - np.uint64(1)) // columns
    result = _encrypt(index.astype(np.uint64), rows, columns, key)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _encrypt(result[outside], rows[outside], columns[outside], key[outside])
        outside = outside[result[outside] >= size[outside]]
    return result.astype(np.int64)


def epoch_key(source_key: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """The key of one epoch of a source, (n,) uint64."""
    return mix64(source_key + epoch.astype(np.uint64) * np.uint64(_GOLDEN))


def _source_key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def _encrypt(value: np.ndarray, rows: np.ndarray, columns: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = np.divmod(value, columns)
    for step in range(0, _ROUNDS, 2):
        left = (left + _round(right, key, step)) % rows
        right = (right + _round(left, key, step + 1)) % columns
    return left * columns + right


def _round(half: np.ndarray, key: np.ndarray, step: int) -> np.ndarray:
    # 63 bits: a sum that wrapped around 2**64 would no longer be invertible modulo rows or columns.
    return mix64(half ^ mix64(key + np.uint64((step + 1) * _GOLDEN % 2**64))) >> np.uint64(1)
