"""What a run costs by arithmetic: parameters, floating-point operations, bytes of state and of communication.

A product of (m, k) and (k, n) counts 2 m k n. With G = 2 V D for one product of a token with the vocabulary:

    a pass, forward            2 P_block + 2 L D (T + 1)      matrices of the layers, causal attention
    pondering embedding        2 G forward, 4 G backward      z = h W^T and p E; dp, dE, dh, dW
    last pass's loss           1 G forward, 2 G backward

Model FLOPs (of MFU) count what the mathematics needs: 3 forwards for a pass, 6 G a pondering step, 3 G for the loss.
Hardware FLOPs (of HFU) add what is computed twice: 1 G a pondering step, and the passes by the recomputation policy.
Source of the counts: the derivation in `model/pondering_embedding.py`; attention as in PaLM (arXiv 2204.02311, B).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ponder_scale.config import RunConfig

GIB = 2**30
# dense bf16 FLOP/s and memory of one device, from the makers' data sheets
DEVICES = {
    "a100": (312e12, 80 * GIB),
    "a100-40": (312e12, 40 * GIB),
    "h100": (989e12, 80 * GIB),
    "h200": (989e12, 141 * 10**9),
    "b200": (2250e12, 180 * 10**9),
}
# dense bf16 FLOP/s by a part of the name that torch gives a device; the first that matches
PEAKS = {
    r"H100 PCIE": 756e12,
    r"H[12]00 NVL": 835e12,
    r"\bG?H(100|200|800)\b": 989e12,
    r"\bG?B200\b": 2250e12,
    r"\bA[18]00\b": 312e12,
    r"\bL40S\b": 362e12,
}
CHUNK_ELEMENTS = 2**22  # scores that exist at a time on a CPU
KERNEL_BLOCK = 8192  # tokens, or columns of the vocabulary, whose scores exist at a time on a GPU
# forwards of a pass that backward repeats, fastest policy first; `pass+layer` repeats the pass, and in it each layer
RECOMPUTED_FORWARDS = {"none": 0.0, "selective": 1.0, "layer": 1.0, "pass": 1.0, "pass+layer": 2.0}
# policies that run through all layers again before their backward; the others recompute a layer beside its backward
SWEEPS_AGAIN = ("pass", "pass+layer")
LIVE_LAYERS = 3  # gathered at a time where layers are released
KEPT_AT_TURN = 2.5  # of them, that are still there when a sweep through the layers is followed by one backwards


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that cost anything."""

    parameters: int
    table_parameters: int  # of the embedding tables and, where it is not one of them, the head
    vocabulary: int
    hidden: int
    layers: int
    sequence: int  # predicted tokens, T
    pondering_steps: int
    feedback: str = "embedding"  # "hidden" has no products of its own; its statistics take one with the vocabulary

    @property
    def block_parameters(self) -> int:
        """Of the matrices that every pass multiplies with; norms and biases are in it and do not matter."""
        return self.parameters - self.table_parameters


@dataclass(frozen=True)
class Flops:
    """Per trained token."""

    passes: float
    pondering: float
    loss: float
    recomputed: float

    @property
    def model(self) -> float:
        """What MFU counts."""
        return self.passes + self.pondering + self.loss

    @property
    def hardware(self) -> float:
        """What HFU counts."""
        return self.model + self.recomputed


def flops_per_token(shape: Shape, recompute: str, pondering_steps: float | None = None) -> Flops:
    """FLOPs of training on one token, forward and backward; `pondering_steps` overrides the model's."""
    steps = shape.pondering_steps if pondering_steps is None else pondering_steps
    product = 2.0 * shape.vocabulary * shape.hidden
    attention = 2.0 * shape.layers * shape.hidden * (shape.sequence + 1)
    forward = 2.0 * shape.block_parameters + attention
    again = forward - attention if recompute == "selective" else forward
    return Flops(
        passes=3.0 * (steps + 1) * forward,
        pondering=6.0 * steps * product if shape.feedback == "embedding" else 0.0,
        loss=3.0 * product,
        recomputed=RECOMPUTED_FORWARDS[recompute] * (steps + 1) * again + steps * product,
    )


def step_flops(shape: Shape, recompute: str, pondering_steps: int, tokens: int) -> Flops:
    """FLOPs of one optimizer step over all devices, of the number of pondering steps that it took."""
    each = flops_per_token(shape, recompute, pondering_steps)
    return Flops(tokens * each.passes, tokens * each.pondering, tokens * each.loss, tokens * each.recomputed)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name in torch ("NVIDIA H100 80GB HBM3"); None where it is not known.

    MFU is `step_flops(...).model / (seconds * devices * peak_flops(name))`, HFU the same of `.hardware`.
    """
    return next((peak for part, peak in PEAKS.items() if re.search(part, device_name.upper())), None)


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank that live from step to step."""

    weights: int
    masters: int
    moments: int
    gradients: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.masters + self.moments + self.gradients


