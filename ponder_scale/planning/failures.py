"""Compute what failures cost a run, and how often it should save: `ponder-scale plan --failures`.

We assume that devices fail independently of each other and at a constant rate. The time between two failures of a job
is then exponential, with mean (mean time of one device) / devices. A failure loses the work since the last save began.
The restart (detection, queue, start-up) always takes the same time, and can fail, too.

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974)
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (2006)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ponder_scale.figures import span

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days of 16,384 H100
DEVICE_HOURS = 16_384 * 54 * 24 / 419


@dataclass(frozen=True)
class Failures:
    """The failures of a job. All times are in seconds."""

    between: float  # mean time between two failures of the whole job
    save: float  # time for which each save stops the training
    restart: float  # time from a failure to the first step after it

    @property
    def young(self) -> float:
        """The training time between two saves by Young's formula: sqrt(2 save between)."""
        return math.sqrt(2 * self.save * self.between)

    @property
    def daly(self) -> float:
        """The training time between two saves by Daly's equation 37, which holds even if failures are frequent."""
        if self.save >= 2 * self.between:
            return self.between
        ratio = self.save / (2 * self.between)
        return self.young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.save

    def expected(self, work: float, interval: float) -> float:
        """The expected seconds until `work` seconds of training are done, by Daly's equation 20. inf if too large."""
        try:
            pieces = math.expm1((interval + self.save) / self.between) * work / interval
            return self.between * math.exp(self.restart / self.between) * pieces
        except OverflowError:
            return math.inf


def report(failures: Failures, *, devices: int, work: float, steps: int) -> list[str]:
    """The lines of `ponder-scale plan --failures`.

    Args:
        work: seconds of training without failures and saves.
        steps: number of optimizer steps in `work`.
    """
    step = work / steps
    every = min(steps, max(1, round(failures.daly / step)))
    seconds = failures.expected(work, every * step)
    spent = "the run never ends, because a restart takes far longer than the time between two failures"
    if math.isfinite(seconds):
        spent = f"{span(work)} become {span(seconds)} on average, with {seconds / failures.between:,.1f} failures"
    return [
        f"failures       one every {span(failures.between)} with {devices:,} device{'s' * (devices != 1)}; a save "
        f"costs {span(failures.save)}, a restart {span(failures.restart)}",
        f"save           every {span(every * step)} of training by Daly (by Young {span(failures.young)}): "
        f"checkpoint.every_steps={every}",
        f"goodput        {work / seconds:.1%}: {spent}",
    ]
