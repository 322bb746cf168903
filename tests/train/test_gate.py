"""A step that is not accepted leaves no trace, for every stage and precision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.errors import ConfigError
from ponder_scale.train.deepspeed_config import read_sharding
from tests.ranks import run_ranks
from tests.train.test_gradients import make_model, run_config, small_buckets

SMALLEST = ["model.pondering_steps=1", "model.num_hidden_layers=1"]


def state(engine: Any) -> list[torch.Tensor]:
    """Copies of all that an update changes on this rank: weights, master weights, moments, averages."""
    optimizer = engine.deepspeed.optimizer
    tensors = [getattr(p, "ds_tensor", p).data for p in engine.module.parameters()]
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        tensors += list(getattr(optimizer, name, []))
    tensors += [tensor for group in getattr(optimizer, "fp32_groups", []) for tensor in group]
    moments = engine.deepspeed.basic_optimizer.state.values()
    tensors += [value for entry in moments for value in entry.values() if torch.is_tensor(value)]
    return [tensor.detach().clone() for tensor in tensors]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def train(case: dict[str, Any], steps: str) -> tuple[list[Any], Any, list[float]]:
    """Steps of an engine: g(ood), n (nan in the second micro-batch of rank 1), r(ejected by its norm)."""
    from ponder_scale.train import engine as module

    config = run_config({**case, "overrides": [*SMALLEST, *case.get("overrides", [])]})
    torch.manual_seed(0)
    engine = module.Engine(make_model(config), config)
    engine.set_learning_rate(1e-2)
    states, norms, good = [], [], 0
    for kind in steps:
        good += kind == "g"
        for micro_step in range(engine.micro_steps):
            tokens = (torch.arange(25) * (1 + good) + micro_step + 7 * engine.rank).view(1, 25) % 96
            loss = engine.forward(tokens[:, :-1], tokens[:, 1:]).loss
            if kind == "n" and micro_step == 1 and engine.rank == 1:
                loss = loss * math.nan
            engine.backward(loss)
        norms.append(engine.step((lambda norm: False) if kind == "r" else None))
        engine.average_weights(good)
        states.append(state(engine))
    return states, engine, norms


def skip_on_a_rank(case: dict[str, Any]) -> dict[str, Any]:
    from deepspeed.runtime.zero import parameter_offload

    from ponder_scale.train import engine as module

    module.init_distributed()
    torch.set_num_threads(1)
    steps = "ngrngg"
    states, engine, norms = train(case, steps)
    parameter_offload.FWD_MODULE_STACK.clear()  # of this process, and the next engine's now
    never, _, clean = train(case, "ggg")
    return {
        "unchanged": all(equal(states[at], states[at - 1]) for at in (2, 3)),
        "changed": not equal(states[1], states[0]) and not equal(states[4], states[3]),
        "as without": [equal(states[at], never[good]) for good, at in enumerate((1, 4, 5))],
        "finite": [math.isfinite(norm) for norm in norms],
        "norms": [norms[at] for at in (1, 4, 5)] == clean,
        "micro-steps": engine.deepspeed.micro_steps == len(steps) * engine.micro_steps,
    }


def test_a_step_that_is_not_accepted_leaves_no_trace(tmp_path: Path) -> None:
    cases = []
    for stage in range(4):
        (tmp_path / str(stage)).mkdir()
        sharding = small_buckets(tmp_path / str(stage), stage)
        cases += [{"deepspeed": sharding, "policy": "pass", "tied": stage == 2, "precision": "fp32"}]
        usual = {"deepspeed": sharding, "policy": "pass", "tied": False, "precision": "bf16"}
        cases += [{**usual, "overrides": ["optim.ema=0.5"]}]
    cases += [{**usual, "deepspeed": "zero3"}]  # persistent parameters
    accumulated = tmp_path / "fp32.json"
    accumulated.write_text('{"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}')
    cases += [{**cases[-1], "deepspeed": str(accumulated)}]
    muon = ["optim.optimizer=muon", "optim.muon_lr=0.02", "optim.grad_clip=null"]
    cases += [{**cases[-1], "deepspeed": sharding, "overrides": muon}]
    for case, ranks in zip(cases, run_ranks(skip_on_a_rank, cases), strict=True):
        for rank in ranks:
            assert rank == {
                "unchanged": True,
                "changed": True,
                "as without": [True] * 3,
                "finite": [False, True, True, False, True, True],
                "norms": True,
                "micro-steps": True,
            }, case


def test_a_sharding_without_the_norm_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "blind.json"
    path.write_text('{"zero_optimization": {"stage": 1, "compute_grad_norm": false}}')
    with pytest.raises(ConfigError, match=r"blind\.json: zero_optimization\.compute_grad_norm is refused"):
        read_sharding(str(path))
