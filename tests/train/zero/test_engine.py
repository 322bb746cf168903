"""What DeepSpeed gets wrong with shared passes, and that the engine cures or refuses it.

Answers: weights used outside their module, which ZeRO-3 leaves empty (DeepSpeed 846, 876; transformers 32021).
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import OptimConfig, PonderingSchedule, TrainConfig
from ponder_scale.data.sequences import MicroBatch
from ponder_scale.errors import ConfigError
from ponder_scale.files.shipped import DEEPSPEED_CONFIGS
from ponder_scale.setup.recompute import apply_recompute
from ponder_scale.train.launch import RANK_VARIABLES
from ponder_scale.train.optim import parameter_groups
from ponder_scale.train.schedules import learning_rate, pondering_steps
from ponder_scale.train.zero.deepspeed_config import deepspeed_config, read_sharding
from tests.ranks import run_ranks
from tests.train.zero.gradients import (
    POLICIES,
    check,
    in_plain_torch,
    make_model,
    on_a_rank,
    run_config,
    small_buckets,
    worst,
)

LEAST_MEMORY = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def live_weights(case: dict[str, Any]) -> dict[str, float]:
    """The largest share of the model's weights that was gathered at a time in forward and in backward."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from ponder_scale.train.zero import engine as module

    module.init_distributed()
    config = run_config(case)
    model = make_model(config)
    apply_recompute(model, config.train.recompute)
    if not case["cured"]:
        module.release_in_backward = lambda engine: None
    engine = module.Engine(model, config)
    parameters = list(engine.module.parameters())
    everything = sum(parameter.ds_numel for parameter in parameters)
    largest = {"forward": 0.0, "backward": 0.0}
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def watched(self: Any, submodule: Any, forward: bool) -> None:
        fetch(self, submodule, forward)
        live = sum(p.ds_numel for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)
        phase = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        largest[phase] = max(largest[phase], live / everything)

    PartitionedParameterCoordinator.fetch_sub_module = watched
    tokens = torch.arange(2 * 25).view(2, 25) % 96
    for _ in range(2):  # the second by the trace of the first
        for _ in range(engine.micro_steps):
            engine.micro_step(MicroBatch(tokens, tokens[:, 1:], None))
        engine.update()
    return largest


def test_weights_are_released_during_backward_under_every_policy(tmp_path: Path) -> None:
    deepspeed = small_buckets(tmp_path, 3, **LEAST_MEMORY)
    shape = ["model.num_hidden_layers=6", "model.pondering_steps=1", "train.micro_batch=2"]
    cases = [
        {"deepspeed": deepspeed, "policy": policy, "tied": False, "overrides": shape, "cured": cured}
        for policy, cured in [*((policy, True) for policy in POLICIES), ("none", False)]
    ]
    *cured, uncured = [ranks[0] for ranks in run_ranks(live_weights, cases)]
    for case, live in zip(cases, cured, strict=False):
        assert "error" not in live, live
        assert live["backward"] < 0.5, (case["policy"], live)
    assert uncured["backward"] > 0.95, "DeepSpeed releases weights in backward by itself now: remove the cure"


def processes_started(case: dict[str, Any]) -> int:
    """How many a rank starts while it trains."""
    import subprocess

    from ponder_scale.train.zero import engine as module

    module.init_distributed()
    config = run_config(case)
    engine, started = module.Engine(make_model(config), config), []
    popen = subprocess.Popen.__init__
    subprocess.Popen.__init__ = lambda *given, **more: (started.append(given), popen(*given, **more))[1]  # type: ignore[method-assign]
    tokens = torch.arange(25).view(1, 25) % 96
    for _ in range(engine.micro_steps):
        engine.micro_step(MicroBatch(tokens, tokens[:, 1:], None))
    engine.update()
    return len(started)


def test_a_step_starts_no_processes(tmp_path: Path) -> None:
    case = {"deepspeed": small_buckets(tmp_path, 3), "policy": "none", "tied": False}
    assert run_ranks(processes_started, [case]) == [[0, 0]]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_fp32_from_the_first_update(stage: int, tmp_path: Path) -> None:
    """A first update of 0.75 of its size, as DeepSpeed's stage 0 wrapper makes it, would show in the second loss."""
    case = {"deepspeed": small_buckets(tmp_path, stage), "policy": "pass", "tied": False, "precision": "bf16"}
    (ranks,) = run_ranks(on_a_rank, [case])
    expected = in_plain_torch({**case, "precision": "fp32"})
    assert ranks[0]["losses"] == pytest.approx(expected["losses"], abs=4e-3)
    assert ranks[0]["norms"] == pytest.approx(expected["norms"], rel=2e-2)
    if stage:
        assert worst(ranks[0]["gradients"], expected["gradients"]) < 5e-2


def test_offload_trains_as_without_it_also_while_the_batch_rises(tmp_path: Path) -> None:
    batches = ["train.global_batch=6", "train.batch_ramp_from=2", "train.batch_ramp_steps=3", "train.steps=3"]
    stage_2 = small_buckets(tmp_path, 2, offload_optimizer={"device": "cpu"})
    cases = [
        {"deepspeed": sharding, "policy": "pass", "tied": False, "overrides": batches}
        for sharding in ("zero3_offload", stage_2)
    ]
    check(cases, timeout=300.0)  # the first time, DeepSpeed compiles its CPU optimizer


