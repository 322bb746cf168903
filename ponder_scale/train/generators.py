"""The random number generators of a rank: torch on the host and on its device, numpy, Python.

Each step seeds them again from the run's seed, the step and the rank, so dropout masks are a function of these three:

    - The same command gives the same run.
    - Ranks differ, even if they are forked from one parent.
    - A resumed run draws what the uninterrupted run would have drawn, and checkpoints hold no state of the generators.

Recomputation draws the same masks as its forward, because `torch.utils.checkpoint` restores the generators for it.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed(run_seed: int, step: int, rank: int) -> None:
    """Seed all generators for a step."""
    value = random.Random(f"generators {run_seed} {step} {rank}").getrandbits(63)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
