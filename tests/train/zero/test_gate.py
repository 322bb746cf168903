"""A step that is not accepted leaves no trace, for every stage and precision."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.data.sequences import MicroBatch
from ponder_scale.errors import ConfigError
from ponder_scale.train.zero.deepspeed_config import read_sharding
from ponder_scale.train.zero.deepspeed_version import is_tested, refuse_wrong_version
from tests.faults import Fault
from tests.ranks import REPOSITORY, run_ranks
from tests.train.zero.gradients import make_model, run_config, small_buckets

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
    from ponder_scale.train.zero import engine as module

    config = run_config({**case, "overrides": [*SMALLEST, *case.get("overrides", [])]})
    torch.manual_seed(0)
    engine = module.Engine(make_model(config), config)
    engine.set_learning_rate(1e-2)
    states, norms, good = [], [], 0
    for kind in steps:
        good += kind == "g"
        for micro_step in range(engine.micro_steps):
            tokens = (torch.arange(25) * (1 + good) + micro_step + 7 * engine.rank).view(1, 25) % 96
            broken = torch.tensor(math.nan) if kind == "n" and micro_step == 1 and engine.rank == 1 else None
            engine.micro_step(MicroBatch(tokens, tokens[:, 1:], None), label_count=broken)
        norms.append(engine.update((lambda norm: False) if kind == "r" else None))
        engine.average_weights(good)
        states.append(state(engine))
    return states, engine, norms


def skip_on_a_rank(case: dict[str, Any]) -> dict[str, Any]:
    from deepspeed.runtime.zero import parameter_offload

    from ponder_scale.train.zero import engine as module

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


STAGE_3 = "zero.stage3.DeepSpeedZeroOptimizer_Stage3.step"
ASKS = [  # stage, precision, the method of DeepSpeed and the call in it that is our gate
    (3, "bf16", STAGE_3, "self", "_get_norm_groups"),
    (2, "bf16", "zero.stage_1_and_2.DeepSpeedZeroOptimizer.step", "self", "scaled_global_norm"),
    (1, "fp32", "zero.stage_1_and_2.DeepSpeedZeroOptimizer.step", "self", "scaled_global_norm"),
    (1, "fp32 gradients", "bf16_optimizer.BF16_Optimizer.step", "self", "get_grads_for_norm"),
    (0, "bf16", "fp16.unfused_optimizer.FP16_UnfusedOptimizer.step", "self.overflow_checker", "check"),
    (0, "fp32", "engine.DeepSpeedEngine._take_model_step", "self", "clip_fp32_gradients"),
]


def with_another_deepspeed(case: dict[str, Any]) -> str:
    """Steps under a DeepSpeed one of whose methods reads otherwise."""
    from ponder_scale.train.zero import engine as module

    module.init_distributed()
    torch.set_num_threads(1)
    path, kind, method = case["where"].rsplit(".", 2)
    holder = importlib.import_module(f"deepspeed.runtime.{path}")
    changed, made = getattr(holder, kind), {}
    decorated = getattr(changed, method)  # by a decorator of DeepSpeed's that hides what it decorates
    inner = [cell.cell_contents for cell in decorated.__closure__ or () if inspect.isfunction(cell.cell_contents)]
    source = textwrap.dedent(inspect.getsource(inner[0] if inner else decorated))
    assert case["line"] in source, f"{case['where']} is no longer what this test changes"
    exec(source.replace(case["line"], case["instead"]), holder.__dict__, made)
    setattr(changed, method, made[method])
    if "gone" in case:
        delattr(changed, case["gone"])
    train(case, case["steps"])
    return "went on"


@pytest.mark.faults
def test_a_deepspeed_that_does_not_ask_or_does_not_listen_is_told_at_once(tmp_path: Path, fault: Fault) -> None:
    cases = []
    for number, (stage, precision, where, owner, name) in enumerate(ASKS):
        accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if precision == "fp32 gradients" else {}
        sharding = tmp_path / f"{number}.json"
        sharding.write_text(json.dumps({"zero_optimization": {"stage": stage}, **accumulation}))
        case = {"deepspeed": str(sharding), "policy": "none", "tied": False, "where": where, "steps": "g"}
        case["precision"] = "fp32" if precision == "fp32" else "bf16"
        # the method of the class, whatever the object was given: as if it had another name
        cases.append({**case, "line": f"{owner}.{name}(", "instead": f"type({owner}).{name}({owner}, "})
    unchanged = [{**case, "instead": case["line"]} for case in cases]
    gone = {**unchanged[0], "gone": "_get_norm_groups"}
    deaf = {**cases[0], "line": "is_invalid_grad_norm(scaled_global_grad_norm)", "instead": "False"}
    results = run_ranks(with_another_deepspeed, [*cases, *unchanged, gone, {**deaf, "steps": "r"}, deaf], world_size=1)
    errors = [rank["error"] if rank != "went on" else rank for (rank,) in results]
    for case, error in zip(cases, errors, strict=False):
        assert "UserError: deepspeed 0." in error and "without asking whether" in error, (case, error)
    assert errors[len(cases) : 2 * len(cases)] == ["went on"] * len(cases)
    assert "has no _get_norm_groups at which to judge" in errors[-3]
    assert "made an update that was refused" in errors[-2]
    assert errors[-1] == "went on"
    fault("a DeepSpeed that does not ask at the gate", "step", detected="in the step", after="ended", lost="that step")


@pytest.mark.parametrize(
    ("version", "wrong"),
    [
        ("0.17.6", {(0, "bf16"), (2, "fp32"), (2, "bf16")}),
        ("0.18.2", {(0, "bf16"), (2, "fp32"), (2, "bf16")}),
        ("0.18.3", {(0, "bf16"), (2, "bf16")}),
        ("0.18.5+cu128", {(0, "bf16"), (2, "bf16")}),
        ("0.18.6", {(2, "bf16")}),
        ("0.19.3", {(2, "bf16")}),
        ("0.19.3.post1", {(2, "bf16")}),
        ("0.19.4", set()),
        ("0.19.8", set()),
        ("1.0", set()),
    ],
)
def test_versions_that_are_known_to_be_wrong_are_refused_where_they_are(version: str, wrong: set[Any]) -> None:
    refused = set()
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            try:
                refuse_wrong_version(version, stage, precision)
            except ConfigError as error:
                refused.add((stage, precision))
                assert str(error).startswith(f"deepspeed is {version}, which silently") and "\n" not in str(error)
                assert str(error).endswith("install deepspeed==0.19.8")
    assert refused == wrong


def start(version: str) -> list[str]:
    """What an engine under this version says about it."""
    import logging

    import deepspeed

    from ponder_scale.train.zero import engine as module

    module.init_distributed()
    deepspeed.__version__ = version
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    module.logger.addHandler(handler)
    config = run_config({"deepspeed": "zero2", "policy": "none", "tied": False, "precision": "bf16"})
    module.Engine(make_model(config), config)
    return [line for line in said if "deepspeed" in line]


def test_an_untested_version_is_named_once_and_a_wrong_one_does_not_start() -> None:
    assert is_tested("0.19.8+abc123") and not is_tested("0.19.80") and not is_tested("0.20.0rc1")
    tested, untested, wrong = run_ranks(start, ["0.19.8", "0.20.0", "0.19.1"])
    assert tested == [[], []]
    ((line,), nothing) = untested
    assert line.startswith("deepspeed 0.20.0 is not among the versions that were tested (0.19.8)") and nothing == []
    assert all("ConfigError: deepspeed is 0.19.1, which silently gets gradients" in rank["error"] for rank in wrong)


def test_what_is_installed_is_what_was_tested() -> None:
    (locked,) = re.findall(r"^deepspeed==(\S+)", (REPOSITORY / "requirements.lock").read_text(), flags=re.MULTILINE)
    assert is_tested(locked)
