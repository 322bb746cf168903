"""Train 2n steps; go on at n from the checkpoint; the second half must be the same, bit for bit.

Answers: losses that shift on resume (torchtitan 809, 1136; nanotron 245; GPT-NeoX 843), loader state that is lost
(torchtitan 816, accelerate 2823).
"""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from tests.train.resumes import SCHEDULES, check_resume
from tests.train.zero.gradients import POLICIES

RAMP = ["train.global_batch=8", "train.micro_batch=1", "train.batch_ramp_from=2", "train.batch_ramp_steps=4"]


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
