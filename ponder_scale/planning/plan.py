"""`ponder-scale plan`: compute what a run will need before any device is touched.

The memory of activations and the operations of a micro-batch are traced (see `activations`). Everything else is
arithmetic (see `cost` and `time`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ponder_scale.config import RunConfig
from ponder_scale.figures import count, rate, size, span
from ponder_scale.planning.activations import Traced, micro_batch
from ponder_scale.planning.cost import (
    GIB,
    REUSE,
    Flops,
    Gathering,
    Shape,
    StateBytes,
    block_bytes,
    flops_per_token,
    gather_limits,
    gathering,
    is_open,
    kernel_bytes,
    learned_passes,
    square_attention,
    state_bytes,
    steps_to_tokens,
)
from ponder_scale.planning.depth import mean_steps
from ponder_scale.planning.hardware import CPU, Hardware, hardware_of, read_hardware
from ponder_scale.planning.shape import run_shape
from ponder_scale.planning.time import NO_TIME, Job, StepTime, step_time

USABLE = 0.92  # share of a device's memory to plan with; the driver, NCCL and fragmentation take the rest
RESERVE = 0.05  # memory that libraries hold while they compute, which no trace sees, as a share of the activations
PACKED_BYTES = 6 * 2**20  # and the copies of operands that a library's products keep, however small the activations
CLEARLY_SMALL = 0.05  # weights below this share of the memory may stay gathered without a closer look


@dataclass(frozen=True)
class Plan:
    """All figures of a run on `ranks` devices. Bytes are those of one rank."""

    shape: Shape
    flops: Flops
    states: StateBytes
    gathered_bytes: int
    bucket_bytes: int
    activation_bytes: int
    workspace_bytes: int  # what the ops' blocks add to the peak of the activations, and what libraries hold
    beside_bytes: int  # by which complete gradients raise the peak of the activations and the blocks
    gathers: Gathering | None
    ranks: int
    tokens: int
    step: StepTime = NO_TIME  # average over the run
    steps: int = 1

    @property
    def seconds(self) -> float:
        """The seconds of all optimizer steps, without saves, evaluations and failures."""
        return self.step.seconds * self.steps

    @property
    def memory_bytes(self) -> int:
        """The peak on one rank, without the allocator's fragmentation and the device's own context.

        Gradients that are not complete count as activations, under every stage. S + 1 passes share the weights, so
        nearly all gradients are complete only at the end of backward. With one pass they are complete earlier.
        """
        states = self.states
        kept = states.weights + states.masters + states.moments + self.gathered_bytes + self.bucket_bytes
        return kept + max(self.activation_bytes + self.workspace_bytes + self.beside_bytes, states.gradients)

    def fits(self, memory_bytes: int) -> bool:
        """Whether the run fits on devices with this memory."""
        return self.memory_bytes <= USABLE * memory_bytes


@dataclass(frozen=True)
class Devices:
    """The devices that a run is planned for: `ranks` devices, `per_node` in a node, with `memory_bytes` each."""

    ranks: int
    memory_bytes: int
    per_node: int = 1
    gpu: bool = True
    hardware: Hardware = CPU


def present_devices(config: RunConfig, ranks: int) -> Devices:
    """The devices that this process trains on. Without a GPU, a rank may use its share of the host's memory."""
    gpu = torch.cuda.is_available()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() if gpu else 1))
    if config.train.memory_gib is not None:
        memory = round(config.train.memory_gib * GIB)
    elif gpu:
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node
    if config.train.hardware is not None:
        hardware = read_hardware(Path(config.train.hardware))
    else:
        hardware = hardware_of(torch.cuda.get_device_name()) if gpu else CPU
    return Devices(ranks, memory, min(per_node, ranks), gpu, hardware)


