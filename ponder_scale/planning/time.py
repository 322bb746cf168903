"""Compute the time of an optimizer step as a sum of named terms. Each is counted work over a rate of the hardware.

    products       matrix products of forward and backward, by shape
    attention      kernels of attention
    elementwise    everything else in the passes: bytes that are read and written, exponentials
    vocabulary     pondering embeddings and the loss: products with the vocabulary, or with K rows of it
    recomputation  products, attention and elementwise work that backward repeats by the policy
    host           time that the device waits for the host, which starts operations and runs ZeRO-3's hooks
    gathers        of weights: ZeRO-3's in each micro-step, or one after each update of stages 1 and 2
    reductions     of gradients
    offload        copies to and from the host's memory, over PCIe
    optimizer      the update, on the device or the host

The terms have only that part of the links' time that computation does not hide. The gather of a layer is hidden by the
layer before it. All passes share the weights, so a gradient is complete only when the first pass has gone backwards.
That is why only the backward of one of S + 1 passes can hide the reductions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ponder_scale.config import INTERLEAVED
from ponder_scale.figures import span
from ponder_scale.planning.cost import PREFETCH, Shape, gathering, weights_kept
from ponder_scale.planning.hardware import Hardware, Link
from ponder_scale.planning.operations import AGAIN, BACKWARD, FORWARD, Operations, Product, Rest

MIXTURE_PRODUCTS = 2, 5  # with the vocabulary, for a token and pondering step: forward, backward as z is made again
LOSS_PRODUCTS = 3
LEARNED_PRODUCTS = {"hidden": 2, "top_k": 3}  # more of a pass whose loss is trained, beside its statistics
TOP_K_ROWS = 1, 4  # times that K rows of width D are read or written: forward, backward
HOOK_CALLS = 12  # ZeRO-3's hooks on a module take as long as starting this many operations
NORM_CALLS = 4  # small collectives of an update: the norm, whether all is finite, the agreement of the ranks
BUCKET_COPIES = 6  # times that a gradient is read or written: into a bucket, divided by the ranks, out of it
BUCKET = 5e8  # numbers that ZeRO reduces at a time by default


@dataclass(frozen=True)
class Job:
    """The work of one rank in an optimizer step.

    Args:
        operations: operations of a micro-batch, with the pondering steps of `shape`.
        tokens: tokens of a micro-batch.
        micro_steps: number of micro-steps in an optimizer step.
        pondering_steps: average number in an optimizer step.
        zero: `zero_optimization` of the sharding, with its limits settled.
        width: bytes of a weight, and of its gradient.
        learned_passes: passes before the last whose loss is trained, on average.
        exits: the loss is the expected one over the exits, whose losses of single tokens the mixture's op computes.
    """

    operations: Operations
    shape: Shape
    tokens: int
    micro_steps: float
    pondering_steps: float
    zero: Mapping[str, Any]
    recompute: str
    ranks: int
    per_node: int
    width: int
    learned_passes: float = 0.0
    exits: bool = False

    @property
    def precision(self) -> str:
        """The precision whose peak counts."""
        return "bf16" if self.width == 2 else "fp32"

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero["stage"])

    @property
    def share(self) -> float:
        """The positions of an average step over those that `operations` were counted for."""
        shape = self.shape
        return (
            shape.positions(self.pondering_steps)[0] / shape.positions(shape.pondering_steps, shape.refinements[1])[0]
        )

    @property
    def differentiated(self) -> float:
        """Passes that gradients flow through, on average."""
        return self.shape.differentiated(self.pondering_steps)


@dataclass(frozen=True)
class StepTime:
    """The seconds of an optimizer step by term."""

    products: float
    attention: float
    elementwise: float
    vocabulary: float
    recomputation: float
    host: float
    gathers: float
    reductions: float
    offload: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """The sum of all terms."""
        return sum(getattr(self, entry.name) for entry in fields(self))

    @property
    def communication(self) -> float:
        """The share of the step in which ranks only wait for links."""
        return (self.gathers + self.reductions) / self.seconds

    def terms(self) -> dict[str, float]:
        """The terms that take time by name, largest first."""
        terms = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: terms[name] for name in sorted(terms, key=terms.__getitem__, reverse=True) if terms[name] > 0}

    @property
    def sentence(self) -> str:
        """The terms in words, without those below a thousandth of the step."""
        least = self.seconds / 1000
        return ", ".join(f"{name} {span(seconds)}" for name, seconds in self.terms().items() if seconds >= least)


NO_TIME = StepTime(*[0.0] * len(fields(StepTime)))


def step_time(job: Job, hardware: Hardware) -> StepTime:
    """The time of a step on this hardware."""
    once = {phase: _compute(job, hardware, (phase,)) for phase in (FORWARD, BACKWARD, AGAIN)}
    products, attention, elementwise = (
        once[FORWARD][index] + once[BACKWARD][index] for index in range(3)
    )  # seconds of a micro-step
    recomputation = sum(once[AGAIN])
    vocabulary = _vocabulary(job, hardware)
    computing = products + attention + elementwise + recomputation + vocabulary
    hidden = hardware.asynchronous
    backward = (sum(once[BACKWARD]) + recomputation) / job.differentiated  # of the pass that completes gradients
    micro_reduce, step_reduce = _reductions(job, hardware, backward if hidden else 0.0)
    micro_gather, step_gather = _gathers(job, hardware, computing if hidden else 0.0)
    micro_offload, step_offload, optimizer = _update(job, hardware)
    n = job.micro_steps
    return StepTime(
        products=n * products,
        attention=n * attention,
        elementwise=n * elementwise,
        vocabulary=n * vocabulary,
        recomputation=n * recomputation,
        host=n * _host(job, hardware, computing),
        gathers=n * micro_gather + step_gather,
        reductions=n * micro_reduce + step_reduce,
        offload=n * micro_offload + step_offload,
        optimizer=optimizer,
    )


def product_seconds(product: Product, hardware: Hardware, precision: str, share: float | None = None) -> float:
    """The seconds of all `times` of a product. `share` replaces the share of the peak that large products reach."""
    rate = hardware.peak(precision) * (hardware.product_share if share is None else share)
    edges = hardware.product_edge * (1 / product.m + 1 / product.n + 1 / product.k)
    return product.flops * (1.0 + edges) / rate


def collective_seconds(kind: str, size: float, calls: float, ranks: int, per_node: int, hardware: Hardware) -> float:
    """The seconds of `calls` collectives over `size` bytes in total, run as a ring.

    Between nodes, all adapters of a node carry the bytes of the ring. The links inside of the node limit their rate.
    """
    if ranks == 1 or calls <= 0:
        return 0.0
    nodes = math.ceil(ranks / per_node)
    inside, between = hardware.inside, hardware.between
    rate = inside.bytes_per_second[kind]
    if nodes > 1:
        rate = between.bytes_per_second[kind] * per_node
        rate = min(rate, inside.bytes_per_second[kind]) if per_node > 1 else rate
    rounds = 2 if kind == "all_reduce" else 1
    latency = (between if nodes > 1 else inside).start_seconds + rounds * (
        (ranks - nodes) * inside.hop_seconds + (nodes - 1) * between.hop_seconds
    )
    return calls * latency + rounds * size * (ranks - 1) / ranks / rate


def _compute(job: Job, hardware: Hardware, phases: Iterable[str]) -> tuple[float, float, float]:
    """The seconds of products, attention and all else of a micro-batch in some phases."""
    phases = set(phases)
    products = sum(
        product_seconds(product, hardware, job.precision)
        for product in job.operations.products
        if product.phase in phases
    )
    attention = elementwise = 0.0
    for phase in phases:
        rest: Rest = job.operations.rest[phase]
        attention += rest.attention_flops / (hardware.peak(job.precision) * hardware.attention_share)
        elementwise += rest.bytes / hardware.memory_bytes_per_second + rest.costly / hardware.costly_per_second
        if not hardware.asynchronous:
            elementwise += rest.calls * hardware.call_seconds
    return job.share * products, job.share * attention, job.share * elementwise


def _vocabulary(job: Job, hardware: Hardware) -> float:
    """The seconds of the pondering embeddings and the loss of a micro-batch, forward and backward."""
    shape, tokens = job.shape, float(job.tokens)

    def products(way: str, count: float) -> float:
        product = Product(FORWARD, tokens, shape.vocabulary, shape.hidden, count)
        return product_seconds(product, hardware, job.precision, hardware.vocabulary_share[way])

    def times(counts: tuple[int, int]) -> float:
        return counts[0] * job.pondering_steps + counts[1] * (job.differentiated - 1)

    mixture = "tied" if shape.tied else "mixture"
    last = products(mixture, sum(MIXTURE_PRODUCTS)) if job.exits else products("loss", LOSS_PRODUCTS)
    loss = last + products("loss", LOSS_PRODUCTS * shape.extra_heads)
    if shape.feedback == "hidden" or shape.feedback in INTERLEAVED:
        if job.exits:  # each pass is read like the last
            return loss + job.pondering_steps * last
        statistics = job.pondering_steps + LEARNED_PRODUCTS["hidden"] * job.learned_passes
        return loss + products("loss", statistics)
    if shape.top_k is not None:
        rows = times(TOP_K_ROWS) * tokens * shape.top_k * shape.hidden * job.width
        loss += products("loss", LEARNED_PRODUCTS["top_k"] * job.learned_passes)
        return loss + products("top_k", job.pondering_steps) + rows / hardware.memory_bytes_per_second
    return loss + products(mixture, times(MIXTURE_PRODUCTS))


def _host(job: Job, hardware: Hardware, computing: float) -> float:
    """The seconds of a micro-step in which the device waits for the host."""
    hooks = 0.0
    if job.stage == 3:
        again = any(product.phase == AGAIN for product in job.operations.products)
        sweeps = job.shape.passes(job.pondering_steps) + job.differentiated * (2 if again else 1)
        hooks = sweeps * job.shape.layers * job.shape.layer_modules * HOOK_CALLS * hardware.call_seconds
    if not hardware.asynchronous:
        return hooks
    calls = job.share * sum(rest.calls for rest in job.operations.rest.values())
    return max(0.0, calls * hardware.call_seconds + hooks - computing)


def _gathers(job: Job, hardware: Hardware, computing: float) -> tuple[float, float]:
    """The seconds of gathers of weights that nothing hides, in each micro-step and once a step."""
    size = float(job.shape.parameters * job.width)
    if job.ranks == 1 or job.stage == 0:
        return 0.0, 0.0
    if job.stage < 3:
        return 0.0, collective_seconds("all_gather", size, 1, job.ranks, job.per_node, hardware)
    gathers = gathering(job.shape, job.zero, job.recompute, job.pondering_steps)
    assert gathers is not None
    group = int(job.zero.get("zero_hpz_partition_size", 1))
    ranks = group if group > 1 else job.ranks
    size *= 0.5 if job.zero.get("zero_quantized_weights") else 1.0
    if weights_kept(job.shape, job.zero):
        calls, sweeps = 1.0 * math.ceil(job.shape.parameters / float(job.zero[PREFETCH])), 1.0
        hiding = computing / (3 * job.shape.passes(job.pondering_steps))  # the first pass's forward
    else:
        sweeps = gathers.rounds
        calls = sweeps * job.shape.layers * job.shape.layer_matrices
        hiding = computing
    seconds = collective_seconds("all_gather", gathers.volume * size, calls, ranks, job.per_node, hardware)
    pieces = sweeps * job.shape.layers  # the gather of a layer is hidden by the layer before it
    return seconds / pieces + max(0.0, (1 - 1 / pieces) * (seconds - hiding)), 0.0


def _reductions(job: Job, hardware: Hardware, hiding: float) -> tuple[float, float]:
    """The seconds of reductions of gradients that nothing hides, in each micro-step and once a step."""
    if job.ranks == 1:
        return 0.0, 0.0
    size = float(job.shape.parameters * job.width) * (0.25 if job.zero.get("zero_quantized_gradients") else 1.0)
    kind = "reduce_scatter" if job.stage == 3 else "all_reduce"
    calls = math.ceil(job.shape.parameters / float(job.zero.get("reduce_bucket_size", BUCKET)))
    seconds = collective_seconds(kind, size, calls, job.ranks, job.per_node, hardware)
    small = collective_seconds("all_reduce", 0.0, NORM_CALLS, job.ranks, job.per_node, hardware)
    copies = BUCKET_COPIES * job.shape.parameters * job.width / hardware.optimizer_bytes_per_second
    if job.stage < 2:  # once, when all micro-steps are done
        return 0.0, copies + seconds + small
    if not job.zero.get("overlap_comm", job.stage == 3):
        return copies + seconds, small
    return copies + max(seconds / calls, seconds - hiding), small


def _update(job: Job, hardware: Hardware) -> tuple[float, float, float]:
    """The seconds of offload in each micro-step, of offload once a step, and of the optimizer's update."""
    own = job.shape.parameters / (job.ranks if job.stage else 1)
    narrow, wide = own * job.width, 4.0 * own
    moved = 10 * wide + (2 * narrow if job.width < 4 else 0.0)  # 7 for AdamW, 3 for norm, scale and clipping
    micro = 0.0
    if job.stage == 3 and "offload_param" in job.zero:
        gathers = gathering(job.shape, job.zero, job.recompute, job.pondering_steps)
        micro = (gathers.volume if gathers else 0.0) * narrow / hardware.host_bytes_per_second
    if "offload_optimizer" not in job.zero:
        return micro, 0.0, moved / hardware.optimizer_bytes_per_second
    # Gradients go to the host in each micro-step, and weights come back once a step.
    micro += narrow / hardware.host_bytes_per_second
    return micro, narrow / hardware.host_bytes_per_second, moved / hardware.host_optimizer_bytes_per_second


def link_of(job: Job, hardware: Hardware) -> Link:
    """The slowest link that the collectives of a job cross."""
    return hardware.between if job.ranks > job.per_node else hardware.inside