def gathers(case: dict[str, Any]) -> list[list[int]]:
    """(pondering steps, all-gathers) of each optimizer step, with one trace a number of steps or without."""
    from deepspeed.comm.torch import TorchBackend

    from ponder_scale.train.zero import engine as module

    module.init_distributed()
    config = run_config(case)
    model = make_model(config)
    apply_recompute(model, config.train.recompute)
    engine = module.Engine(model, config)
    if not case["bank"]:
        engine._traces = None
    count = 0
    for name in ("all_gather_into_tensor", "all_gather", "all_gather_coalesced"):
        original = getattr(TorchBackend, name)

        def counted(*arguments: Any, original: Any = original, **options: Any) -> Any:
            nonlocal count
            count += 1
            return original(*arguments, **options)

        setattr(TorchBackend, name, counted)
    tokens, seen = torch.arange(25).view(1, 25) % 96, []
    for steps in case["steps"]:
        count = 0
        for _ in range(engine.micro_steps):
            engine.micro_step(MicroBatch(tokens, tokens[:, 1:], None), steps)
        engine.update()
        seen.append([steps, count])
    return seen


def test_a_changing_number_of_steps_keeps_the_prefetch_trace_of_each(tmp_path: Path) -> None:
    deepspeed = small_buckets(tmp_path, 3)
    steps = [3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]
    overrides = ["train.pondering.schedule=uniform", "train.global_batch=2"]
    case = {"deepspeed": deepspeed, "policy": "pass", "tied": False, "steps": steps, "overrides": overrides}
    with_bank, without = [ranks[0] for ranks in run_ranks(gathers, [{**case, "bank": True}, {**case, "bank": False}])]
    late = range(9, 12)  # each number has been seen three times by then
    assert [with_bank[i][0] for i in late] == [3, 1, 2]
    assert all(with_bank[i][1] <= 3 for i in late), with_bank
    assert all(without[i][1] > 20 for i in late), without


def disagree(case: Any) -> str:
    import os

    from ponder_scale.train.zero import engine as module

    module.init_distributed()
    config = run_config({"deepspeed": "zero0", "policy": "none", "tied": False})
    engine = module.Engine(make_model(config), config)
    engine.agree_on(2)
    engine.agree_on(1 + int(os.environ["RANK"]))
    return "went on"


def test_ranks_that_would_ponder_differently_stop() -> None:
    """The pain of deepspeedai/DeepSpeed#5006, #5648 and #6870: control flow that differs hangs under ZeRO-3."""
    (ranks,) = run_ranks(disagree, [None])
    assert all("ponders" in rank["error"] and "others 1 to 2" in rank["error"] for rank in ranks)


def test_pondering_steps_are_drawn_by_step_and_seed_and_ramp_up() -> None:
    uniform = PonderingSchedule("uniform", low=1)
    drawn = [pondering_steps(step, 4, uniform, seed=7) for step in range(1, 2001)]
    assert drawn == [pondering_steps(step, 4, uniform, seed=7) for step in range(1, 2001)]
    assert drawn != [pondering_steps(step, 4, uniform, seed=8) for step in range(1, 2001)]
    counts = [drawn.count(value) for value in range(6)]
    assert counts[0] == counts[5] == 0 and all(abs(count - 500) < 80 for count in counts[1:5])
    ramp = PonderingSchedule("ramp", low=1, ramp_steps=9)
    assert [pondering_steps(step, 4, ramp, seed=7) for step in (1, 2, 3, 6, 9, 100)] == [1, 1, 2, 3, 4, 4]
    assert pondering_steps(1, 4, PonderingSchedule(), seed=7) == 4


def with_environment(case: dict[str, str | None]) -> str:
    import os

    from ponder_scale.train.zero.engine import init_distributed

    for name, value in case.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    init_distributed()
    return f"{torch.distributed.get_rank()} of {torch.distributed.get_world_size()}"


def test_a_missing_rank_variable_is_refused_and_none_at_all_is_a_run_of_one() -> None:
    missing, alone = run_ranks(with_environment, [{"LOCAL_RANK": None}, dict.fromkeys(RANK_VARIABLES)], world_size=1)
    assert "not LOCAL_RANK; set all five or none" in missing[0]["error"]
    assert alone == ["0 of 1"]


