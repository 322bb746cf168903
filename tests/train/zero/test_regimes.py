"""What ZeRO-3 sends under each named regime, counted on two real ranks, and what is planned and said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.communication import SHAPE, Traffic, traffic
from ponder_scale.config import RunConfig, TrainConfig
from ponder_scale.errors import ConfigError
from ponder_scale.planning.cost import gathering
from ponder_scale.planning.plan import Devices, settle_sharding
from ponder_scale.planning.shape import run_shape
from ponder_scale.settings import load
from ponder_scale.setup.build import model_configuration
from ponder_scale.train.zero.deepspeed_config import check_ranks, read_sharding
from tests.ranks import run_ranks
from tests.train.zero.gradients import check, make_model, run_config, small_buckets

SMALL = [*SHAPE, "model.pondering_steps=2"]


def planned(regime: str, policy: str, *more: str) -> Any:
    config = load(RunConfig, None, [*SMALL, f"train.deepspeed={regime}", f"train.recompute={policy}", *more])
    configuration = model_configuration(config.model, vocab_size=4096, seq_len=config.data.seq_len, eod_id=0)
    devices = Devices(2, 2**40, gpu=False)
    sharding = settle_sharding(config, read_sharding(regime), configuration, devices)
    return gathering(run_shape(config, configuration), sharding["zero_optimization"], policy)


def counted(regime: str, policy: str, *more: str) -> Traffic:
    return traffic([*SMALL, f"train.deepspeed={regime}", f"train.recompute={policy}", *more])


def test_kept_weights_are_gathered_once_a_micro_step() -> None:
    seen = counted("zero3_keep_gathered", "pass")
    assert 0.97 < seen.forward_volume <= 1.001 and seen.backward_volume == 0, seen  # persistent norms are not in it
    assert seen.live == 1.0 and seen.forward_gathers <= 3
    assert planned("zero3_keep_gathered", "pass").volume == 1.0


@pytest.mark.parametrize("policy", ["layer", "pass"])
def test_bounded_weights_are_gathered_for_each_pass_and_released(policy: str) -> None:
    seen, plan = counted("zero3_bounded", policy), planned("zero3_bounded", policy)
    assert seen.forward_volume + seen.backward_volume == pytest.approx(plan.volume, rel=0.1), (seen, plan)
    assert seen.live <= plan.live_share + 0.05 < 0.8, (seen, plan)


def test_passes_without_gradient_gather_for_their_forward_alone_and_keep_their_prefetch_trace() -> None:
    last = "train.pondering.backward_passes=1"
    seen, plan = counted("zero3_bounded", "pass", last), planned("zero3_bounded", "pass", last)
    assert seen.forward_volume + seen.backward_volume == pytest.approx(plan.volume, rel=0.1), (seen, plan)
    assert plan.volume < 0.7 * planned("zero3_bounded", "pass").volume
    assert seen.live <= plan.live_share + 0.05 < 0.8, (seen, plan)
    kept = counted("zero3_keep_gathered", "pass", last)
    assert 0.97 < kept.forward_volume <= 1.001 and kept.backward_volume == 0 and kept.forward_gathers <= 3, kept


def test_the_named_regimes_and_a_secondary_partition_give_the_gradients_of_plain_torch(tmp_path: Path) -> None:
    secondary = small_buckets(tmp_path, 3, zero_hpz_partition_size="auto", stage3_max_reuse_distance=0)
    cases = [
        {"deepspeed": deepspeed, "policy": policy, "tied": False}
        for deepspeed, policy in (("zero3_keep_gathered", "pass"), ("zero3_bounded", "none"), (secondary, "pass"))
    ]
    check(cases)


def sentences(case: dict[str, Any]) -> list[str]:
    """What the engine logs about all-gathers at its start, and the limits that DeepSpeed got."""
    import logging

    from ponder_scale.train.zero import engine as module

    module.init_distributed()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    module.logger.addHandler(handler)
    module.logger.setLevel(logging.INFO)
    config = run_config(case)
    engine = module.Engine(make_model(config), config)
    sentence = " ".join(line.strip() for line in said)  # a long one is folded into the width of a log
    return [sentence, str(engine.deepspeed.config["zero_optimization"].get("stage3_max_reuse_distance"))]


def test_the_log_says_which_regime_the_size_of_the_model_implies_and_quantization_needs_cuda(tmp_path: Path) -> None:
    open_file = small_buckets(tmp_path, 3)
    case = {"deepspeed": open_file, "policy": "pass", "tied": False}
    tight = {**case, "overrides": ["train.memory_gib=1e-6"]}
    quantized = {**case, "deepspeed": "zero3_zeropp"}
    roomy, cramped, refused = [ranks[0] for ranks in run_ranks(sentences, [case, tight, quantized])]
    assert "ZeRO-3 keeps all weights gathered from the first pass to the end of backward: 1.0 x" in roomy[0]
    assert "ZeRO-3 gathers each layer once per pass and releases it" in cramped[0]
    assert int(roomy[1]) > 0 == int(cramped[1])
    assert "zero_quantized_weights needs CUDA" in refused["error"]  # the ranks of these tests see no GPU


def test_the_groups_of_zeropp_have_to_divide_the_ranks(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}))
    train = TrainConfig(steps=1, global_batch=12, deepspeed=str(path))
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size is 8; expected a divisor of the ranks \(12\)"):
        check_ranks(read_sharding(str(path)), train, 12)
    check_ranks(read_sharding(str(path)), TrainConfig(steps=1, global_batch=16), 16)
    check_ranks(read_sharding("zero3_zeropp"), TrainConfig(steps=1, global_batch=12, micro_batch="auto"), 12)