def plan_run(
    config: RunConfig,
    sharding: dict[str, Any],
    configuration: Any,
    devices: Devices,
    *,
    traced: Traced | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        sharding: result of `settle_sharding`.
        configuration: the transformers configuration of the model.
        traced: the trace of the run's micro-batch, if it is known already.
    """
    shape = run_shape(config, configuration)
    zero = sharding["zero_optimization"]
    gathers = gathering(shape, zero, config.train.recompute)
    width = 2 if config.train.precision == "bf16" else 4
    train, steps = config.train, mean_steps(config)
    tokens, traced = train.micro_batch_sequences * config.data.seq_len, traced or micro_batch(config, configuration)
    job = Job(
        operations=traced.operations,
        shape=shape,
        tokens=tokens,
        micro_steps=train.sequences_until(train.steps) / train.steps / (train.micro_batch_sequences * devices.ranks),
        pondering_steps=steps,
        zero=zero,
        recompute=train.recompute,
        ranks=devices.ranks,
        per_node=devices.per_node,
        width=width,
        learned_passes=learned_passes(train.pass_losses, steps),
        exits=train.pass_losses == "exit",
    )
    learned = job.learned_passes > 0
    blocks = kernel_bytes(shape, tokens) if devices.gpu and width == 2 else block_bytes(shape, tokens, learned=learned)
    alive, whole = (round(found.with_blocks(blocks)) for found in (traced.alive, traced.whole))
    states = state_bytes(
        shape.parameters, zero["stage"], devices.ranks, train.precision, average=config.optim.ema is not None
    )
    if zero["stage"] == 3 or train.global_batch > train.micro_batch_sequences * devices.ranks:
        beside = states.gradients  # those of earlier micro-batches, or ZeRO-3's flat buffer
    else:
        beside = round(states.gradients / (width * shape.parameters) * (whole - alive))
    return Plan(
        shape=shape,
        flops=flops_per_token(shape, train.recompute, steps, train.pass_losses),
        states=states,
        gathered_bytes=0 if gathers is None else round(gathers.live_share * shape.parameters * width),
        bucket_bytes=_bucket_bytes(zero, shape.parameters, width),
        activation_bytes=round(traced.alive.peak),
        workspace_bytes=alive - round(traced.alive.peak) + round(RESERVE * traced.alive.peak) + PACKED_BYTES,
        beside_bytes=beside,
        gathers=gathers,
        ranks=devices.ranks,
        tokens=steps_to_tokens(config),
        step=step_time(job, devices.hardware),
        steps=train.steps,
    )


def settle_sharding(
    config: RunConfig,
    sharding: dict[str, Any],
    configuration: Any,
    devices: Devices,
    *,
    traced: Traced | None = None,
) -> dict[str, Any]:
    """The sharding with open settings decided for this model: ZeRO-3's limits and the groups of ZeRO++.

    Weights stay gathered for all passes if they fit beside everything else, because this needs least communication.
    """
    zero = dict(sharding["zero_optimization"])
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = devices.per_node
    shape = run_shape(config, configuration)
    keep = {**sharding, "zero_optimization": gather_limits(zero, shape, keep=True)}
    width = 2 if config.train.precision == "bf16" else 4
    decided = zero["stage"] != 3 or not is_open(zero, REUSE)
    if decided or width * shape.parameters < CLEARLY_SMALL * devices.memory_bytes:
        return keep
    if plan_run(config, keep, configuration, devices, traced=traced).fits(devices.memory_bytes):
        return keep
    return {**sharding, "zero_optimization": gather_limits(zero, shape, keep=False)}


def _bucket_bytes(zero: dict[str, Any], parameters: int, width: int) -> int:
    """The bytes of the flat buffers that collect gradients under stages 2 and 3. Overlapping stage 2 has two."""
    if zero["stage"] < 2:
        return 0
    bucket = min(int(zero.get("reduce_bucket_size", 5e8)), parameters if zero["stage"] == 2 else 2**62)
    return bucket * width * (2 if zero["stage"] == 2 and zero.get("overlap_comm") else 1)


def report(plan: Plan, config: RunConfig, devices: Devices, *, utilization: float | None = None) -> list[str]:
    """The lines of `ponder-scale plan`. A line that begins with "warning:" says what will not work.

    Args:
        utilization: share of the peak that model FLOPs reach. If given, it replaces the planner's own time.
    """
    hardware, capacity = devices.hardware, devices.memory_bytes
    seconds = training_seconds(plan, devices, config.train.precision, utilization)
    told = "" if utilization is None else f" at {utilization:.0%} of {_peak(devices, config) / 1e12:,.0f} TFLOP/s"
    lines = [
        f"model          {count(plan.shape.parameters)} parameters, {count(plan.shape.table_parameters)} "
        f"of them in tables, S = {plan.shape.pondering_steps}, sequences of {plan.shape.sequence:,}",
        f"FLOPs / token  {count(plan.flops.model)} model ({count(plan.flops.passes)} passes, "
        f"{count(plan.flops.pondering)} pondering, {count(plan.flops.loss)} loss), "
        f"{count(plan.flops.hardware)} hardware with recompute {config.train.recompute}",
        f"memory / rank  {size(plan.memory_bytes)}: weights {size(plan.states.weights)}, masters "
        f"{size(plan.states.masters)}, moments {size(plan.states.moments)}, gradients {size(plan.states.gradients)}, "
        f"gathered {size(plan.gathered_bytes)}, buckets {size(plan.bucket_bytes)}, activations "
        f"{size(plan.activation_bytes)}, kernels {size(plan.workspace_bytes)}",
    ]
    if plan.gathers is not None:
        lines.append(f"all-gathers    {plan.gathers.sentence}")
    if utilization is None:
        lines += step_lines(plan, config, devices)
    lines.append(
        f"time           {count(plan.tokens)} tokens at {rate(plan.tokens / seconds)} tokens/s on "
        f"{plan.ranks} x {hardware.name}{told}: {span(seconds)}, {of_devices(seconds * plan.ranks)}"
    )
    if not plan.fits(capacity):
        lines.append(
            f"warning: {size(plan.memory_bytes)} do not fit {hardware.name}'s {size(capacity)} with "
            f"{1 - USABLE:.0%} to spare; lower train.micro_batch, recompute more, or shard more"
        )
    return lines


def step_lines(plan: Plan, config: RunConfig, devices: Devices) -> list[str]:
    """The time of a step by its terms, and the share of the peak that it reaches."""
    step, tokens = plan.step, plan.tokens / plan.steps / plan.ranks
    peak = _peak(devices, config)
    rates = [
        flops * tokens / step.seconds / _peak(devices, config) for flops in (plan.flops.model, plan.flops.hardware)
    ]
    waits = _percent(step.communication) if step.communication > 0.0005 else "nothing"
    square = rates[0] * (1 + square_attention(plan.shape, mean_steps(config)) / plan.flops.model)
    return [
        f"step           {span(step.seconds)} with micro-batch {config.train.micro_batch}: {step.sentence}",
        f"utilization    MFU {_percent(rates[0])} of {peak / 1e12:,.3g} TFLOP/s, attention counted by its "
        f"causal half ({_percent(square)} by PaLM's convention, the whole square), HFU {_percent(rates[1])}; "
        f"{waits} of the time waits for communication",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _peak(devices: Devices, config: RunConfig) -> float:
    return devices.hardware.peak("bf16" if config.train.precision == "bf16" else "fp32")


def training_seconds(plan: Plan, devices: Devices, precision: str, utilization: float | None = None) -> float:
    """The seconds of all optimizer steps, without saves, evaluations and failures."""
    if utilization is None:
        return plan.seconds
    return plan.tokens * plan.flops.model / (utilization * devices.hardware.peak(precision) * plan.ranks)


def of_devices(seconds: float) -> str:
    """The device time in words. Long times are in the unit in which clusters grant them."""
    return f"{seconds / 3600:,.0f} device hours" if seconds >= 36000 else f"{span(seconds)} of one device"
