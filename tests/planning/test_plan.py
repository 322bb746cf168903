"""The planner against independent counts: torch's own FLOP counter, real models, and measured memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.model import backends
from ponder_scale.model.pondering_embedding import Statistics, pondering_embedding
from ponder_scale.model.readout import Ops
from ponder_scale.planning.auto import as_before, settle
from ponder_scale.planning.cost import (
    CHUNK_ELEMENTS,
    KERNEL_BLOCK,
    REUSE,
    flops_per_token,
    gather_limits,
    gathering,
    state_bytes,
    step_flops,
)
from ponder_scale.planning.epochs import epoch_lines
from ponder_scale.planning.plan import USABLE, Devices, plan_run, report, settle_sharding
from ponder_scale.planning.shape import model_shape
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.setup.recompute import apply_recompute
from tests.planning.measured import large, plan_config
from tests.ranks import REPOSITORY

VOCABULARY, SEQUENCE = 512, 64
ALONE = Devices(1, 2**40, gpu=False)
STAGE_1 = {"zero_optimization": {"stage": 1}}
WIDE = ["model.hidden_size=16384", "model.num_attention_heads=64"]


def small(*overrides: str) -> tuple[RunConfig, Any]:
    sizes = ["model.hidden_size=64", "model.intermediate_size=160", "model.num_hidden_layers=3"]
    config = plan_config(*sizes, "model.num_attention_heads=4", f"data.seq_len={SEQUENCE}", *overrides)
    return config, model_configuration(config.model, vocab_size=VOCABULARY, seq_len=SEQUENCE, eod_id=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("policy", ["none", "pass"])
def test_flops_are_those_that_torch_counts(architecture: str, policy: str) -> None:
    """With eager operations throughout: torch's counter does not see in-place products and fused attention."""
    _, configuration = small(f"model.architecture={architecture}", "model.pondering_steps=2")
    configuration._attn_implementation = "eager"
    model = build_model(configuration, seed=0)
    plain = Ops(partial(pondering_embedding, backend="eager"), plain_cross_entropy)
    apply_recompute(model, policy)
    tokens = torch.zeros(2, SEQUENCE, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, shift_labels=tokens, skip_logits=True, ops=plain).loss.backward()
    shape = model_shape(configuration, SEQUENCE)
    flops = flops_per_token(shape, policy)
    half = 2 * shape.layers * shape.hidden * (SEQUENCE - 1)  # of attention's square, which is masked but computed
    expected = flops.model + 3 * 3 * half
    if policy == "pass":
        product = 2 * shape.vocabulary * shape.hidden  # the plain pondering embedding recomputes nothing
        expected += flops.recomputed - 2 * product + 3 * half
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(expected, rel=0.02)


def test_hidden_feedback_costs_its_passes_and_a_product_for_statistics() -> None:
    _, configuration = small("model.feedback=hidden", "model.residual=replace", "model.pondering_steps=2")
    configuration._attn_implementation = "eager"
    model = build_model(configuration, seed=0)
    plain = Ops(cross_entropy=plain_cross_entropy)
    tokens = torch.zeros(2, SEQUENCE, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, shift_labels=tokens, skip_logits=True, ops=plain).loss.backward()
    shape = model_shape(configuration, SEQUENCE)
    flops = flops_per_token(shape, "none")
    half = 2 * shape.layers * shape.hidden * (SEQUENCE - 1)
    assert flops.pondering == 0
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops.hardware + 3 * 3 * half, rel=0.02)


def plain_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> tuple[Any, Statistics]:
    losses = torch.nn.functional.cross_entropy((hidden @ head.t()).flatten(0, 1), labels.flatten(), reduction="none")
    return losses.sum(), Statistics(losses.detach(), losses.detach())


def test_parameters_are_the_models() -> None:
    for tied in ("true", "false"):
        _, configuration = small(f"model.tie_word_embeddings={tied}")
        model = build_model(configuration, seed=0)
        shape = model_shape(configuration, SEQUENCE)
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert shape.table_parameters == VOCABULARY * 64 * (1 if tied == "true" else 2)


