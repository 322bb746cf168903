"""Count the lengths of any number of documents in bounded memory, and show them as bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

_EXACT_BITS = 12  # lengths below 2^13 are counted exactly, longer ones by their first 13 bits, to 1 in 4,096
_AT_ONCE = 2**20
_WIDTH = 40  # characters of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"


class Lengths:
    """A histogram of lengths."""

    def __init__(self) -> None:
        self.counts = np.zeros(_bucket(np.array([2**31 - 1]))[0] + 1, dtype=np.int64)

    def add(self, lengths: np.ndarray) -> None:
        """Count some lengths, (n,) of 0 to 2^31 - 1. A memory map is read piece by piece."""
        for begin in range(0, len(lengths), _AT_ONCE):
            found = np.bincount(_bucket(lengths[begin : begin + _AT_ONCE].astype(np.int64)))
            self.counts[: len(found)] += found

    def quantiles(self, of: Iterable[float]) -> list[int]:
        """The length at each quantile. Lengths from 2^13 on are exact to 1 in 4,096."""
        ends = np.cumsum(self.counts)
        ranks = [round(part * (int(ends[-1]) - 1)) for part in of]
        return _least(np.searchsorted(ends, ranks, side="right")).tolist()

    def bars(self) -> Iterator[str]:
        """A line for each doubling of the length: the number of documents, their share of all tokens, a bar."""
        least = _least(np.arange(len(self.counts)))
        octave = np.array([int(length).bit_length() for length in least])
        documents = np.bincount(octave, weights=self.counts)
        tokens = np.bincount(octave, weights=self.counts * least)
        first, last = np.flatnonzero(documents)[[0, -1]]
        for number in range(first, last + 1):
            span = f"{2**number // 2:,} to {2**number - 1:,}" if number > 1 else str(number)
            share = tokens[number] / max(1.0, tokens.sum())
            bar = _bar(documents[number] / documents.max())
            yield f"{span:>29} {documents[number]:>15,.0f} {share:>7.1%} {bar}".rstrip()


def _bar(part: float) -> str:
    eighths = max(1, round(part * _WIDTH * 8)) if part else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _bucket(length: np.ndarray) -> np.ndarray:
    shift = np.maximum(np.frexp(length)[1] - 1 - _EXACT_BITS, 0)
    return (length >> shift) + (shift << _EXACT_BITS)


def _least(bucket: np.ndarray) -> np.ndarray:
    """The smallest length in a bucket."""
    shift = np.maximum((bucket >> _EXACT_BITS) - 1, 0)
    return (bucket - (shift << _EXACT_BITS)) << shift
