"""Remove exact and near duplicates in corpora larger than memory. Keys lie on disk and are compared bucket by bucket.

Each document that the filters keep gets 64-bit keys: the hash of its text, or one key for each band of its MinHash
signature (Broder 1997). A document is dropped if it shares a key with an earlier one, in the order of the plan. The
first of several equal documents therefore stays, for any number of workers. Any two of N different texts share a key
with a probability of N^2 / 2^65.

The signature is that of FineWeb (Penedo et al. 2024): 5-grams of words, 14 bands of 8 hashes. It finds pairs of Jaccard
similarity 0.75 with a probability of 0.77, 0.85 with 0.99, and 0.5 with 0.05. A text of fewer than 5 words has no
5-gram, so only an equal text makes it a duplicate.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import xxhash

from ponder_scale.files.write import sync, sync_folder
from ponder_scale.shards.mix import mix64

NGRAM_WORDS, BANDS, HASHES_OF_BAND = 5, 14, 8
BUCKET_KEYS = 2**21  # compared in memory at the same time; a duplicate takes up to 80 bytes
RUN_KEYS = 2**22  # keys of one unit that are sorted in memory at the same time
KEY_BYTES = 12  # size on disk of a key and the number of its document in the unit

_JOINERS = "\u200c\u200d"  # they occur inside words of Persian and Indic scripts, and inside emoji
_ASCII_WORD = re.compile(r"\w+")
_NGRAMS_AT_ONCE = 4096
_BEFORE = np.uint32(2**32 - 1)  # stands for the unit of keys that existed before this build


def exact_keys(text: str) -> np.ndarray:
    """The key of a text, (1,) uint64."""
    return np.array([xxhash.xxh3_64_intdigest(text.encode())], dtype=np.uint64)


def minhash_keys(text: str) -> np.ndarray:
    """One key for each band of the signature, (BANDS,) uint64.

    A text shorter than an n-gram gets one key, (1,), that of the text without surrounding white space.
    """
    grams = n_gram_hashes(words_of(text), NGRAM_WORDS)
    if not len(grams):
        return exact_keys(text.strip())
    bands = _signature(grams).reshape(BANDS, HASHES_OF_BAND)
    keys = np.arange(BANDS, dtype=np.uint64)
    for i in range(HASHES_OF_BAND):
        keys = mix64(keys * np.uint64(31) + bands[:, i])
    return keys


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, as Unicode defines them.

    Unlike in Python's re, a word includes combining marks. A sign that is neither part of a word nor punctuation, such
    as an emoji or a mathematical symbol, is a word of its own.
    """
    return (_ASCII_WORD if text.isascii() else _words()).findall(text.lower())


def n_gram_hashes(words: list[str], n: int) -> np.ndarray:
    """A hash of each n-gram of some words, (words - n + 1,) uint64. Empty if there are fewer than n words."""
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], dtype=np.uint64)
    count = max(0, len(hashes) - n + 1)
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        grams = mix64(grams * np.uint64(31) + hashes[i : i + count])
    return grams


@cache
def _words() -> re.Pattern[str]:
    marks = [ord(joiner) for joiner in _JOINERS]
    symbols: list[int] = []
    for number in (*range(0x80, 0x20000), *range(0xE0000, 0xE1000)):  # no other plane has marks or symbols
        category = unicodedata.category(chr(number))
        if category[0] in "MS":
            (marks if category[0] == "M" else symbols).append(number)
    mark = f"[{_ranges(sorted(marks))}]"
    return re.compile(rf"(?:\w+|{mark}+)+|[{_ranges(symbols)}]{mark}*")


def _ranges(numbers: list[int]) -> str:
    """Ascending code points, written as the inside of a character class."""
    ends = [i for i, (one, other) in enumerate(pairwise(numbers), start=1) if other != one + 1]
    stretches = [(numbers[begin], numbers[end - 1]) for begin, end in pairwise([0, *ends, len(numbers)])]
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in stretches)


def _signature(grams: np.ndarray) -> np.ndarray:
    """The minimum of each hash function over the n-grams, (BANDS * HASHES_OF_BAND,) uint64."""
    odd, mask = _hash_functions()
    least = np.full(len(odd), np.iinfo(np.uint64).max, dtype=np.uint64)
    for begin in range(0, len(grams), _NGRAMS_AT_ONCE):
        some = grams[begin : begin + _NGRAMS_AT_ONCE, None]
        np.minimum(least, ((some ^ mask) * odd).min(axis=0), out=least)
    return least


@cache
def _hash_functions() -> tuple[np.ndarray, np.ndarray]:
    """The odd factors and the masks of the hash functions, (BANDS * HASHES_OF_BAND,) uint64 each."""
    odd, mask = (
        np.random.default_rng(seed).integers(2**64, size=BANDS * HASHES_OF_BAND, dtype=np.uint64) for seed in (0, 1)
    )
    return odd | np.uint64(1), mask