def test_a_steps_flops_follow_the_pondering_steps_that_it_took() -> None:
    _, configuration = small("model.pondering_steps=3")
    shape = model_shape(configuration, SEQUENCE)
    assert step_flops(shape, "pass", 3, tokens=1000).model == pytest.approx(1000 * flops_per_token(shape, "pass").model)
    vanilla = step_flops(shape, "none", 0, tokens=1)
    assert (vanilla.pondering, vanilla.recomputed) == (0, 0)
    assert step_flops(shape, "none", 1, tokens=1).passes == 2 * vanilla.passes


def test_states_shrink_with_the_stage() -> None:
    totals = [state_bytes(1000, stage, ranks=4, precision="bf16").total for stage in range(4)]
    assert totals == [16000, 4000 + 12 * 250, 2000 + 14 * 250, 16 * 250]
    assert state_bytes(1000, 0, ranks=4, precision="fp32").total == 16000
    assert state_bytes(1000, 1, ranks=4, precision="bf16", average=True).total == totals[1] + 4 * 250


def test_gathering_follows_the_limits() -> None:
    _, configuration = small("model.num_hidden_layers=8")
    shape = model_shape(configuration, SEQUENCE)
    assert gathering(shape, {"stage": 2}, "pass") is None
    kept = gathering(shape, gather_limits({"stage": 3}, shape, keep=True), "pass")
    assert kept is not None and (kept.volume, kept.live_share) == (1.0, 1.0)
    assert kept.sentence.startswith("ZeRO-3 keeps all weights gathered from the first pass to the end of backward: 1.0")
    bounded = gather_limits({"stage": 3}, shape, keep=False)
    released = gathering(shape, bounded, "layer")
    assert released is not None and released.volume > 4 and released.live_share < 1
    assert bounded["stage3_prefetch_bucket_size"] == shape.block_parameters // shape.layers
    written = {"stage": 3, "stage3_max_live_parameters": 10, "stage3_max_reuse_distance": 0}
    assert {**gather_limits(written, shape, keep=True), **written} == gather_limits(written, shape, keep=True)


def test_weights_stay_gathered_only_where_they_fit() -> None:
    config, configuration = small("train.deepspeed=zero3", "model.num_hidden_layers=8")
    sharding = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "zero_hpz_partition_size": "auto"}}
    needed = {}
    for memory in (2**40, 2**10):
        settled = settle_sharding(config, sharding, configuration, Devices(16, memory, per_node=8, gpu=False))
        plan = plan_run(config, settled, configuration, Devices(16, memory, gpu=False))
        assert plan.gathers is not None and settled["zero_optimization"]["zero_hpz_partition_size"] == 8
        needed[memory] = plan.gathers.live_share, plan.memory_bytes
    assert needed[2**40][0] == 1.0 > needed[2**10][0]
    assert needed[2**40][1] > needed[2**10][1]
    between = Devices(16, round(needed[2**40][1] / USABLE) - 1000, gpu=False)  # just too small to keep all
    assert settle_sharding(config, sharding, configuration, between)["zero_optimization"][REUSE] == 0


def test_the_blocks_are_those_that_are_planned() -> None:
    assert backends.CPU_CHUNK_ELEMENTS == CHUNK_ELEMENTS
    kernels = pytest.importorskip("ponder_scale.model.kernels", reason="needs triton")
    assert kernels.TOKEN_BLOCK == kernels.VOCABULARY_BLOCK == KERNEL_BLOCK


def shallow(*overrides: str) -> tuple[RunConfig, Any]:
    """Quick to trace."""
    return small("model.num_hidden_layers=1", "model.pondering_steps=1", "train.global_batch=12", *overrides)


def memory_of(policy: str, micro_batch: int) -> int:
    """Memory in bytes that is just enough for this policy and micro-batch."""
    config, configuration = shallow(f"train.recompute={policy}", f"train.micro_batch={micro_batch}")
    return round(plan_run(config, STAGE_1, configuration, ALONE).memory_bytes / USABLE) + 1


