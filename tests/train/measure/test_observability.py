"""What a run on two ranks lets its owner see: communication, profiles, held-out losses by source.

Answers: evaluation that is missing or differs from that of the checkpoint (torchtitan 883, 1470; nanotron 79).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.evaluate.perplexity import trajectory
from ponder_scale.runs.records import METRICS, read
from ponder_scale.settings import load
from ponder_scale.train.measure.profiling import communication_share
from tests.ranks import run_ranks
from tests.train.runs import SHAPE, tokenized_shards, train_on_a_rank


def test_a_run_is_measured_profiled_and_evaluated_by_source_as_its_checkpoints_are(
    tiny_shards: Any, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    sources = {
        "code": tokenized_shards(tiny_shards, tiny_tokenizer, seed=1, heldout=(400,)),
        "web": tokenized_shards(tiny_shards, tiny_tokenizer, seed=2, heldout=(150,)),
    }
    run_dir = tmp_path / "run"
    overrides = [
        *(f"run_dir={run_dir}", *(f"data.sources.{name}.path={folder}" for name, folder in sources.items())),
        *(*SHAPE, "train.steps=4", "train.precision=fp32"),
        *("evaluate.every_steps=2", "evaluate.sequences=20", "checkpoint.every_steps=2", "optim.z_loss=1e-3"),
        *("log.communication=true", "log.profile_steps=[2,3]", "log.profile_ranks=[1]"),
    ]
    assert run_ranks(train_on_a_rank, [{"overrides": overrides}]) == [["done", "done"]]
    records = list(read(run_dir / METRICS))
    steps = {line["step"]: line for line in records if line["event"] == "step"}
    assert all(0.0 < steps[step]["communication_share"] < 1.0 for step in (1, 2, 3, 4))  # rank 0 is not profiled
    assert all(line["z_loss"] > 0 and line["loss"] == line["pass_losses"][-1] for line in steps.values())
    # what the run found of each source is what its checkpoints have
    found = {line["step"]: line for line in records if line["event"] == "evaluation"}
    swept = trajectory(run_dir, sources, sequences=20)
    assert found.keys() == swept.keys() == {2, 4}
    for step, line in found.items():
        assert line["sources"].keys() == {"code", "web"}
        for name, held_out in line["sources"].items():
            assert held_out["losses"] == pytest.approx(swept[step].sources[name].losses, rel=1e-5)
            same = swept[step].sources[name]
            assert (held_out["tokens"], held_out["bytes"]) == (same.tokens, same.bytes) and same.bytes
            assert held_out["bits_per_byte"] == pytest.approx(same.bits_per_byte, rel=1e-5)
        assert line["losses"] == pytest.approx(swept[step].sources["all"].losses, rel=1e-5)
        assert line["bits_per_byte"] == pytest.approx(swept[step].sources["all"].bits_per_byte, rel=1e-5)
    (trace,) = (run_dir / "profile").iterdir()
    assert trace.name == "rank-00001-steps-2-3.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name == "aten::embedding" for name in names) >= 2 and any("gloo:" in name for name in names)


def event(name: str, start: float, end: float, device: Any = torch.autograd.DeviceType.CPU) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)


def test_the_share_of_communication_counts_each_moment_of_the_step_once() -> None:
    events = [
        event("step", 100.0, 200.0),
        event("gloo:all_gather", 90.0, 110.0),  # its second half
        event("gloo:all_gather", 120.0, 140.0),
        event("gloo:reduce_scatter", 130.0, 150.0),
        event("gloo:barrier", 135.0, 138.0),
        event("aten::mm", 150.0, 200.0),
        event("gloo:all_reduce", 195.0, 260.0),
    ]
    assert communication_share(events) == pytest.approx(0.45)
    assert communication_share(events[1:]) is None


@pytest.mark.parametrize("steps", ["[3]", "[0,4]", "[5,4]"])
def test_profile_steps_that_are_no_range_are_refused(steps: str) -> None:
    fixed = ["run_dir=x", "data.sources.a.path=x", "train.steps=9", "train.global_batch=1"]
    with pytest.raises(ConfigError, match=r"log.profile_steps is .*; expected \[first, last\]"):
        load(RunConfig, None, [*fixed, f"log.profile_steps={steps}"])
