"""Runs whose tokens learn to halt: what is recorded and refused, and how such a run is resumed and exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.train.optim import parameter_groups
from ponder_scale.train.schedules import halting_loss
from tests.model.architectures import make
from tests.ranks import run_ranks
from tests.train.resumes import check_resume
from tests.train.runs import overrides, records, train_on_a_rank

GATE = ["model.halting=gate", "train.halting.warmup_steps=0"]
EXIT = ["model.halting=exit", "train.pass_losses=exit"]


def test_the_share_rises_linearly_to_its_value(shards: Any, tmp_path: Path) -> None:
    more = ["train.halting.weight=0.3", "train.halting.share=0.2", "train.halting.warmup_steps=4"]
    config = load(RunConfig, None, overrides(tmp_path, shards, "model.halting=gate", *more))
    found = [halting_loss(step, config) for step in (1, 2, 4, 9)]
    assert found == [(0.3, 0.05), (0.3, 0.1), (0.3, 0.2), (0.3, 0.2)]
    assert halting_loss(1, load(RunConfig, None, overrides(tmp_path, shards))) is None


def test_a_run_learns_to_halt_the_share_that_it_is_asked_for(shards: Any, tmp_path: Path) -> None:
    """With a weight that leaves no choice, half of the pondering ends; the plain loss is recorded beside it."""
    more = ["train.halting.weight=100", "train.halting.share=0.5", "optim.lr=6e-2", "optim.warmup_steps=0"]
    settings = overrides(tmp_path, shards, *GATE, *more, "train.steps=24", "log.every_steps=1")
    assert run_ranks(train_on_a_rank, [{"overrides": settings}], 1) == [["done"]]
    steps = [line for line in records(tmp_path) if line["event"] == "step"]
    assert all(len(line["pass_shares"]) == line["pondering_steps"] + 1 for line in steps)
    assert steps[0]["pass_shares"] == [1.0] * len(steps[0]["pass_shares"])
    assert steps[0]["halting_loss"] > 50 and steps[-1]["halting_loss"] < 1
    pondered = sum(steps[-1]["pass_shares"][1:]) / steps[-1]["pondering_steps"]
    assert pondered < 0.7
    assert all(line["loss"] == line["pass_losses"][-1] for line in steps)


def test_a_run_with_gates_is_resumed_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    case = {"deepspeed": "zero3", "precision": "bf16", "recompute": "pass", "schedule": "uniform"}
    check_resume(shards, tmp_path, [{**case, "more": more} for more in (GATE, EXIT)])


def test_a_run_with_exits_trains_the_expected_loss_and_is_evaluated_as_it_halts(shards: Any, tmp_path: Path) -> None:
    settings = overrides(tmp_path, shards, *EXIT, "model.halting_threshold=0.999", "evaluate.every_steps=2")
    assert run_ranks(train_on_a_rank, [{"overrides": settings}], 1) == [["done"]]
    lines = records(tmp_path)
    step = next(line for line in lines if line["event"] == "step")
    steps = step["pondering_steps"]
    assert step["pass_shares"] == pytest.approx([(1 / (1 + math.exp(-4.0))) ** index for index in range(steps + 1)])
    assert step["halting_loss"] != 0
    evaluated = next(line for line in lines if line["event"] == "evaluation")["losses"]
    assert len(set(evaluated)) == 1, "every token halts at once, so each pass has the loss of the first"


def test_muon_leaves_the_gates_to_adam(shards: Any, tmp_path: Path) -> None:
    muon = ["optim.optimizer=muon", "optim.muon_lr=1e-2", "optim.grad_clip=null"]
    config = load(RunConfig, None, overrides(tmp_path, shards, *GATE, *muon))
    model = make("llama", pondering_steps=2, halting="gate")
    gates = {id(weight) for weight in model.halting_gates.parameters()}
    groups = parameter_groups(model, config.optim)
    assert sum(id(weight) in gates for group in groups for weight in group["params"]) == len(gates) == 6
    assert not any(id(weight) in gates for group in groups if group["use_muon"] for weight in group["params"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.pondering.per=sequence", "train.pondering.per is sequence with model.halting gate: each decides"),
        ("train.pondering.backward_passes=1", "train.pondering.backward_passes is 1 with model.halting gate"),
        ("train.compile=true", "train.compile is true with model.halting gate, whose layers are not compiled"),
        ("model.halting_threshold=2", "model.halting_threshold"),
        ("model.halting=exit", "train.pass_losses is last with model.halting exit; the gates of exit learn by that"),
        ("train.pass_losses=exit", "train.pass_losses is exit with model.halting gate"),
    ],
)
def test_what_does_not_go_with_it_is_refused(setting: str, said: str, shards: Any, tmp_path: Path) -> None:
    extra = ["train.pondering.schedule=uniform"] if setting.endswith("sequence") else []
    with pytest.raises(ConfigError, match=said):
        load(RunConfig, None, overrides(tmp_path, shards, *GATE, *extra, setting))


@pytest.mark.slow
def test_the_planner_traces_it(shards: Any, tmp_path: Path) -> None:
    """Without values: the masks are fake, and what halted tokens keep is counted under every policy."""
    from ponder_scale.planning.activations import micro_batch
    from ponder_scale.setup.build import model_configuration

    peaks = {}
    for name, more in (("plain", []), ("halting", GATE)):
        for policy in ("none", "pass"):
            settings = overrides(tmp_path, shards, *more, f"train.recompute={policy}", "data.document_mask=true")
            config = load(RunConfig, None, settings)
            configuration = model_configuration(config.model, vocab_size=96, seq_len=config.data.seq_len, eod_id=0)
            peaks[name, policy] = micro_batch(config, configuration).alive.peak
    unit = 2 * config.model.num_hidden_layers * config.train.micro_batch_sequences * config.data.seq_len
    unit *= config.model.hidden_size * (2 if config.train.precision == "bf16" else 4)
    more = peaks["halting", "pass"] - peaks["plain", "pass"]
    # the caches of S + 1 passes, and what one of them is made from
    assert config.model.pondering_steps <= more / unit <= config.model.pondering_steps + 2.5, more / unit
