"""Train 2n steps; go on at n from the checkpoint; the second half must be the same, bit for bit.

Answers: losses that shift on resume (torchtitan 809, 1136; nanotron 245; GPT-NeoX 843), loader state that is lost
(torchtitan 816, accelerate 2823).
"""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ponder_scale.checkpoint import find
from ponder_scale.parts import Parts
from tests.ranks import run_ranks
from tests.train.test_loop import STEPS, assert_same_run, overrides, records, train_on_a_rank

HALF = STEPS // 2


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    """Every stage and precision, with accumulation; most of them with a random number of pondering steps,
    half of them in the middle of a ramp of the batch."""
    engines = list(product((0, 1, 2, 3), ("fp32", "bf16")))
    settings = {}
    for number, (stage, precision) in enumerate(engines):
        settings[stage, precision] = [f"train.deepspeed=zero{stage}", f"train.precision={precision}"]
        if number not in (0, 3):
            settings[stage, precision] += ["train.pondering.schedule=uniform", "train.pondering.low=0"]
        if number in (0, 3, 5, 6):  # batches of 2, 4, 6 and 8 sequences
            settings[stage, precision] += ["train.micro_batch=1", "train.batch_ramp_from=2", "train.batch_ramp_steps=4"]
    whole = [
        overrides(tmp_path / f"whole{stage}{precision}", shards, *settings[stage, precision])
        for stage, precision in engines
    ]
    assert run_ranks(train_on_a_rank, [{"overrides": case} for case in whole]) == [["done", "done"]] * len(engines)
    resumed = []
    for stage, precision in engines:
        run_dir = tmp_path / f"half{stage}{precision}"
        shutil.copytree(tmp_path / f"whole{stage}{precision}", run_dir)
        for step in range(HALF + 1, STEPS + 1):
            shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")
        resumed.append(overrides(run_dir, shards, *settings[stage, precision]))
    assert run_ranks(train_on_a_rank, [{"overrides": case} for case in resumed]) == [["done", "done"]] * len(engines)
    for stage, precision in engines:
        run_dir, reference = (tmp_path / f"{kind}{stage}{precision}" for kind in ("half", "whole"))
        steps = [line["step"] for line in records(run_dir) if line["event"] == "step"]
        assert steps == list(range(1, STEPS + 1)), (stage, precision)
        assert_same_run(run_dir, reference)
        assert_same_state(find(run_dir), find(reference))
        assert resumed_from(run_dir) == [None, f"step-{HALF:08d}"]  # it did go on, and did not begin anew


def resumed_from(run_dir: Path) -> list[str | None]:
    """The checkpoint from which each attempt of a run went on."""
    return [json.loads(line)["resumed_from"] for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


def assert_same_state(folder: Path, reference: Path) -> None:
    """Weights and optimizer states of two checkpoints are the same bits, however they are cut over ranks."""
    got, expected = Parts(folder), Parts(reference)
    assert got.table.keys() == expected.table.keys()
    for key in expected.table:
        kind, name = key.split("/", 1)
        assert got.kinds(name) == ["exp_avg", "exp_avg_sq", "weight"]
        length = max(stretch.begin + stretch.length for stretch in expected.table[key])
        tensors = [torch.empty(length) for _ in range(2)]
        for parts, tensor in zip((got, expected), tensors, strict=True):
            parts.read(kind, name, 0, tensor)
        assert torch.equal(*tensors), key
