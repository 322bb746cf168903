"""The random numbers of a rank: torch on the host and on its device, numpy, Python.

They begin anew in each step, from the seed, the step and the rank. So dropout masks are a function of these three, as
learning rate and data order are of theirs: a command repeats itself, ranks differ although they may be forked from one
parent, a resumed run draws what the uninterrupted one drew, and no checkpoint has to hold any state of them.
Recomputation draws the masks of its forward again, because `torch.utils.checkpoint` puts the generators back for it.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed(run_seed: int, step: int, rank: int) -> None:
    """Begin the random numbers of a step."""
    value = random.Random(f"generators {run_seed} {step} {rank}").getrandbits(63)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
