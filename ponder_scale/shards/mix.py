"""One 64-bit mixing function, which makes keys of near-duplicates and orders sequences."""

from __future__ import annotations

import numpy as np


def mix64(value: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014, constants by Stafford), on uint64.

    It is a bijection in which every output bit depends on all input bits. Do not change it: existing shuffles and
    deduplications depend on its exact values.
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
