"""The planner against independent counts: torch's own FLOP counter and real models."""

from __future__ import annotations

import re
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
from ponder_scale.planning.activations import micro_batch
from ponder_scale.planning.auto import as_before, ranked, settle
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
from ponder_scale.planning.hardware import TABLE
from ponder_scale.planning.plan import USABLE, Devices, plan_run, report, settle_sharding
from ponder_scale.planning.scaling import scaling, scaling_lines
from ponder_scale.planning.shape import model_shape
from ponder_scale.setup.build import build_model
from ponder_scale.setup.recompute import apply_recompute
from tests.planning.measured import ALONE, SEQUENCE, STAGE_1, VOCABULARY, plan_config, small

WIDE = ["model.hidden_size=16384", "model.num_attention_heads=64"]


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


@pytest.mark.parametrize("losses", ["last", "uniform", "random"])
def test_hidden_feedback_costs_its_passes_and_a_product_for_statistics(losses: str) -> None:
    _, configuration = small("model.feedback=hidden", "model.residual=replace", "model.pondering_steps=2")
    configuration._attn_implementation = "eager"
    model = build_model(configuration, seed=0)
    options = {"skip_logits": True, "ops": Ops(cross_entropy=plain_cross_entropy)}
    options["pass_weights"] = {"last": None, "uniform": (0.3, 0.3, 0.4), "random": (0.0, 0.5, 0.5)}[losses]
    tokens = torch.zeros(2, SEQUENCE, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, shift_labels=tokens, **options).loss.backward()
    shape = model_shape(configuration, SEQUENCE)
    flops = flops_per_token(shape, "none", pass_losses=losses)
    half = 2 * shape.layers * shape.hidden * (SEQUENCE - 1)
    assert flops.pondering == 0
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops.hardware + 3 * 3 * half, rel=0.02)


@pytest.mark.parametrize("policy", ["none", "pass"])
def test_extra_heads_cost_a_layer_and_a_loss_each_by_torchs_count(policy: str) -> None:
    counted, planned = [], []
    for heads in (0, 2):
        _, configuration = small("model.pondering_steps=1", f"model.extra_heads={heads}")
        configuration._attn_implementation = "eager"
        model = build_model(configuration, seed=0)
        apply_recompute(model, policy)
        tokens = torch.zeros(2, SEQUENCE, dtype=torch.int64)
        plain = Ops(partial(pondering_embedding, backend="eager"), plain_cross_entropy)
        weight = 1.0 if heads else None
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tokens, shift_labels=tokens, multi_token_weight=weight, ops=plain).loss.backward()
        shape = model_shape(configuration, SEQUENCE)
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        counted.append(counter.get_total_flops() / tokens.numel())
        planned.append(flops_per_token(shape, policy).hardware)
    half = 2 * 2 * shape.hidden * (SEQUENCE - 1)  # of attention's square, which is masked but computed
    halves = {"none": 3, "pass": 4}[policy]
    # recomputation stops before the last product, whose result backward does not need
    assert counted[1] - counted[0] == pytest.approx(planned[1] - planned[0] + halves * half, rel=0.02)


@pytest.mark.parametrize(("feedback", "refinements"), [("latent", 2), ("pause", None)])
def test_positions_cost_what_torch_counts_and_take_memory(feedback: str, refinements: int | None) -> None:
    config, configuration = small(f"model.feedback={feedback}", "model.pondering_steps=2")
    traced = micro_batch(config, configuration)
    _, plain = small("model.pondering_steps=0")
    assert traced.alive.peak > 2.5 * micro_batch(config, plain).alive.peak
    configuration._attn_implementation = "eager"
    model, tokens = build_model(configuration, seed=0), torch.zeros(2, SEQUENCE, dtype=torch.int64)
    options = {"skip_logits": True, "ops": Ops(cross_entropy=plain_cross_entropy), "refinements": refinements}
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, shift_labels=tokens, **options).loss.backward()
    shape = model_shape(configuration, SEQUENCE)
    flops = flops_per_token(shape, "none", refinements=refinements)
    positions, keys = shape.positions(2, refinements)
    masked = 3 * 2 * shape.layers * shape.hidden * (keys - 2 * positions)  # of attention's square, but computed
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops.hardware + masked, rel=0.02)
    plan = plan_run(config, settle_sharding(config, STAGE_1, configuration, ALONE), configuration, ALONE, traced=traced)
    assert plan.step.seconds > 0 and plan.flops == flops_per_token(shape, config.train.recompute)


def plain_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> tuple[Any, Statistics]:
    losses = torch.nn.functional.cross_entropy((hidden @ head.t()).flatten(0, -2), labels.flatten(), reduction="none")
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


