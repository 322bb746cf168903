"""How many pondering steps a run takes on average, by its schedule."""

from __future__ import annotations

import math

from ponder_scale.config import RunConfig

DEPTH_SIGMA = 0.5  # of lognormal-poisson, as Huginn has it (arXiv 2502.05171)
REACH, PIECES = 8.0, 400  # of the quadrature over the normal distribution: standard deviations, and pieces of them


def mean_steps(config: RunConfig) -> float:
    """Expected pondering steps of an optimizer step: where sequences take their own, the most that one takes."""
    schedule, highest = config.train.pondering, config.model.pondering_steps
    if schedule.schedule == "fixed":
        return float(highest)
    if schedule.schedule == "ramp":
        share = min(1.0, schedule.ramp_steps / config.train.steps)
        return highest - share * (highest - schedule.low) / 2
    low, draws = schedule.low, config.train.global_batch if schedule.per == "sequence" else 1
    if schedule.schedule == "uniform":
        below = [(steps - low + 1) / (highest - low + 1) for steps in range(low, highest)]
    else:
        assert schedule.mean is not None
        below = [at_most(steps, schedule.mean) for steps in range(low, highest)]
    return highest - math.fsum(share**draws for share in below)


def at_most(steps: int, mean: float) -> float:
    """The probability of at most this number of steps under lognormal-poisson, before it is clipped."""
    total = weights = 0.0
    for piece in range(PIECES + 1):
        z = REACH * (2 * piece / PIECES - 1)
        weight = math.exp(-z * z / 2)
        rate = mean * math.exp(DEPTH_SIGMA * z - DEPTH_SIGMA**2 / 2)
        logs = (k * math.log(rate) - rate - math.lgamma(k + 1) for k in range(steps + 1))
        total, weights = total + weight * math.fsum(map(math.exp, logs)), weights + weight
    return total / weights
