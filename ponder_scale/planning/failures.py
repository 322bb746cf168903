"""What failures cost a run, and how often it should save: `ponder-scale plan --failures`.

Devices fail independently of each other and at a constant rate, so the time between two failures of a job is
exponential with mean (mean time of one device) / devices. A failure loses what was done since the last save began; the
restart (detection, queue, start-up) takes the same time whatever failed, and can itself be hit.

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974)
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (2006)
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from ponder_scale.figures import span

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days of 16,384 H100
DEVICE_HOURS = 16_384 * 54 * 24 / 419
SIMULATED_RUNS = 200


@dataclass(frozen=True)
class Failures:
    """How a job fails. All times in seconds."""

    between: float  # mean time between two failures of the whole job
    save: float  # training stands still for so long at each save
    restart: float  # from a failure to the first step after it

    @property
    def young(self) -> float:
        """Training between two saves by Young's formula: sqrt(2 save between)."""
        return math.sqrt(2 * self.save * self.between)

    @property
    def daly(self) -> float:
        """The same by Daly's, equation 37, which also holds where saves are not short beside the failures."""
        if self.save >= 2 * self.between:
            return self.between
        ratio = self.save / (2 * self.between)
        return self.young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.save

    def expected(self, work: float, interval: float) -> float:
        """Expected seconds until `work` seconds of training are done: Daly's equation 20."""
        pieces = math.expm1((interval + self.save) / self.between) * work / interval
        return self.between * math.exp(self.restart / self.between) * pieces

    def simulate(self, work: float, interval: float, generator: random.Random) -> tuple[float, int]:
        """Seconds that one run takes for `work` seconds of training, and its failures. The last piece is saved too."""
        clock, done, failures = 0.0, 0.0, 0
        next_failure = generator.expovariate(1 / self.between)
        while done < work:
            piece = min(interval, work - done)
            end = clock + piece + self.save
            if end <= next_failure:
                clock, done = end, done + piece
                continue
            while True:  # back in training only after a restart that was not hit
                failures += 1
                clock = next_failure + self.restart
                next_failure += generator.expovariate(1 / self.between)
                if next_failure > clock:
                    break
        return clock, failures


def report(failures: Failures, *, devices: int, work: float, steps: int) -> list[str]:
    """Lines for a person.

    Args:
        work: seconds of training without failures and saves.
        steps: into which it is divided.
    """
    step = work / steps
    every = min(steps, max(1, round(failures.daly / step)))
    generator = random.Random(1)
    runs = sorted(failures.simulate(work, every * step, generator) for _ in range(SIMULATED_RUNS))
    seconds, counts = zip(*runs, strict=True)
    mean, (fast, slow) = sum(seconds) / len(seconds), (seconds[len(runs) // 20], seconds[-len(runs) // 20])
    return [
        f"failures       one each {span(failures.between)} with {devices:,} device{'s' * (devices != 1)}; a save costs "
        f"{span(failures.save)}, a restart {span(failures.restart)}",
        f"save           each {span(every * step)} of training by Daly (by Young {span(failures.young)}): "
        f"checkpoint.every_steps={every}",
        f"goodput        {work / mean:.1%} ({work / slow:.1%} to {work / fast:.1%} in nine of ten of {len(runs)} "
        f"simulated runs): {span(work)} become {span(mean)}, with {sum(counts) / len(counts):,.1f} failures",
    ]