def test_every_shipped_file_is_accepted() -> None:
    names = {path.stem for path in DEEPSPEED_CONFIGS.glob("*.json")}
    assert {"zero0", "zero1", "zero2", "zero3", "zero3_offload"} <= names
    for name in names:
        assert json.loads((DEEPSPEED_CONFIGS / f"{name}.json").read_text())["description"]
        assert "description" not in read_sharding(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {}}, "expected an object with zero_optimization"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; expected 0 to 3"),
        ({"zero_optimization": {"stage": 3}, "comms_loger": {}}, "unknown key comms_loger.*did you mean comms_logger"),
        ({"zero_optimization": {"stage": 3}, "bf16": {}}, "bf16 belongs to the recipe.*set train.precision"),
        ({"zero_optimization": {"stage": 3}, "gradient_clipping": 1}, "set optim.grad_clip"),
        ({"zero_optimization": {"stage": 3}, "activation_checkpointing": {}}, "refused: .*set train.recompute"),
        ({"zero_optimization": {"stage": 3}, "checkpoint": {"writer": {}}}, "checkpoint is refused"),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1}},
            "granularity_threshold is refused: leaf modules lose gradients",
        ),
    ],
)
def test_a_wrong_sharding_file_is_refused_by_name(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_sharding(str(path))


def test_a_sharding_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ConfigError, match=r"mine.json: cannot be read as JSON"):
        read_sharding(str(tmp_path / "mine.json"))
    with pytest.raises(ConfigError, match=r"train.deepspeed is zero9: no such file; .*zero3_offload"):
        read_sharding("zero9")


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    train = TrainConfig(steps=1, global_batch=10, micro_batch=2)
    with pytest.raises(ConfigError, match=r"train.global_batch is 10; expected a multiple of .*\(2 x 4 = 8\)"):
        deepspeed_config({}, train, OptimConfig(), world_size=4)


def test_gradient_checkpointing_of_transformers_is_refused() -> None:
    config = run_config({"policy": "pass", "tied": False, "deepspeed": "zero3"})
    model = make_model(config)
    model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="gradient_checkpointing_disable"):
        apply_recompute(model, "pass")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_keeps_as_little_as_it_says(policy: str) -> None:
    """Bytes that autograd keeps for backward, over S: flat but for pass inputs where passes are recomputed."""
    kept = {}
    for steps in (1, 3):
        config = run_config({"policy": policy, "tied": False, "deepspeed": "zero3"})
        model = make_model(config)
        apply_recompute(model, policy)
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, weights: Any = weights, storages: Any = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.arange(4 * 24).view(4, 24) % 96
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=tokens, shift_labels=tokens, pondering_steps=steps, skip_logits=True).loss
        kept[steps] = sum(storages.values())
        loss.backward()
    hidden = 4 * 24 * 32 * 4  # bytes of (B, T, D) in fp32
    a_pass = (kept[3] - kept[1]) / 2 / hidden  # what one more pass keeps, in hidden states
    # what selective keeps of the attention, it keeps in a cache of its own that autograd does not see
    bounds = {"none": (30, 200), "selective": (5, 12), "layer": (5, 12), "pass": (1, 5), "pass+layer": (1, 5)}
    low, high = bounds[policy]
    assert low <= a_pass <= high, a_pass


def test_weight_decay_leaves_out_norms_and_embeddings_unless_asked() -> None:
    for tied in (False, True):
        model = make_model(run_config({"policy": "none", "tied": tied, "deepspeed": "zero3"}))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, plain = parameter_groups(model, OptimConfig(weight_decay=0.1))
        assert all("proj" in names[id(p)] or names[id(p)] == "lm_head.weight" for p in decayed["params"])
        assert {names[id(p)].split(".")[-2] for p in plain["params"]} == {
            "embed_tokens",
            "input_layernorm",
            "post_attention_layernorm",
            "norm",
        }
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
        (everything,) = parameter_groups(model, OptimConfig(decay="all"))
        assert len(everything["params"]) == len(names)


def test_settings_that_do_not_fit_one_another_are_refused() -> None:
    case = {"policy": "pass", "tied": False, "deepspeed": "zero3"}
    for overrides, message in [
        (["optim.schedule=wsd"], "wsd_decay_steps is None with optim.schedule wsd"),
        (["health.on_spike=rewind", "checkpoint.every_steps=null"], "saves no checkpoint to go back to"),
        (["optim.wsd_decay_steps=2"], "wsd_decay_steps is 2 with optim.schedule cosine"),
        (["optim.schedule=wsd", "optim.wsd_decay_steps=9"], "more than the 2 steps after warm-up; lower it"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_config({**case, "overrides": overrides})


def test_schedules_warm_up_and_end_at_the_minimum() -> None:
    for schedule in ("cosine", "linear"):
        optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, schedule=schedule)
        rates = [learning_rate(step, 100, optim) for step in range(1, 101)]
        assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
        assert rates[-1] == pytest.approx(0.1)
        assert rates[54] == pytest.approx(0.55)
        assert all(a > b for a, b in pairwise(rates[9:]))
    for style, half in (("linear", 0.55), ("minus_sqrt", 1.0 - 0.9 * math.sqrt(0.5))):
        shape = {"warmup_steps": 10, "schedule": "wsd", "wsd_decay_steps": 20, "wsd_decay_style": style}
        optim = OptimConfig(lr=1.0, min_lr=0.1, **shape)
        rates = [learning_rate(step, 100, optim) for step in range(1, 101)]
        assert rates[9:80] == [1.0] * 71 and rates[-1] == pytest.approx(0.1)
        assert rates[89] == pytest.approx(half) and all(a > b for a, b in pairwise(rates[79:]))
    constant = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 9, constant) for step in (1, 2, 9)] == [0.5, 1.0, 1.0]