def state_bytes(parameters: int, stage: int, ranks: int, precision: str, *, average: bool = False) -> StateBytes:
    """Bytes of weights, fp32 masters, AdamW's moments and gradients on one rank.

    A running average of the weights counts as a third moment.

    bf16 trains on 2-byte weights and gradients with fp32 masters. In fp32, stage 0 has no separate masters.
    """
    narrow = 2 if precision == "bf16" else 4
    has_masters = precision == "bf16" or stage > 0
    share = -(-parameters // ranks)
    sharded = share if stage >= 1 else parameters
    return StateBytes(
        weights=narrow * (share if stage == 3 else parameters),
        masters=4 * sharded if has_masters else 0,
        moments=(12 if average else 8) * sharded,
        gradients=narrow * (share if stage >= 2 else parameters),
    )


def block_bytes(shape: Shape, tokens: int) -> int:
    """The two buffers through which `model/backends.py` computes the pondering embedding and the loss on a CPU."""
    return 2 * 4 * min(tokens * shape.vocabulary, CHUNK_ELEMENTS)


def kernel_bytes(shape: Shape, tokens: int) -> int:
    """What the Triton kernels of the pondering embedding hold while they run, in bf16: q forward, p and dz backward.

    Blocks of tokens and of the vocabulary are those of `model/kernels.py`.
    """
    forward = min(tokens, KERNEL_BLOCK) * shape.vocabulary
    return 2 * max(forward, 2 * tokens * min(shape.vocabulary, KERNEL_BLOCK))


LIVE, REUSE, PREFETCH = "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"


def is_open(zero: dict[str, Any], key: str) -> bool:
    """Whether a sharding file leaves a setting to us: it has "auto", or nothing."""
    return zero.get(key, "auto") == "auto"


def gather_limits(zero: dict[str, Any], shape: Shape, *, keep: bool) -> dict[str, Any]:
    """ZeRO-3's settings with the limits that the file leaves open set for this model.

    DeepSpeed's own defaults, 1e9 elements, keep all weights of a smaller model gathered from the first pass to the end
    of backward, which saves nothing over ZeRO-2, and gather those of a larger one for each pass, wanted or not.

    Args:
        keep: whether weights may stay gathered for all passes, where the file does not say.
    """
    if zero["stage"] != 3:
        return zero
    reuse = (2 * shape.parameters if keep else 0) if is_open(zero, REUSE) else int(zero[REUSE])
    keeps = reuse > shape.parameters
    layer = max(1, shape.block_parameters // shape.layers)
    live = 2 * shape.parameters if keeps else shape.table_parameters + LIVE_LAYERS * layer
    ours = {REUSE: reuse, LIVE: live, PREFETCH: 50_000_000 if keeps else layer}
    return {**zero, **{key: value for key, value in ours.items() if is_open(zero, key)}}


@dataclass(frozen=True)
class Gathering:
    """ZeRO-3's all-gathers of a micro-step, in multiples of the weights' bytes, and how many weights live at a time."""

    regime: str
    volume: float
    live_share: float

    @property
    def sentence(self) -> str:
        """For the log of a run."""
        return (
            f"{self.regime}: {self.volume:.1f} x the weights in all-gathers a micro-step, at most "
            f"{self.live_share:.0%} of them gathered at a time"
        )


def gathering(shape: Shape, zero: dict[str, Any], recompute: str) -> Gathering | None:
    """What ZeRO-3 does with the weights of S + 1 passes under the limits of `gather_limits`; None for other stages.

    Within both limits every weight is gathered once a micro-step. Beyond, the tables are, and each layer for each sweep
    through the layers: a pass, its backward, its recomputation. `python -m benchmarks comm` counts the same.
    """
    if zero["stage"] != 3:
        return None
    if min(float(zero[LIVE]), float(zero[REUSE])) > shape.parameters:
        return Gathering("ZeRO-3 keeps all weights gathered from the first pass to the end of backward", 1.0, 1.0)
    blocks = shape.block_parameters / shape.parameters
    passes = shape.pondering_steps + 1
    again = recompute in SWEEPS_AGAIN
    sweeps, turns = passes * (3 if again else 2), 2 * passes - 1 if again else 1
    rounds = sweeps - turns * min(1.0, KEPT_AT_TURN / shape.layers)
    live_share = min(1.0, (1.0 - blocks) + LIVE_LAYERS * blocks / shape.layers)
    return Gathering(
        "ZeRO-3 gathers each layer once per pass and releases it", rounds * blocks + (1.0 - blocks), live_share
    )


def steps_to_tokens(config: RunConfig) -> int:
    """Trained tokens of the whole run."""
    return config.train.sequences_until(config.train.steps) * config.data.seq_len
