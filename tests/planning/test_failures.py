"""Checkpoint intervals and goodput: formulas against simulated runs."""

from __future__ import annotations

import random
import re

import pytest

from ponder_scale.planning.failures import Failures, report
from tests.commands import run_command

DAY = 86400.0


def simulate(failures: Failures, work: float, interval: float, generator: random.Random) -> tuple[float, int]:
    """Seconds that one run takes for `work` seconds of training, and its failures. The last piece is saved too."""
    clock, done, count = 0.0, 0.0, 0
    next_failure = generator.expovariate(1 / failures.between)
    while done < work:
        piece = min(interval, work - done)
        end = clock + piece + failures.save
        if end <= next_failure:
            clock, done = end, done + piece
            continue
        while True:  # back in training only after a restart that was not hit
            count += 1
            clock = next_failure + failures.restart
            next_failure += generator.expovariate(1 / failures.between)
            if next_failure > clock:
                break
    return clock, count


def mean_time(failures: Failures, work: float, interval: float, runs: int = 400) -> float:
    generator = random.Random(2)
    return sum(simulate(failures, work, interval, generator)[0] for _ in range(runs)) / runs


def mean_count(failures: Failures, work: float, interval: float, runs: int = 400) -> float:
    generator = random.Random(2)
    return sum(simulate(failures, work, interval, generator)[1] for _ in range(runs)) / runs


@pytest.mark.parametrize(
    "failures", [Failures(3 * 3600, 60, 900), Failures(6 * 3600, 1200, 600), Failures(1800, 30, 600)]
)
def test_simulated_runs_take_what_dalys_formula_expects(failures: Failures) -> None:
    interval = failures.daly
    work = interval * round(20 * DAY / interval)
    expected = failures.expected(work, interval)
    assert mean_time(failures, work, interval) == pytest.approx(expected, rel=0.02)
    assert mean_count(failures, work, interval) == pytest.approx(expected / failures.between, rel=0.02)


def test_no_interval_is_better_than_dalys() -> None:
    failures = Failures(between=4 * 3600, save=300, restart=900)
    best = failures.expected(30 * DAY, failures.daly)
    for factor in (0.3, 0.6, 0.8, 1.25, 1.6, 3.0):
        assert failures.expected(30 * DAY, factor * failures.daly) > best
    # Young's is close where saves are short beside the failures, and only there
    assert Failures(1e6, 10, 1).daly == pytest.approx(Failures(1e6, 10, 1).young, rel=0.01)
    assert Failures(1e3, 900, 1).daly < 0.7 * Failures(1e3, 900, 1).young


def test_without_failures_only_saves_cost() -> None:
    failures = Failures(between=1e15, save=60, restart=900)
    assert simulate(failures, 3600.0, 600.0, random.Random(1)) == (3600.0 + 6 * 60, 0)


def test_a_run_that_is_never_done_is_said_to_be_so_at_once() -> None:
    *_, goodput = report(Failures(between=60, save=30, restart=86400), devices=10**6, work=30 * DAY, steps=1000)
    never = "the run never ends, because a restart takes far longer than the time between two failures"
    assert goodput == f"goodput        0.0%: {never}"


def test_plan_prints_interval_and_goodput() -> None:
    sizes = ["model.vocab_size=100", "model.hidden_size=64", "model.num_attention_heads=4", "train.micro_batch=1"]
    sizes += ["model.num_hidden_layers=2", "train.global_batch=1024", "run_dir=x"]
    plan = ["plan", "llama-125m", "data.sources={x: {path: x}}", "--gpus", "1024", *sizes, "--save-seconds", "30"]
    done = run_command("ponder-scale", *plan, "--failures")
    assert done.returncode == 0, done.stderr
    assert "one every 2.1 days with 1,024 devices; a save costs 30.0 s, a restart 15.0 min" in done.stdout
    assert re.search(r"checkpoint\.every_steps=\d+\ngoodput +\d+\.\d%: .* on average, with", done.stdout)
    refused = run_command("ponder-scale", *plan, "--failures", "0")
    assert refused.returncode == 2 and "--failures is 0.0; expected more than 0" in refused.stderr
