"""The sanity step finds what cannot work in the first minute, and leaves no trace where all is well."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.settings import load
from tests.faults import Fault
from tests.ranks import run_ranks
from tests.train.runs import assert_same_run, overrides


def train_in_trouble(case: dict[str, Any]) -> int:
    """Train with a limit on the size of files (`file_bytes`), a device too small (`memory`), or weights of nan."""
    from ponder_scale.train import loop
    from ponder_scale.train.zero.engine import Engine

    torch.set_num_threads(1)
    if "file_bytes" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_bytes"], resource.RLIM_INFINITY))
    forward, calls = Engine._forward, []

    def sick(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if case.get("memory") == len(calls):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        output = forward(self, *arguments, **options)
        if case.get("nan"):
            output.loss = output.loss * math.nan
        return output

    Engine._forward = sick  # type: ignore[method-assign]
    return loop.train(load(RunConfig, None, case["overrides"]))


def test_a_run_with_a_sanity_step_is_the_run_without_it_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    engines = [
        ("zero0", "fp32", "fixed"),
        ("zero0", "bf16", "fixed"),
        ("zero1", "bf16", "fixed"),
        ("zero2", "fp32", "uniform"),
        ("zero3", "bf16", "uniform"),
    ]
    cases = []
    for number, (sharding, precision, schedule) in enumerate(engines):
        settings = [f"train.deepspeed={sharding}", f"train.precision={precision}", "checkpoint.every_steps=null"]
        settings += [f"train.pondering.schedule={schedule}", "train.steps=3"]
        if number % 2:
            settings += ["train.batch_ramp_from=4", "train.batch_ramp_steps=3"]
        for sanity in ("true", "false"):
            run_dir = tmp_path / f"{sanity}{number}"
            cases.append({"overrides": overrides(run_dir, shards, *settings, f"train.sanity_step={sanity}")})
    results = run_ranks(train_in_trouble, cases)
    assert results == [[0, 0]] * len(cases), results
    for number in range(len(engines)):
        assert_same_run(tmp_path / f"true{number}", tmp_path / f"false{number}")
        assert [path.name for path in (tmp_path / f"true{number}" / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.faults
def test_what_cannot_work_fails_before_the_first_step_and_says_what(shards: Any, tmp_path: Path, fault: Fault) -> None:
    troubles: list[tuple[dict[str, Any], str]] = [
        ({"file_bytes": 20_000}, "a checkpoint cannot be saved in "),
        ({"memory": 2}, "has not enough memory for a step (CUDA out of memory. Tried to allocate 2.00 GiB); lower"),
        ({"nan": True}, "the initial weights give loss nan"),
    ]
    cases = [
        {**trouble, "overrides": overrides(tmp_path / str(number), shards, "train.sanity_step=true")}
        for number, (trouble, _) in enumerate(troubles)
    ]
    for number, ranks in enumerate(run_ranks(train_in_trouble, cases)):
        for rank in ranks:
            assert troubles[number][1] in rank["error"], rank
        metrics = tmp_path / str(number) / "metrics.jsonl"
        assert not metrics.exists() or '"event":"step"' not in metrics.read_text()
    for injected in ("no space for a checkpoint", "not enough memory", "initial weights give nan"):
        fault(injected, "before step 1", detected="by the sanity step", after="told in one line", lost="nothing")
