"""How many pondering steps are drawn: the published distribution, by seed and step alone."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import PonderingSchedule, RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.planning.depth import mean_steps
from ponder_scale.settings import load
from ponder_scale.train.schedules import pondering_steps
from tests.train.resumes import check_resume

RUN = ["run_dir=unused", "data.sources.any.path=unused", "train.steps=100", "train.global_batch=4"]


def density(steps: int, mean: float) -> float:
    """Of Poisson(exp(tau)), tau ~ Normal(log(mean) - 0.5^2 / 2, 0.5): a Riemann sum over the rate itself."""
    width, total = mean / 500, 0.0
    for number in range(1, 6001):
        rate = number * width
        deviation = (math.log(rate) - (math.log(mean) - 0.125)) / 0.5
        of_rate = math.exp(-(deviation**2) / 2) / (rate * 0.5 * math.sqrt(2 * math.pi))
        total += width * of_rate * math.exp(steps * math.log(rate) - rate - math.lgamma(steps + 1))
    return total


def drawn(count: int, highest: int, schedule: PonderingSchedule, seed: int = 7) -> list[int]:
    return [pondering_steps(step, highest, schedule, seed) for step in range(1, count + 1)]


def test_draws_have_the_published_density_clipped_at_both_ends() -> None:
    low, highest, mean, count = 2, 9, 4.0, 20_000
    schedule = PonderingSchedule("lognormal-poisson", low=low, mean=mean)
    got = Counter(drawn(count, highest, schedule))
    expected = {steps: density(steps, mean) for steps in range(highest)}
    clipped = {steps: expected[steps] for steps in range(low + 1, highest)}
    clipped |= {low: sum(expected[steps] for steps in range(low + 1)), highest: 1 - sum(expected.values())}
    assert sorted(got) == sorted(clipped) == list(range(low, highest + 1))
    square = sum((got[steps] - count * share) ** 2 / (count * share) for steps, share in clipped.items())
    assert square < 24.3  # seven degrees of freedom: one draw of a thousand is above it
    config = [*RUN, f"model.pondering_steps={highest}", f"train.pondering.low={low}", f"train.pondering.mean={mean}"]
    planned = mean_steps(load(RunConfig, None, [*config, "train.pondering.schedule=lognormal-poisson"]))
    assert planned == pytest.approx(sum(steps * share for steps, share in clipped.items()), abs=1e-4)


def test_draws_far_from_the_bounds_have_the_moments_of_the_paper() -> None:
    """Huginn's mean 32 and sigma 0.5: mean 32, variance 32 + 32^2 (exp(0.25) - 1) = 322.84."""
    got = drawn(20_000, 10_000, PonderingSchedule("lognormal-poisson", low=0, mean=32.0))
    assert statistics.fmean(got) == pytest.approx(32.0, abs=4 * math.sqrt(322.84 / 20_000))
    assert statistics.pvariance(got) == pytest.approx(322.84, rel=0.08)


def test_draws_depend_on_seed_and_step_alone() -> None:
    schedule = PonderingSchedule("lognormal-poisson", low=1, mean=3.0)
    first = drawn(200, 8, schedule)
    assert first == drawn(200, 8, schedule)
    assert pondering_steps(150, 8, schedule, 7) == first[149]
    assert first != drawn(200, 8, schedule, seed=8)


def test_a_run_of_drawn_depths_is_resumed_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    base = {"deepspeed": "zero3", "precision": "fp32", "recompute": "pass", "schedule": "fixed"}
    drawn_steps = ["train.pondering.schedule=lognormal-poisson", "train.pondering.low=0", "train.pondering.mean=1.5"]
    check_resume(shards, tmp_path, [{**base, "more": drawn_steps}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.pondering.schedule=lognormal-poisson"], "train.pondering.mean is None .* lognormal-poisson needs it"),
        (["train.pondering.mean=2"], "train.pondering.mean is 2.0 .* the other schedules have none"),
        (["train.pondering.schedule=lognormal-poisson", "train.pondering.mean=4"], "above model.pondering_steps"),
        (["train.pondering.schedule=lognormal-poisson", "train.pondering.mean=0"], "train.pondering.mean"),
    ],
)
def test_a_mean_that_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, None, [*RUN, *settings])