@pytest.mark.slow
def test_auto_takes_the_fastest_policy_and_the_largest_micro_batch_that_fit() -> None:
    def settled(memory: int, *overrides: str) -> tuple[str, Any]:
        config, configuration = shallow("train.recompute=auto", "train.micro_batch=auto", *overrides)
        train = settle(config, STAGE_1, configuration, replace(ALONE, memory_bytes=memory)).train
        return train.recompute, train.micro_batch

    assert settled(2**40) == ("none", 12)
    # what divides every step of a ramp
    assert settled(2**40, "train.batch_ramp_from=4", "train.batch_ramp_steps=3") == ("none", 4)
    assert settled(2**40, "train.offload_activations=true")[0] == "selective"
    assert settled(memory_of("none", 4), "train.micro_batch=4") == ("none", 4)
    # a little less than what recomputing nothing needs
    assert settled(memory_of("none", 4) - 2, "train.micro_batch=4")[0] != "none"
    assert settled(memory_of("pass", 6), "train.recompute=pass") == ("pass", 6)
    with pytest.raises(ConfigError, match=r"nothing fits 9.31e-10 GiB a rank; shard more by train.deepspeed"):
        settled(1)


def test_a_run_goes_on_with_what_its_start_settled() -> None:
    config, _ = small("train.recompute=auto", "train.micro_batch=auto")
    before, _ = small("train.recompute=layer", "train.micro_batch=2")
    train = as_before(config, before.train, 2).train
    assert (train.recompute, train.micro_batch) == ("layer", 2)
    assert as_before(config, None, 2) is config
    more = config.train.batch_unit  # ranks, over which a micro-batch of 2 does not divide any more
    assert as_before(config, before.train, more).train.micro_batch == "auto"
    chosen, _ = small("train.recompute=none", "train.micro_batch=auto")
    assert as_before(chosen, before.train, 2).train.recompute == "none"  # what is asked for now comes first


def test_planned_memory_is_within_10_percent_of_the_measured_peak() -> None:
    # glibc would keep freed pieces below its moving threshold in the heap, which no other allocator does
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.planning.measured", "pass"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    config, configuration = large("pass")
    plan = plan_run(config, {"zero_optimization": {"stage": 0}}, configuration, ALONE)
    print(f"planned {plan.memory_bytes / 2**20:.0f} MiB, measured {int(done.stdout) / 2**20:.0f}")
    assert plan.memory_bytes == pytest.approx(int(done.stdout), rel=0.10)


def test_what_does_not_fit_is_warned_of() -> None:
    stage_0 = {"zero_optimization": {"stage": 0}}
    for overrides, device, warns in (([], "h100", False), (WIDE, "a100-40", True)):
        config, configuration = small(*overrides)
        lines = report(plan_run(config, stage_0, configuration, ALONE), config, device=device, utilization=0.4)
        assert lines[-1].startswith("warning: ") == warns


def test_the_plan_of_a_small_model_has_units_that_fit() -> None:
    config, configuration = small("train.steps=3")
    plan = plan_run(config, {"zero_optimization": {"stage": 0}}, configuration, ALONE)
    text = "\n".join(report(plan, config, device="h100", utilization=0.4))
    assert not re.search(r"(?<![\d.])0\.0+(?![\d])", text), text  # no 0.000B tokens, no 0.0 days
    assert f"{plan.tokens:,} tokens at" in text and f"{plan.shape.parameters:,} parameters" in text
    assert re.search(r"TFLOP/s: [\d.]+ ms, [\d.]+ ms of one device", text) and "MiB" in text


def test_the_plan_says_how_often_each_source_is_read(tiny_shards: Any) -> None:
    web, code = (tiny_shards(train=train, vocab_size=100) for train in ((900, 700), (300,)))
    settings = ["train.steps=60", "train.global_batch=4", "train.micro_batch=4", "data.seq_len=16"]
    sources = [f"data.sources={{web: {{path: {web.folder}, weight: 3}}, code: {{path: {code.folder}, weight: 1}}}}"]
    config = plan_config(*settings, *sources)
    lines = epoch_lines(config, {"web": web, "code": code})
    # 240 sequences: 60 of code, which has (300 - 1) // 16 of them, and 180 of web, which has 56 + 43
    assert lines == [
        "source         code: 300 tokens in 18 sequences, 25.0% of the run, 3.33 epochs",
        "source         web: 1,600 tokens in 99 sequences, 75.0% of the run, 1.82 epochs",
    ]
    once = plan_config(*settings, *sources, "data.sources.code.max_epochs=1", "data.sources.web.max_epochs=1")
    assert epoch_lines(once, {"web": web, "code": code})[-1].startswith(
        "warning: data.sources end after 117 of the run's 240 sequences"
    )
