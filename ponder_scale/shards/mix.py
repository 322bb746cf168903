"""One 64-bit mixing function, for keys of near-duplicates and for the order of sequences."""

from __future__ import annotations

import numpy as np


def mix64(value: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014, constants by Stafford), of uint64.

    A bijection in which every bit depends on all. Shuffles and deduplications that were made stand on its bits.
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
