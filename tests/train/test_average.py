"""The running average of the weights: right under every stage, resumed bit for bit, exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.checkpoint.find import read_state
from ponder_scale.checkpoint.parts import AVERAGE, Parts
from ponder_scale.checkpoint.weights import read_weights
from ponder_scale.errors import CheckpointError
from ponder_scale.export.card import trained_card
from ponder_scale.export.huggingface import export
from tests.checkpoint.sealing import rewrite_state
from tests.ranks import run_ranks
from tests.train.runs import STEPS, overrides, train_on_a_rank


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


def averaged(run_dir: Path, steps: list[int], decay: Callable[[int], float]) -> dict[str, torch.Tensor]:
    """The average of the weights after these steps, the first of which it begins with; `decay`: by their number."""
    expected = saved(run_dir, steps[0])
    for number, step in enumerate(steps[1:], 2):
        for name, weight in saved(run_dir, step).items():
            expected[name] = decay(number) * expected[name] + (1 - decay(number)) * weight
    return expected


def assert_average(run_dir: Path, step: int, expected: dict[str, torch.Tensor]) -> None:
    for name, average in saved(run_dir, step, average=True).items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)


def test_an_average_begins_ends_and_begins_anew_where_optim_ema_is_changed(shards: Any, tmp_path: Path) -> None:
    """Off to 2, on to 5, off to 6, on to 8, with a larger decay to 9, then on other ranks under another stage to 10."""
    base = overrides(tmp_path / "run", shards, "evaluate.sequences=1")
    legs = [(1, 2, "null"), (1, 5, "0.9"), (1, 6, "null"), (1, 8, "0.15"), (1, 9, "0.9"), (2, 10, "0.9")]
    for ranks, steps, ema in legs:
        stage = "zero3" if ranks == 2 else "zero1"
        case = [*base, f"train.steps={steps}", f"optim.ema={ema}", f"train.deepspeed={stage}"]
        assert run_ranks(train_on_a_rank, [{"overrides": case}], world_size=ranks) == [["done"] * ranks]
    run_dir = tmp_path / "run"

    def short(number: int) -> float:
        return (1 + number) / (10 + number)  # 0.25, 0.308, ...: an average of few steps forgets its beginning soon

    assert_average(run_dir, 5, averaged(run_dir, [3, 4, 5], short))
    for step in (1, 2, 6):
        with pytest.raises(CheckpointError, match=r"no average of the weights; train with optim\.ema"):
            saved(run_dir, step, average=True)
        kinds = {key.split("/")[0] for key in Parts(run_dir / "checkpoints" / f"step-{step:08d}").table}
        assert AVERAGE not in kinds  # nothing frozen is carried along
    assert_average(run_dir, 8, averaged(run_dir, [7, 8], lambda number: 0.15))
    grown = averaged(run_dir, [7, 8, 9], lambda number: 0.15 if number == 2 else short(number))
    assert_average(run_dir, 9, grown)
    last = saved(run_dir, 10)
    assert_average(run_dir, 10, {name: short(4) * grown[name] + (1 - short(4)) * last[name] for name in last})
    states = [read_state(run_dir / "checkpoints" / f"step-{step:08d}") for step in (5, 10)]
    cards = [trained_card("x", state, None, 1, None, average=True) for state in states]
    assert "running average over steps 3 to 5, decay 0.9" in cards[0]
    assert "running average over steps 7 to 10, decay 0.9" in cards[1]


def test_a_frozen_average_of_an_older_version_is_neither_exported_nor_taken_up(shards: Any, tmp_path: Path) -> None:
    """It was saved on while optim.ema was off."""
    base = overrides(tmp_path, shards, "optim.ema=0.9", "evaluate.sequences=1")
    assert run_ranks(train_on_a_rank, [{"overrides": [*base, "train.steps=3"]}], world_size=1) == [["done"]]
    folder = tmp_path / "checkpoints" / "step-00000003"

    def older(state: dict[str, Any]) -> None:
        state["config"]["optim"]["ema"] = None
        del state["average"]

    rewrite_state(folder, older)
    with pytest.raises(CheckpointError, match=r"no average of the weights; train with optim\.ema"):
        export(folder, tmp_path / "out", average=True)
    assert run_ranks(train_on_a_rank, [{"overrides": [*base, "train.steps=5"]}], world_size=1) == [["done"]]
    assert_average(tmp_path, 5, averaged(tmp_path, [4, 5], lambda number: 0.25))


def test_an_average_of_an_older_version_goes_on(shards: Any, tmp_path: Path) -> None:
    base = overrides(tmp_path, shards, "optim.ema=0.9", "evaluate.sequences=1")
    assert run_ranks(train_on_a_rank, [{"overrides": [*base, "train.steps=2"]}], world_size=1) == [["done"]]
    rewrite_state(tmp_path / "checkpoints" / "step-00000002", lambda state: state.pop("average"))
    assert run_ranks(train_on_a_rank, [{"overrides": [*base, "train.steps=3"]}], world_size=1) == [["done"]]
    assert_average(tmp_path, 3, averaged(tmp_path, [1, 2, 3], lambda number: (1 + number) / (10 + number)))
