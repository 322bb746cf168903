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
from ponder_scale.train.schedules import Depth, pondering_steps, step_depth
from tests.ranks import run_ranks
from tests.train.plain import check_against_plain_torch
from tests.train.resumes import check_resume
from tests.train.runs import overrides, records, train_on_a_rank

RUN = ["run_dir=unused", "data.sources.any.path=unused", "train.steps=100", "train.global_batch=4"]


DRAWN = ["train.pondering.schedule=lognormal-poisson", "train.pondering.low=0", "train.pondering.mean=1.5"]


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
    own = {**base, "more": [*DRAWN, "train.pondering.per=sequence"]}
    check_resume(shards, tmp_path, [{**base, "deepspeed": "zero1", "precision": "bf16", "more": DRAWN}, own])


def test_sequences_take_the_same_steps_whatever_the_ranks_and_micro_batches(shards: Any, tmp_path: Path) -> None:
    """Each run against plain torch, which has the whole batch in one piece, and against the other."""
    runs = []
    for ranks, micro_batch, stage in ((2, 1, "zero3"), (2, 2, "zero1"), (1, 4, "zero2")):
        settings = [f"train.micro_batch={micro_batch}", f"train.deepspeed={stage}", *DRAWN]
        run_dir = tmp_path / f"{ranks}-{micro_batch}"
        case = overrides(run_dir, shards, *settings, "train.pondering.per=sequence", "train.global_batch=8")
        assert run_ranks(train_on_a_rank, [{"overrides": case}], ranks) == [["done"] * ranks]
        config = load(RunConfig, None, case)
        check_against_plain_torch(config, run_dir)
        runs.append([line["pass_losses"] for line in records(run_dir) if line["event"] == "step"])
    assert len({steps for step in range(1, 5) for steps in step_depth(step, config).by_sequence or []}) > 2
    for run in runs[1:]:
        for losses, expected in zip(run, runs[0], strict=True):
            assert losses == pytest.approx(expected, rel=1e-5)


def test_a_sequence_s_steps_depend_on_seed_step_and_its_place_in_the_batch_alone() -> None:
    def depth(step: int, *more: str) -> Depth:
        return step_depth(step, load(RunConfig, None, [*RUN, *DRAWN, "train.pondering.per=sequence", *more]))

    first, larger = depth(3), depth(3, "train.global_batch=64")
    assert first == depth(3) and first.most == max(first.by_sequence or [])
    assert larger.by_sequence is not None and larger.by_sequence[:4] == first.by_sequence
    assert larger != depth(4, "train.global_batch=64") and larger != depth(3, "train.global_batch=64", "seed=2")
    dealt = [larger.of(micro, 8, rank=rank, ranks=4) for micro in range(2) for rank in range(4)]
    assert [steps for part in dealt if part is not None for steps in part.tolist()] == larger.by_sequence
    assert Depth(2).of(0, 8, rank=0, ranks=1) is None


def test_the_planner_counts_the_passes_of_the_deepest_sequence() -> None:
    settings = [*RUN, *DRAWN, "train.pondering.per=sequence", "model.pondering_steps=4"]
    config = load(RunConfig, None, settings)
    seen = statistics.fmean(step_depth(step, config).most for step in range(1, 4001))
    assert mean_steps(config) == pytest.approx(seen, abs=0.05)
    uniform = load(RunConfig, None, [*settings, "train.pondering.schedule=uniform", "train.pondering.mean=null"])
    # of four draws from 0..4: the mean of the largest is 4 - (1 + 16 + 81 + 256) / 625
    assert mean_steps(uniform) == pytest.approx(4 - 354 / 625)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["train.pondering.schedule=lognormal-poisson"],
            "train.pondering.mean is None .* lognormal-poisson needs a mean",
        ),
        (["train.pondering.mean=2"], "train.pondering.mean is 2.0 .* the other schedules must leave it null"),
        (["train.pondering.schedule=lognormal-poisson", "train.pondering.mean=4"], "above model.pondering_steps"),
        (["train.pondering.schedule=lognormal-poisson", "train.pondering.mean=0"], "train.pondering.mean"),
        (
            ["train.pondering.schedule=ramp"],
            "train.pondering.ramp_steps is 0 with train.pondering.schedule ramp, .* give the step .* or use fixed",
        ),
        (["train.pondering.backward_passes=0"], "backward_passes"),
        (["train.pondering.backward_passes=1", "model.residual=replace"], "no gradient would reach the input embed"),
        (["train.pondering.backward_passes=1", "train.pass_losses=uniform"], "of earlier passes would have no grad"),
        (["train.pondering.backward_passes=1", "model.feedback=both"], "gate would get no gradient"),
        (
            [*DRAWN, "train.pondering.per=sequence", "train.pondering.backward_passes=1"],
            "backward_passes is 1 with train.pondering.per sequence",
        ),
        (
            ["train.pondering.per=sequence"],
            "per is sequence, but .* fixed gives all sequences of a step the same number",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, None, [*RUN, *settings])