@pytest.mark.slow  # traces three steps
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


def settled(memory: int, *overrides: str, shardings: dict[str, Any] | None = None) -> Any:
    config, configuration = shallow("train.recompute=auto", "train.micro_batch=auto", *overrides)
    files = shardings or {config.train.deepspeed: STAGE_1}
    return settle(config, files, configuration, replace(ALONE, memory_bytes=memory))


@pytest.mark.slow
def test_auto_takes_the_least_time_of_what_fits() -> None:
    def chosen(memory: int, *overrides: str) -> tuple[str, Any]:
        train = settled(memory, *overrides)[0].train
        return train.recompute, train.micro_batch

    assert chosen(2**40)[0] == "none"
    # what divides every step of a ramp
    policy, micro_batch = chosen(2**40, "train.batch_ramp_from=4", "train.batch_ramp_steps=3")
    assert policy == "none" and 4 % micro_batch == 0
    assert chosen(2**40, "train.offload_activations=true")[0] != "none"
    assert chosen(memory_of("none", 4), "train.micro_batch=4") == ("none", 4)
    # a little less than what recomputing nothing needs
    assert chosen(memory_of("none", 4) - 2, "train.micro_batch=4")[0] != "none"
    assert chosen(memory_of("pass", 6), "train.recompute=pass")[1] <= 6
    with pytest.raises(ConfigError, match=r"nothing fits 9.31e-10 GiB a rank; shard more with train.deepspeed"):
        settled(1)


def test_auto_says_what_it_chose_and_the_runner_up() -> None:
    config, said = settled(2**40, "train.micro_batch=4")
    assert [line.split()[0] for line in said] == ["chosen", "runner-up"]
    assert said[0].startswith("chosen         recompute none, micro-batch 4, zero3: ")
    found = (
        r"recompute (selective|layer), micro-batch 4, zero3: [\d.e-]+ GiB, [\d.]+ m?s a step \(.*products [\d.]+ m?s"
    )
    assert re.search(found, said[1])
    assert settle(config, {}, None, ALONE) == (config, [])  # nothing is left open


@pytest.mark.slow  # traces many steps
def test_no_choice_that_fits_is_faster_than_that_of_auto() -> None:
    """Policy, micro-batch and stage together, each traced anew."""
    config, configuration = shallow("train.recompute=auto", "train.micro_batch=auto", "train.deepspeed=auto")
    config = replace(config, train=replace(config.train, global_batch=4))
    shardings = {"zero1": STAGE_1, "zero3": {"zero_optimization": {"stage": 3}}}
    devices = Devices(2, 2 * memory_of("pass", 1), 2, gpu=False)
    chosen = ranked(config, shardings, configuration, devices)[0]
    assert chosen.plan.fits(devices.memory_bytes)
    for policy in ("none", "selective", "layer", "pass"):
        for size in (1, 2):
            for name, sharding in shardings.items():
                train = replace(config.train, recompute=policy, micro_batch=size, deepspeed=name)
                other = replace(config, train=train)
                zero = settle_sharding(other, sharding, configuration, devices)
                plan = plan_run(other, zero, configuration, devices)
                if plan.fits(devices.memory_bytes):
                    assert chosen.plan.step.seconds <= 1.011 * plan.step.seconds, (policy, size, name)


def test_a_micro_batch_is_foretold_from_one_and_two_sequences() -> None:
    """What auto weighs by, against the same traced."""
    config, configuration = shallow("train.recompute=layer")

    def traced(size: int) -> Any:
        return micro_batch(replace(config, train=replace(config.train, micro_batch=size)), configuration)

    one, two, six = traced(1), traced(2), traced(6)
    foretold = one.operations.scaled(two.operations, 5)
    assert foretold.products == six.operations.products
    for phase, rest in six.operations.rest.items():
        assert foretold.rest[phase] == pytest.approx(rest, rel=0.02)
    # a peak is the largest of some sums that grow with the batch, so a line from two of them is never above it
    assert 0.8 * six.alive.peak < one.alive.peak + 5 * (two.alive.peak - one.alive.peak) <= six.alive.peak


