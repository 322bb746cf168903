"""Signs that pondering has collapsed are told at the bounds that the documents name, once, and not before step 200."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ponder_scale.config import RunConfig
from ponder_scale.settings import load
from ponder_scale.train.survive.alarms import CollapseAlarms

VOCABULARY = 50
UNIFORM = math.log(VOCABULARY)
FIRST, LOGGED = 200, 5  # as the documents have them


def alarms_of(*overrides: str) -> CollapseAlarms:
    fixed = ["run_dir=unused", "data.sources.any.path=unused", "train.steps=1000", "train.global_batch=4"]
    return CollapseAlarms(load(RunConfig, None, [*fixed, *overrides]), VOCABULARY)


def means(kls: list[float], entropies: list[float], last: float = 1.0) -> dict[str, list[float]]:
    return {"pass_kls": kls, "pass_entropies": [*entropies, last]}


WORKING = means([0.35, 0.2], [2.0, 2.0])


@pytest.mark.parametrize(
    ("kind", "sign", "none"),
    [
        ("pondering_idle", means([9.9e-6, 1e-7], [2.0, 2.0]), means([1.01e-5, 1e-7], [2.0, 2.0])),
        ("pondering_idle", means([1e-7, 9.9e-6], [2.0, 2.0]), means([1e-7, 1.01e-5], [2.0, 2.0])),
        (
            "pondering_uniform",
            means([0.3, 0.3], [0.981 * UNIFORM, UNIFORM]),
            means([0.3, 0.3], [0.979 * UNIFORM, UNIFORM], UNIFORM),
        ),
        (
            "pondering_uniform",
            means([0.3, 0.3], [UNIFORM, 0.981 * UNIFORM]),
            means([0.3, 0.3], [UNIFORM, 0.979 * UNIFORM], UNIFORM),
        ),
    ],
)
def test_a_collapse_is_told_once_while_it_lasts(kind: str, sign: dict[str, Any], none: dict[str, Any]) -> None:
    alarms = alarms_of()
    told = [step for step in range(1, 260) for _ in alarms.of(step, sign)]
    assert told == [204]  # the fifth logged step in a row from 200 on
    assert alarms.of(1000, none) == []
    again = [(step, alarm) for step in range(1001, 1050) for alarm in alarms.of(step, sign)]
    assert [(step, alarm["kind"]) for step, alarm in again] == [(1005, kind)] and "pondering" in again[0][1]["message"]
    healthy = alarms_of()
    assert not any(healthy.of(step, none) for step in range(1, 2000))


def test_a_sign_that_goes_away_begins_anew() -> None:
    alarms, sign = alarms_of(), means([1e-7, 1e-7], [2.0, 2.0])
    told = [step for step in range(FIRST, FIRST + 40) for _ in alarms.of(step, WORKING if step % LOGGED == 0 else sign)]
    assert told == []


def test_while_the_learning_rate_warms_up_there_is_no_alarm() -> None:
    alarms, sign = alarms_of("optim.warmup_steps=300"), means([1e-7, 1e-7], [2.0, 2.0])
    assert [step for step in range(1, 400) for _ in alarms.of(step, sign)] == [304]


def test_steps_without_pondering_neither_give_nor_clear_an_alarm() -> None:
    alarms, sign = alarms_of(), means([1e-7, 1e-7], [2.0, 2.0])
    vanilla = {"pass_kls": [], "pass_entropies": [3.9]}
    told = [step for step in range(FIRST, FIRST + 20) for _ in alarms.of(step, sign if step % 2 else vanilla)]
    assert told == [209]