class KeyWriter:
    """Writes the keys of one unit to disk, as sorted runs of (key, number of the document in the unit)."""

    def __init__(self, scratch: Path, folder: Path, unit: int) -> None:
        self._scratch, self._folder, self._unit = scratch, folder, unit
        self._keys, self._numbers = array("Q"), array("I")
        self._runs = self._total = 0

    def add(self, number: int, keys: np.ndarray) -> None:
        """Add the keys of document `number`. Numbers must ascend."""
        self._keys.frombytes(keys.tobytes())
        self._numbers.extend([number] * len(keys))
        if len(self._keys) >= RUN_KEYS:
            self._write()

    def close(self) -> dict[str, int]:
        """Write the remaining keys and give all files their final names. Returns the numbers of runs and of keys."""
        if self._keys:
            self._write()
        for path in self._scratch.glob(f"{self._unit:06d}-*.npy"):
            path.rename(self._folder / path.name)
        sync_folder(self._folder)
        return {"runs": self._runs, "keys": self._total}

    def _write(self) -> None:
        columns: dict[str, np.ndarray] = {
            "keys": np.frombuffer(self._keys, np.uint64),
            "numbers": np.frombuffer(self._numbers, np.uint32),
        }
        order = np.argsort(columns["keys"], kind="stable")
        for name, values in columns.items():
            with (self._scratch / f"{self._unit:06d}-{self._runs}.{name}.npy").open("wb") as stream:
                np.save(stream, values[order])
                sync(stream)
        self._total += len(order)
        self._runs += 1
        self._keys, self._numbers = array("Q"), array("I")


def buckets(keys: int) -> int:
    """The number of buckets for `keys` keys."""
    return max(1, -(-keys // BUCKET_KEYS))


class Found(NamedTuple):
    """The result of comparing the keys of one bucket."""

    units: np.ndarray  # (n,) uint32, units of the duplicates, sorted by unit and number
    numbers: np.ndarray  # (n,) uint32, numbers of the duplicate documents in their units
    new: np.ndarray  # (m,) uint64, keys not seen before, ascending, each once


def find_duplicates(folder: Path, runs: Iterable[int], bucket: int, total: int, seen: np.ndarray) -> Found:
    """Find the duplicates in one of `total` buckets.

    folder: the folder of the keys.
    runs: the number of runs of each unit.
    seen: keys that existed before this build, ascending. A document with one of them is a duplicate too.
    """
    begin, end = (_first_of_bucket(seen, some, total) for some in (bucket, bucket + 1))
    before = np.full(end - begin, _BEFORE, dtype=np.uint32)
    parts = [(np.array(seen[begin:end]), before, before)]
    for unit, count in enumerate(runs):
        for run in range(count):
            keys = np.load(folder / f"{unit:06d}-{run}.keys.npy", mmap_mode="r")
            begin, end = (_first_of_bucket(keys, some, total) for some in (bucket, bucket + 1))
            numbers = np.load(folder / f"{unit:06d}-{run}.numbers.npy", mmap_mode="r")[begin:end]
            parts.append((np.array(keys[begin:end]), np.full(end - begin, unit, dtype=np.uint32), np.array(numbers)))
    keys, units, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    del parts
    order = np.argsort(keys, kind="stable")  # stable, so that equal keys keep the order of the plan
    keys = keys[order]
    first = np.concatenate([np.ones(min(1, len(keys)), dtype=bool), keys[1:] != keys[:-1]])
    repeated, new = order[~first], keys[first & (units[order] != _BEFORE)]
    del keys, order, first
    found = np.unique(units[repeated].astype(np.uint64) << np.uint64(32) | numbers[repeated])
    return Found((found >> np.uint64(32)).astype(np.uint32), found.astype(np.uint32), new)


def open_keys(path: Path) -> np.ndarray:
    """The keys that a set keeps of its documents, (n,) uint64, ascending, each once, memory-mapped."""
    return np.memmap(path, dtype="<u8", mode="r") if path.stat().st_size else np.empty(0, dtype="<u8")


def unite(sets: Sequence[np.ndarray], stream: IO[bytes]) -> int:
    """Write the keys of several sets as those of one set. Returns how many keys are in more than one of them."""
    sizes, shared = sum(map(len, sets)), 0
    total = buckets(sizes)
    for bucket in range(total):
        parts = []
        for keys in sets:
            begin, end = (_first_of_bucket(keys, some, total) for some in (bucket, bucket + 1))
            parts.append(np.array(keys[begin:end]))
        found, times = np.unique(np.concatenate(parts), return_counts=True)
        shared += int(np.count_nonzero(times > 1))  # a set has each of its keys once
        stream.write(found.astype("<u8").tobytes())
    return shared


class Duplicates:
    """The documents of one unit that are duplicates, from the results of all buckets. Test numbers in ascending order
    only.
    """

    def __init__(self, folder: Path, total: int, unit: int) -> None:
        parts = [np.empty(0, np.uint32)]
        for bucket in range(total):
            units = np.load(folder / f"{bucket:06d}.units.npy", mmap_mode="r")
            begin, end = np.searchsorted(units, [unit, unit + 1])
            parts.append(np.load(folder / f"{bucket:06d}.numbers.npy", mmap_mode="r")[begin:end])
        self._numbers, self._next = np.unique(np.concatenate(parts)), 0

    def __contains__(self, number: object) -> bool:
        if self._next == len(self._numbers) or self._numbers[self._next] != number:
            return False
        self._next += 1
        return True


def _first_of_bucket(keys: np.ndarray, bucket: int, total: int) -> int:
    if bucket == total:
        return len(keys)
    return int(np.searchsorted(keys, np.uint64(2**64 * bucket // total)))
