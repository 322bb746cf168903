"""Train 2n steps; go on at n from the checkpoint; the second half must be the same, bit for bit.

Answers: losses that shift on resume (torchtitan 809, 1136; nanotron 245; GPT-NeoX 843), loader state that is lost
(torchtitan 816, accelerate 2823).
"""

from __future__ import annotations

import shutil
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.checkpoint.save import find
from tests.ranks import run_ranks
from tests.train.runs import (
    STEPS,
    assert_same_run,
    assert_same_state,
    overrides,
    records,
    resumed_from,
    train_on_a_rank,
)
from tests.train.zero.gradients import POLICIES

HALF = STEPS // 2
SMALL = ["train.global_batch=4", "model.num_hidden_layers=1", "checkpoint.every_steps=2", "evaluate.sequences=2"]
RAMP = ["train.global_batch=8", "train.micro_batch=1", "train.batch_ramp_from=2", "train.batch_ramp_steps=4"]
SCHEDULES = {
    "fixed": [],
    "uniform": ["train.pondering.schedule=uniform", "train.pondering.low=0"],
    "ramp": ["train.pondering.schedule=ramp", "train.pondering.low=0", "train.pondering.ramp_steps=4"],
}


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    """Stages 0 to 2 in each precision; half of them accumulate, in the middle of a ramp of the batch."""
    check_resume(
        shards,
        tmp_path,
        [
            dict(zip(("deepspeed", "precision", "recompute", "schedule", "more"), (*engine, *values), strict=True))
            for engine, *values in zip(
                product(("zero0", "zero1", "zero2"), ("fp32", "bf16")),
                ("pass", "selective", "none", "layer", "pass+layer", "selective"),
                ("fixed", "uniform", "ramp", "fixed", "uniform", "ramp"),
                (RAMP, [], [], RAMP, [], RAMP),
                strict=True,
            )
        ],
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_stage_3_is_resumed_bit_for_bit_whatever_is_recomputed(ranks: int, shards: Any, tmp_path: Path) -> None:
    """A loaded engine has gathered other weights than one that has trained; so has one whose passes have changed."""
    cases = pairwise(
        {
            "recompute": POLICIES,
            "deepspeed": ("zero3", "zero3_bounded", "zero3_keep_gathered"),
            "schedule": tuple(SCHEDULES),
            "precision": ("fp32", "bf16"),
        }
    )
    # selective, which alone counts operations, on one rank and on two; the other policies by turns
    mine = [case for number, case in enumerate(cases) if case["recompute"] == "selective" or number % 2 == ranks % 2]
    check_resume(shards, tmp_path, mine, ranks)


def check_resume(shards: Any, folder: Path, cases: list[dict[str, Any]], ranks: int = 2) -> None:
    """Each case trained to the end, and again from its middle: the same records, weights and states."""
    settings = [
        [
            *(f"train.{key}={case[key]}" for key in ("deepspeed", "recompute", "precision")),
            *SCHEDULES[case["schedule"]],
            *SMALL,
            *case.get("more", ()),
        ]
        for case in cases
    ]
    whole = [overrides(folder / f"whole{number}", shards, *more) for number, more in enumerate(settings)]
    done = [["done"] * ranks] * len(cases)
    trained = run_ranks(train_on_a_rank, [{"overrides": case} for case in whole], ranks)
    assert trained == done, [(case, got) for case, got in zip(cases, trained, strict=True) if got != done[0]]
    resumed = []
    for number, more in enumerate(settings):
        run_dir = folder / f"half{number}"
        shutil.copytree(folder / f"whole{number}", run_dir)
        shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:08d}")
        resumed.append(overrides(run_dir, shards, *more))
    again = run_ranks(train_on_a_rank, [{"overrides": case} for case in resumed], ranks)
    assert again == done, [(case, got) for case, got in zip(cases, again, strict=True) if got != done[0]]
    for number, case in enumerate(cases):
        run_dir, reference = (folder / f"{kind}{number}" for kind in ("half", "whole"))
        steps = [line["step"] for line in records(run_dir) if line["event"] == "step"]
        assert steps == list(range(1, STEPS + 1)), case
        assert_same_run(run_dir, reference)
        assert_same_state(find(run_dir), find(reference))
        assert resumed_from(run_dir) == [None, f"step-{HALF:08d}"]  # it did go on, and did not begin anew


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few combinations that hold each pair of values of any two factors."""
    every = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]

    def pairs(case: dict[str, Any]) -> set[Any]:
        return set(combinations(case.items(), 2))

    missing, chosen = set().union(*map(pairs, every)), []
    while missing:
        chosen.append(max(every, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen
