"""`bench planner`: what is made of the times. That it runs, on real ranks, is a test of the documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import planner
from benchmarks.planner import CASES
from ponder_scale.errors import ConfigError
from ponder_scale.planning.hardware import CPU
from ponder_scale.planning.time import NO_TIME


def test_the_runs_cover_stages_policies_steps_widths_and_both_regimes() -> None:
    covered = {name: {getattr(case, name) for case in CASES} for name in ("sharding", "policy", "pondering_steps")}
    assert covered["sharding"] == {"zero0", "zero1", "zero2", "zero3_keep_gathered", "zero3_bounded"}
    assert covered["policy"] == {"none", "selective", "pass", "layer"}
    assert covered["pondering_steps"] == {0, 1, 2, 3}
    assert len({case.hidden for case in CASES}) == 3 and len(CASES) == 8


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine on which a step takes as many seconds as each round's entry says, and is planned by its name."""
    seconds: list[float] = []
    names = iter(range(100))
    monkeypatch.setattr(planner, "calibrate", lambda: replace(CPU, name=str(next(names))))
    monkeypatch.setattr(planner, "on_two_ranks", lambda function, settings: seconds.pop(0))
    return seconds


def test_a_ratio_is_the_median_of_those_of_the_rounds(
    machine: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [2.0, 8.0, 3.0]  # a machine that was slower in the second round is slower in both
    monkeypatch.setattr(
        planner, "predicted", lambda settings, found: replace(NO_TIME, products=planned[int(found.name)])
    )
    machine += [2.5, 8.0, 2.0]  # ratios of 0.8, 1 and 1.5
    assert planner.run(cases=[3]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:9] == [
        *("zero1", "selective", "512", "4", "1", "256", "x", "2", "2.500"),
    ]


@pytest.mark.parametrize(("seconds", "code"), [(1.16, 0), (1.19, 1), (0.86, 1), (0.88, 0)])
def test_the_worst_ratio_decides_the_exit_code(
    machine: list[float], monkeypatch: pytest.MonkeyPatch, seconds: float, code: int
) -> None:
    monkeypatch.setattr(planner, "predicted", lambda *_: replace(NO_TIME, products=1.0))
    machine += [1.0, seconds]
    assert planner.run(rounds=1, cases=[1, 2]) == code


def test_a_case_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--cases 9: expected numbers from 1 to 8"):
        planner.run(cases=[1, 9])


def test_the_prediction_is_of_two_ranks_and_of_this_hardware() -> None:
    settings = [*CASES[6].overrides(), "model.hidden_size=96", "model.num_hidden_layers=1", "data.seq_len=16"]
    found: Any = planner.predicted(settings, CPU)
    assert found.gathers > 0 and found.recomputation > 0
    slower = replace(CPU, peak_flops={key: value / 2 for key, value in CPU.peak_flops.items()})
    assert planner.predicted(settings, slower).products == pytest.approx(2 * found.products)
