"""Runs that are interrupted in the middle and go on: bit for bit what they would have been."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ponder_scale.checkpoint.find import find
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

HALF = STEPS // 2
SMALL = ["train.global_batch=4", "model.num_hidden_layers=1", "checkpoint.every_steps=2", "evaluate.sequences=2"]
SCHEDULES = {
    "fixed": [],
    "uniform": ["train.pondering.schedule=uniform", "train.pondering.low=0"],
    "ramp": ["train.pondering.schedule=ramp", "train.pondering.low=0", "train.pondering.ramp_steps=4"],
}


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
