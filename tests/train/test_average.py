"""The running average of the weights: right under every stage, resumed bit for bit, exported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.errors import CheckpointError
from ponder_scale.weights import read_weights
from tests.ranks import run_ranks
from tests.train.test_loop import STEPS, overrides, train_on_a_rank


def saved(run_dir: Path, step: int, *, average: bool = False) -> dict[str, torch.Tensor]:
    return dict(read_weights(run_dir / "checkpoints" / f"step-{step:08d}", average=average))


def test_the_average_is_that_of_the_weights_in_every_stage_and_survives_a_resume(shards: Any, tmp_path: Path) -> None:
    cases = [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")]
    runs = {}
    for stage, precision in cases:
        settings = [f"train.deepspeed=zero{stage}", "optim.ema=0.3", f"train.precision={precision}"]
        runs[stage, precision] = overrides(tmp_path / f"{stage}{precision}", shards, *settings)
    assert run_ranks(train_on_a_rank, [{"overrides": run} for run in runs.values()]) == [["done", "done"]] * len(cases)
    final = {}
    for stage, precision in cases:
        run_dir = tmp_path / f"{stage}{precision}"
        expected = saved(run_dir, 1)
        for step in range(2, STEPS + 1):
            decay = min(0.3, (1 + step) / (10 + step))
            for name, weight in saved(run_dir, step).items():
                expected[name] = decay * expected[name] + (1 - decay) * weight
        final[stage, precision] = saved(run_dir, STEPS, average=True)
        for name, average in final[stage, precision].items():
            torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(average, expected[name]) for name, average in saved(run_dir, STEPS).items())
        for step in range(STEPS // 2 + 1, STEPS + 1):
            shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")
    assert run_ranks(train_on_a_rank, [{"overrides": run} for run in runs.values()]) == [["done", "done"]] * len(cases)
    for (stage, precision), averages in final.items():
        again = saved(tmp_path / f"{stage}{precision}", STEPS, average=True)
        assert all(torch.equal(again[name], average) for name, average in averages.items()), (stage, precision)


def test_a_run_without_an_average_says_so(shards: Any, tmp_path: Path) -> None:
    run = overrides(tmp_path, shards, "train.steps=1", "optim.warmup_steps=0")
    assert run_ranks(train_on_a_rank, [{"overrides": run}], world_size=1) == [["done"]]
    with pytest.raises(CheckpointError, match=r"no average of the weights; train with optim\.ema"):
        saved(tmp_path, 1, average=True)
