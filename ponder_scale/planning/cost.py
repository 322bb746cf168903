"""What a run costs by arithmetic: parameters, floating-point operations, bytes of state and of communication.

A product of (m, k) and (k, n) counts 2 m k n. With G = 2 V D for one product of a token with the vocabulary:

    a pass, forward            2 P_block + 2 L D (T + 1)      matrices of the layers, causal attention
    pondering embedding        2 G forward, 4 G backward      z = h W^T and p E; dp, dE, dh, dW
    the same by K tokens       1 G + 2 K D, 8 K D             z over all of the vocabulary, the rest over K rows
    last pass's loss           1 G forward, 2 G backward

Model FLOPs (of MFU) count what the mathematics needs: 3 forwards for a pass, 6 G a pondering step (G + 10 K D with K
tokens), 3 G for the loss. Hardware FLOPs (of HFU) add what is computed twice: 1 G a pondering step but with K tokens,
whose scores are kept, and the passes by the recomputation policy.

Attention counts by its causal half, T + 1 of the 2 T of the whole square. PaLM's convention for MFU (arXiv 2204.02311,
B) counts the square: `square_attention` is what it would add. Source of the other counts: the derivation in
`model/pondering_embedding.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ponder_scale.config import RunConfig

GIB = 2**30
CHUNK_ELEMENTS = 2**22  # scores that exist at a time on a CPU
ATTENTION_ROWS = 4  # numbers of width D that attention with the vocabulary holds for a token on a CPU
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
    top_k: int | None = None  # rows that a mixture is made of; None: the whole vocabulary
    tied: bool = False  # the head is the embedding table
    layer_matrices: int = 7  # of a layer, each gathered by itself
    layer_modules: int = 16  # of a layer, each with ZeRO-3's hooks

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
    mixture, twice = 6.0 * product, product
    if shape.feedback != "embedding":
        mixture = 0.0
    elif shape.top_k is not None and shape.top_k < shape.vocabulary:
        mixture, twice = product + 10.0 * shape.top_k * shape.hidden, 0.0
    return Flops(
        passes=3.0 * (steps + 1) * forward,
        pondering=steps * mixture,
        loss=3.0 * product,
        recomputed=RECOMPUTED_FORWARDS[recompute] * (steps + 1) * again + steps * twice,
    )


def square_attention(shape: Shape, pondering_steps: float | None = None) -> float:
    """What PaLM's convention counts beside `flops_per_token(...).model`: the masked half of attention's square."""
    steps = shape.pondering_steps if pondering_steps is None else pondering_steps
    return 3.0 * (steps + 1) * 2.0 * shape.layers * shape.hidden * (shape.sequence - 1)


def step_flops(shape: Shape, recompute: str, pondering_steps: int, tokens: int) -> Flops:
    """FLOPs of one optimizer step over all devices, of the number of pondering steps that it took."""
    each = flops_per_token(shape, recompute, pondering_steps)
    return Flops(tokens * each.passes, tokens * each.pondering, tokens * each.loss, tokens * each.recomputed)


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


def block_bytes(shape: Shape, tokens: int) -> tuple[int, int, int]:
    """What the pondering embedding holds for a block while it runs on a CPU: forward and backward, and the loss.

    `model/backends.py` has two buffers of scores, and the libraries' products a packed copy of a matrix (V, D). Where
    W = E, attention takes their place in the mixture, which holds a few numbers of width D for each token.
    """
    scores = 2 * 4 * min(tokens * shape.vocabulary, CHUNK_ELEMENTS) + 4 * shape.vocabulary * shape.hidden
    mixture = ATTENTION_ROWS * 4 * tokens * shape.hidden if shape.tied and shape.top_k is None else scores
    return mixture, mixture, scores


def kernel_bytes(shape: Shape, tokens: int) -> tuple[int, int, int]:
    """The same of the Triton kernels in bf16: q forward and of the loss, p and dz backward.

    Blocks of tokens and of the vocabulary are those of `model/kernels.py`.
    """
    forward = 2 * min(tokens, KERNEL_BLOCK) * shape.vocabulary
    return forward, 2 * 2 * tokens * min(shape.vocabulary, KERNEL_BLOCK), forward


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
    rounds: float = 1.0  # sweeps through the layers that gather each of them

    @property
    def sentence(self) -> str:
        """For the log of a run."""
        return (
            f"{self.regime}: {self.volume:.1f} x the weights in all-gathers a micro-step, at most "
            f"{self.live_share:.0%} of them gathered at a time"
        )


def weights_kept(shape: Shape, zero: Mapping[str, Any]) -> bool:
    """Whether ZeRO-3 keeps all weights gathered from the first pass to the end of backward."""
    return min(float(zero[LIVE]), float(zero[REUSE])) > shape.parameters


def gathering(
    shape: Shape, zero: Mapping[str, Any], recompute: str, pondering_steps: float | None = None
) -> Gathering | None:
    """What ZeRO-3 does with the weights of S + 1 passes under the limits of `gather_limits`; None for other stages.

    Within both limits every weight is gathered once a micro-step. Beyond, the tables are, and each layer for each sweep
    through the layers: a pass, its backward, its recomputation. `python -m benchmarks comm` counts the same.

    Args:
        pondering_steps: of a step on average; default: the model's.
    """
    if zero["stage"] != 3:
        return None
    if weights_kept(shape, zero):
        return Gathering("ZeRO-3 keeps all weights gathered from the first pass to the end of backward", 1.0, 1.0)
    blocks = shape.block_parameters / shape.parameters
    passes = (shape.pondering_steps if pondering_steps is None else pondering_steps) + 1
    again = recompute in SWEEPS_AGAIN
    sweeps, turns = passes * (3 if again else 2), 2 * passes - 1 if again else 1
    rounds = sweeps - turns * min(1.0, KEPT_AT_TURN / shape.layers)
    live_share = min(1.0, (1.0 - blocks) + LIVE_LAYERS * blocks / shape.layers)
    return Gathering(
        "ZeRO-3 gathers each layer once per pass and releases it", rounds * blocks + (1.0 - blocks), live_share, rounds
    )


def steps_to_tokens(config: RunConfig) -> int:
    """Trained tokens of the whole run."""
    return config.train.sequences_until(config.train.steps) * config.data.seq_len
