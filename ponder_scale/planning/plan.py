"""What a run will need, before any device is touched: `ponder-scale plan`.

Memory of activations is traced, see `activations`; the rest is arithmetic, see `cost`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from ponder_scale.config import RunConfig
from ponder_scale.figures import count, rate, size, span
from ponder_scale.planning.activations import activation_bytes
from ponder_scale.planning.cost import (
    DEVICES,
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
    state_bytes,
    steps_to_tokens,
)
from ponder_scale.planning.shape import model_shape

USABLE = 0.92  # of a device's memory; the rest is the driver's, NCCL's, and lost between blocks
CLEARLY_SMALL = 0.05  # weights of so small a share of the memory may stay gathered without a closer look


@dataclass(frozen=True)
class Plan:
    """All figures of a run on `ranks` devices. Bytes are of one rank."""

    shape: Shape
    flops: Flops
    states: StateBytes
    gathered_bytes: int
    bucket_bytes: int
    activation_bytes: int
    workspace_bytes: int
    keeps_gradients: bool  # while a micro-batch runs: those of earlier ones, or ZeRO-3's flat buffer
    gathers: Gathering | None
    ranks: int
    tokens: int

    @property
    def memory_bytes(self) -> int:
        """Peak on one rank, without the allocator's fragmentation and the device's own context.

        Activations are gone when the gradients are complete. Until then the whole gradients of a micro-batch are among
        them under every stage: with weights that S + 1 passes share, a gradient is complete when the first pass is.
        """
        states = self.states
        kept = states.weights + states.masters + states.moments + self.gathered_bytes + self.bucket_bytes
        in_backward = self.activation_bytes + self.workspace_bytes + (states.gradients if self.keeps_gradients else 0)
        return kept + max(in_backward, states.gradients)

    def fits(self, memory_bytes: int) -> bool:
        """Whether it runs on devices of so much memory."""
        return self.memory_bytes <= USABLE * memory_bytes


@dataclass(frozen=True)
class Devices:
    """What a run is planned for: `ranks` devices, `per_node` of them in a node, of `memory_bytes` each."""

    ranks: int
    memory_bytes: int
    per_node: int = 1
    gpu: bool = True


def present_devices(config: RunConfig, ranks: int) -> Devices:
    """The devices this process trains on. Without a GPU a rank may use its share of the host's memory."""
    gpu = torch.cuda.is_available()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() if gpu else 1))
    if config.train.memory_gib is not None:
        memory = round(config.train.memory_gib * GIB)
    elif gpu:
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node
    return Devices(ranks, memory, min(per_node, ranks), gpu)


def plan_run(config: RunConfig, sharding: dict[str, Any], configuration: Any, devices: Devices) -> Plan:
    """The plan of a run.

    Args:
        sharding: of `settle_sharding`.
        configuration: of transformers.
    """
    shape = model_shape(configuration, config.data.seq_len)
    zero = sharding["zero_optimization"]
    gathers = gathering(shape, zero, config.train.recompute)
    width = 2 if config.train.precision == "bf16" else 4
    tokens = config.train.micro_batch_sequences * config.data.seq_len
    return Plan(
        shape=shape,
        flops=flops_per_token(shape, config.train.recompute, mean_steps(config)),
        states=state_bytes(
            shape.parameters,
            zero["stage"],
            devices.ranks,
            config.train.precision,
            average=config.optim.ema is not None,
        ),
        gathered_bytes=0 if gathers is None else round(gathers.live_share * shape.parameters * width),
        bucket_bytes=_bucket_bytes(zero, shape.parameters, width),
        activation_bytes=activation_bytes(config, configuration),
        workspace_bytes=kernel_bytes(shape, tokens) if devices.gpu and width == 2 else block_bytes(shape, tokens),
        keeps_gradients=zero["stage"] == 3
        or config.train.global_batch > config.train.micro_batch_sequences * devices.ranks,
        gathers=gathers,
        ranks=devices.ranks,
        tokens=steps_to_tokens(config),
    )


def settle_sharding(
    config: RunConfig, sharding: dict[str, Any], configuration: Any, devices: Devices
) -> dict[str, Any]:
    """The sharding with what the file leaves open set for this model: ZeRO-3's limits and the groups of ZeRO++.

    Weights stay gathered for all passes where they fit beside the rest, which is the least communication.
    """
    zero = dict(sharding["zero_optimization"])
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = devices.per_node
    shape = model_shape(configuration, config.data.seq_len)
    keep = {**sharding, "zero_optimization": gather_limits(zero, shape, keep=True)}
    width = 2 if config.train.precision == "bf16" else 4
    decided = zero["stage"] != 3 or not is_open(zero, REUSE)
    if decided or width * shape.parameters < CLEARLY_SMALL * devices.memory_bytes:
        return keep
    if plan_run(config, keep, configuration, devices).fits(devices.memory_bytes):
        return keep
    return {**sharding, "zero_optimization": gather_limits(zero, shape, keep=False)}


def mean_steps(config: RunConfig) -> float:
    """Expected pondering steps of an optimizer step."""
    schedule, highest = config.train.pondering, config.model.pondering_steps
    if schedule.schedule == "uniform":
        return (schedule.low + highest) / 2
    if schedule.schedule == "ramp":
        share = min(1.0, schedule.ramp_steps / config.train.steps)
        return highest - share * (highest - schedule.low) / 2
    return float(highest)


def _bucket_bytes(zero: dict[str, Any], parameters: int, width: int) -> int:
    """Flat buffers in which stages 2 and 3 collect gradients to reduce them; two where reduction overlaps."""
    if zero["stage"] < 2:
        return 0
    bucket = min(int(zero.get("reduce_bucket_size", 5e8)), parameters if zero["stage"] == 2 else 2**62)
    return bucket * width * (2 if zero["stage"] == 2 and zero.get("overlap_comm") else 1)


def report(plan: Plan, config: RunConfig, *, device: str, utilization: float) -> list[str]:
    """The plan as lines for a person; a line that begins with "warning:" says what will not work."""
    peak, capacity = DEVICES[device]
    seconds = training_seconds(plan, device, utilization)
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
    lines.append(
        f"time           {count(plan.tokens)} tokens at {rate(plan.tokens / seconds)} tokens/s on "
        f"{plan.ranks} x {device} at {utilization:.0%} of {peak / 1e12:,.0f} TFLOP/s: {span(seconds)}, "
        f"{_of_devices(seconds * plan.ranks)}"
    )
    if not plan.fits(round(capacity)):
        lines.append(
            f"warning: {size(plan.memory_bytes)} do not fit {device}'s {size(capacity)} with "
            f"{1 - USABLE:.0%} to spare; lower train.micro_batch, recompute more, or shard more"
        )
    return lines


def training_seconds(plan: Plan, device: str, utilization: float) -> float:
    """Seconds of all optimizer steps, without saves, evaluations and failures."""
    return plan.tokens * plan.flops.model / (utilization * DEVICES[device][0] * plan.ranks)


def _of_devices(seconds: float) -> str:
    """Device time, in the unit in which it is granted where there is much of it."""
    return f"{seconds / 3600:,.0f} device hours" if seconds >= 36000 else f"{span(seconds)} of one device"
