"""Runs whose passes learn: the weights of each step, what is recorded, what is evaluated, and how they are resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import RunConfig
from ponder_scale.settings import load
from ponder_scale.train.changes import Change, between
from ponder_scale.train.schedules import pass_weights, pondering_steps
from tests.ranks import run_ranks
from tests.train.resumes import check_resume
from tests.train.runs import overrides, records, train_on_a_rank, weights


def test_weights_by_hand() -> None:
    assert pass_weights(1, 3, "last", seed=7) is None
    assert pass_weights(1, 3, "uniform", seed=7) == (0.25, 0.25, 0.25, 0.25)
    assert pass_weights(1, 3, "linear", seed=7) == (0.1, 0.2, 0.3, 0.4)
    for name in ("uniform", "linear", "random"):
        assert pass_weights(1, 0, name, seed=7) == (1.0,)


def test_a_random_pass_is_drawn_by_step_and_seed_and_the_last_counts_for_half() -> None:
    drawn = [pass_weights(step, 4, "random", seed=7) for step in range(1, 2001)]
    assert drawn == [pass_weights(step, 4, "random", seed=7) for step in range(1, 2001)]
    assert drawn != [pass_weights(step, 4, "random", seed=8) for step in range(1, 2001)]
    assert all(sorted(one) == [0.0, 0.0, 0.0, 0.5, 0.5] and one[-1] == 0.5 for one in drawn if one)
    counts = [sum(one[index] > 0 for one in drawn if one) for index in range(4)]
    assert sum(counts) == 2000 and all(abs(count - 500) < 80 for count in counts)


@pytest.mark.parametrize("losses", ["last", "linear", "random"])
def test_a_run_records_what_it_trained_and_evaluates_the_last_pass(losses: str, shards: Any, tmp_path: Path) -> None:
    """The learned loss of step 1 is of the initial weights, so pass for pass it is that of any other run."""
    schedule = ["train.pondering.schedule=uniform", "train.pondering.low=0", "evaluate.every_steps=2"]
    runs = {}
    for name in ("last", losses):
        settings = overrides(tmp_path / name, shards, *schedule, f"train.pass_losses={name}")
        assert run_ranks(train_on_a_rank, [{"overrides": settings}], 1) == [["done"]]
        runs[name] = records(tmp_path / name)
    config = load(RunConfig, None, overrides(tmp_path, shards, *schedule))
    steps = [line for line in runs[losses] if line["event"] == "step"]
    for line in steps:
        drawn = pondering_steps(line["step"], config.model.pondering_steps, config.train.pondering, config.seed)
        assert len(line["pass_losses"]) == drawn + 1 and line["loss"] == line["pass_losses"][-1]
        chosen = pass_weights(line["step"], drawn, losses, config.seed)
        assert ("trained_loss" in line) == (chosen is not None)
        if chosen is not None:
            wanted = sum(weight * loss for weight, loss in zip(chosen, line["pass_losses"], strict=True))
            assert line["trained_loss"] == pytest.approx(wanted, rel=1e-12)
    assert steps[0]["pass_losses"] == runs["last"][0]["pass_losses"]
    (plain, mine) = (
        [line for line in runs[name] if line["event"] == "evaluation"][-1]["losses"] for name in ("last", losses)
    )
    assert len(plain) == len(mine) == config.model.pondering_steps + 1
    assert (plain == mine) == (losses == "last")


def test_a_run_of_which_all_passes_learn_is_resumed_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    case = {"deepspeed": "zero2", "precision": "bf16", "recompute": "pass", "schedule": "uniform"}
    check_resume(shards, tmp_path, [{**case, "more": ["train.pass_losses=random"]}])


def test_a_run_may_go_on_with_other_losses_and_says_so(shards: Any, tmp_path: Path) -> None:
    settings = overrides(tmp_path, shards, "optim.warmup_steps=0")
    for more in (["train.steps=2"], ["train.steps=4", "train.pass_losses=uniform"]):
        assert run_ranks(train_on_a_rank, [{"overrides": [*settings, *more]}], 1) == [["done"]]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    changes = [(line["key"], line["before"], line["after"]) for line in lines if line["event"] == "change"]
    assert ("train.pass_losses", "last", "uniform") in changes
    assert ["trained_loss" in line for line in lines if line["event"] == "step"] == [False, False, True, True]
    assert all(weight.isfinite().all() for weight in weights(tmp_path).values())


def test_a_checkpoint_from_before_the_key_was_there_had_its_default() -> None:
    before = {"config": {"train": {"steps": 2}}}
    for losses, told in (("last", []), ("uniform", [Change("train.pass_losses", None, "uniform")])):
        assert between(before, {"config": {"train": {"steps": 2, "pass_losses": losses}}}) == told