@pytest.mark.slow  # traces five steps
def test_policies_differ_by_what_they_compute_again() -> None:
    """Of the time: `none` nothing, `selective` all but attention, `pass+layer` about twice as much as `pass`."""
    steps = {}
    for policy in ("none", "selective", "layer", "pass", "pass+layer"):
        config, configuration = small(f"train.recompute={policy}")
        steps[policy] = plan_run(config, STAGE_1, configuration, ALONE).step
    again = {policy: step.recomputation for policy, step in steps.items()}
    assert again["none"] == 0 < again["selective"] < again["layer"] < again["pass"] < again["pass+layer"]
    assert again["pass+layer"] == pytest.approx(2 * again["pass"], rel=0.25)
    assert len({step.products for step in steps.values()}) == 1


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
    stage, _ = small("train.deepspeed=auto")
    sharded, _ = small("train.deepspeed=zero2", "train.micro_batch=2")
    assert as_before(stage, sharded.train, 2).train.deepspeed == "zero2"


def test_what_does_not_fit_is_warned_of() -> None:
    stage_0 = {"zero_optimization": {"stage": 0}}
    for overrides, device, warns in (([], "h100", False), (WIDE, "a100-40", True)):
        config, configuration = small(*overrides)
        devices = Devices(1, round(TABLE[device].memory_bytes), hardware=TABLE[device])
        lines = report(plan_run(config, stage_0, configuration, devices), config, devices)
        assert lines[-1].startswith("warning: ") == warns


def test_the_plan_of_a_small_model_has_units_that_fit() -> None:
    config, configuration = small("train.steps=3")
    devices = Devices(1, 2**40, hardware=TABLE["h100"])
    plan = plan_run(config, {"zero_optimization": {"stage": 0}}, configuration, devices)
    text = "\n".join(report(plan, config, devices))
    assert not re.search(r"(?<![\d.])0\.0+(?!\d)", text), text  # no 0.000B tokens, no 0.0 days
    assert f"{plan.tokens:,} tokens at" in text and f"{plan.shape.parameters:,} parameters" in text
    assert re.search(r"1 x h100: [\d.]+ ms, [\d.]+ ms of one device", text) and "MiB" in text


def test_the_plan_names_its_terms_and_how_mfu_counts_attention() -> None:
    config, configuration = small()
    devices = Devices(1, 2**40, hardware=TABLE["h100"])
    plan = plan_run(config, {"zero_optimization": {"stage": 0}}, configuration, devices)
    step, utilization = report(plan, config, devices)[3:5]
    for name, seconds in plan.step.terms().items():
        assert (seconds >= plan.seconds / plan.steps / 1000) == (f"{name} " in step), (name, step)
    flops = plan.tokens * plan.flops.model / plan.seconds / TABLE["h100"].peak("fp32")
    assert f"MFU {100 * flops:.3g}% of 67 TFLOP/s, attention counted by its causal half" in utilization
    assert "by PaLM's convention, the whole square" in utilization
    told = report(plan, config, devices, utilization=0.4)
    assert "at 40% of 67 TFLOP/s" in told[-1] and not any(line.startswith("step ") for line in told)


def test_more_devices_cost_more_device_hours_where_weights_are_released() -> None:
    config, configuration = small("train.global_batch=512", "train.micro_batch=1", "train.deepspeed=zero3")
    sharding = {"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 0}}
    hours = []
    for ranks in (8, 64, 512):
        devices = Devices(ranks, 2**40, 8, hardware=TABLE["h100"])
        settled_sharding = settle_sharding(config, sharding, configuration, devices)
        plan = plan_run(config, settled_sharding, configuration, devices)
        hours.append(plan.seconds * ranks)
    assert hours == sorted(hours) and hours[2] > 1.5 * hours[0]


def test_the_table_of_devices_says_where_a_stage_stops_paying() -> None:
    config, configuration = small("train.global_batch=48", "train.micro_batch=1", "train.recompute=none")
    shardings = {"zero1": STAGE_1, "zero3_bounded": {"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 0}}}
    sizes = [Devices(ranks, 2**36, 8, hardware=TABLE["h100"]) for ranks in (8, 48, 64)]
    rows = scaling(config, shardings, configuration, sizes)
    assert [len(group) for group in rows] == [2, 2, 2]
    tokens = [row.plan.tokens for group in rows for row in group if row.plan is not None]
    assert len(tokens) == 6 and max(tokens) == pytest.approx(min(tokens), rel=0.15)
    text = "\n".join(scaling_lines(config, rows, sizes))
    assert "* at train.global_batch=64, the least that divides over 64 devices; the tokens are the same" in text
    assert re.search(r"^zero3_bounded +on 8 devices zero1 takes [\d.]+% less time", text, re.MULTILINE)
    assert text.count("communication") == 1 and text.count("zero1") >= 4
    tiny = [replace(sizes[0], memory_bytes=1000)]
    (nothing,) = scaling(config, {"zero1": STAGE_1}, configuration, tiny)
    assert nothing[0].plan is None and "does not fit" in scaling_lines(config, [nothing], tiny)[1]


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
