"""Compute what a run costs by arithmetic: parameters, floating-point operations, bytes of state and communication.

A product of (m, k) and (k, n) counts 2 m k n. With G = 2 V D for one product of a token with the vocabulary:

    a pass, forward            2 P_block + 2 L D (T + 1)      matrices of the layers, causal attention
    pondering embedding        2 G forward, 4 G backward      z = h W^T and p E; dp, dE, dh, dW
    the same by K tokens       1 G + 2 K D, 8 K D             z over all of the vocabulary, the rest over K rows
    last pass's loss           1 G forward, 2 G backward; with `exit` that of a pondering embedding
    an earlier pass's loss     nothing                        the mixture makes z, dh and dW already
    the same beside K tokens   2 G backward                   dh and dW over all of the vocabulary
    the same, hidden feedback  1 G forward, 2 G backward      as for the last pass
    an extra head              a layer once, and 1 G forward, 2 G backward
    n positions a token        n (2 P_block + 2 L D (n T + 1))  feedback latent and pause, see `Shape.positions`

Model FLOPs, for MFU, count what the mathematics needs: 3 forwards for a pass, 6 G for a pondering step (G + 10 K D with
K tokens) and 3 G for the loss. Hardware FLOPs, for HFU, add what is computed twice. That is 1 G for a pondering step,
and passes as the recomputation policy says. With K tokens the scores are kept, so the 1 G is needed only for
a pass whose loss is trained.

Attention counts its causal half, T + 1 of the 2 T of the whole square. PaLM's convention for MFU (arXiv 2204.02311, B)
counts the square, and `square_attention` is the difference. The other counts come from the derivation in
`model/pondering_embedding.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ponder_scale.config import INTERLEAVED, RunConfig

GIB = 2**30
CHUNK_ELEMENTS = 2**22  # most scores that exist at a time on a CPU
ATTENTION_ROWS = 4  # rows of width D that attention with the vocabulary holds for each token on a CPU
KERNEL_BLOCK = 8192  # tokens, or columns of the vocabulary, whose scores exist at a time on a GPU
# Forwards of a pass that backward repeats, fastest policy first. `pass+layer` repeats the pass, and each layer in it.
RECOMPUTED_FORWARDS = {"none": 0.0, "selective": 1.0, "layer": 1.0, "pass": 1.0, "pass+layer": 2.0}
# Policies that run through all layers again before their backward. The others recompute a layer beside its backward.
SWEEPS_AGAIN = ("pass", "pass+layer")
LIVE_LAYERS = 3  # layers that are gathered at a time if layers are released
KEPT_AT_TURN = 2.5  # layers that are still gathered when a sweep through the layers turns around


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its cost depends on."""

    parameters: int
    table_parameters: int  # of the embedding tables, and of the head if it is not one of them
    vocabulary: int
    hidden: int
    layers: int
    sequence: int  # predicted tokens, T
    pondering_steps: int
    feedback: str = "embedding"  # "hidden" needs one product with the vocabulary, for its statistics
    top_k: int | None = None  # rows in a mixture; None is the whole vocabulary
    tied: bool = False  # the head is the embedding table
    backward_passes: int | None = None  # the last ones, that gradients flow through; None: all
    refinements: tuple[int, int] = (0, 0)  # fewest and most that a step of feedback "latent" draws
    layer_matrices: int = 7  # matrices of a layer, each of which is gathered by itself
    layer_modules: int = 16  # modules of a layer, each of which has ZeRO-3's hooks
    extra_heads: int = 0  # heads for the tokens further ahead, each of which is a layer that runs once
    head_parameters: int = 0  # of all of them

    @property
    def block_parameters(self) -> int:
        """The parameters of the layers, which every pass multiplies with. The few of norms and biases are included."""
        return self.parameters - self.table_parameters - self.head_parameters

    @property
    def mean_refinements(self) -> float:
        """Those of an average step."""
        return sum(self.refinements) / 2

    def passes(self, pondering_steps: float, refinements: float | None = None) -> float:
        """The number of passes, for a number of pondering steps."""
        if self.feedback not in INTERLEAVED:
            return pondering_steps + 1
        if self.feedback == "pause" or pondering_steps == 0:
            return 1.0
        return pondering_steps + (self.mean_refinements if refinements is None else refinements) + 1

    def positions(self, pondering_steps: float, refinements: float | None = None) -> tuple[float, float]:
        """The positions of a token over all passes, and for each of these the keys that it sees, added up.

        A pass over n positions a token has n of them, which see (n T + 1) / 2 keys on average. The second number is
        twice theirs. Of latents the first passes have 1 to K positions, and the others K + 1.
        """
        k, passes = pondering_steps, self.passes(pondering_steps, refinements)
        if self.feedback not in INTERLEAVED:
            return passes, passes * (self.sequence + 1)
        whole = passes - (k if self.feedback == "latent" else 0)
        positions = whole * (k + 1)
        squares = whole * (k + 1) ** 2
        if self.feedback == "latent":
            positions, squares = positions + k * (k + 1) / 2, squares + k * (k + 1) * (2 * k + 1) / 6
        return positions, self.sequence * squares + positions

    def differentiated(self, pondering_steps: float) -> float:
        """The number of passes that gradients flow through, for a number of pondering steps."""
        passes = self.passes(pondering_steps)
        return passes if self.backward_passes is None else min(self.backward_passes, passes)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, of a trained token or of a step."""

    passes: float
    pondering: float
    loss: float
    recomputed: float

    @property
    def model(self) -> float:
        """The operations that MFU counts."""
        return self.passes + self.pondering + self.loss

    @property
    def hardware(self) -> float:
        """The operations that HFU counts."""
        return self.model + self.recomputed


def learned_passes(pass_losses: str, pondering_steps: float) -> float:
    """How many passes before the last have a loss that is trained in a step, by `train.pass_losses`."""
    return {"last": 0.0, "random": min(1.0, pondering_steps)}.get(pass_losses, pondering_steps)


def flops_per_token(
    shape: Shape,
    recompute: str,
    pondering_steps: float | None = None,
    pass_losses: str = "last",
    refinements: float | None = None,
) -> Flops:
    """The FLOPs of training on one token, forward and backward. `pondering_steps` replaces the model's number.

    Args:
        refinements: those of latents, by default of an average step.
    """
    steps = shape.pondering_steps if pondering_steps is None else pondering_steps
    product = 2.0 * shape.vocabulary * shape.hidden
    if shape.feedback in INTERLEAVED:
        return _interleaved_flops(shape, recompute, steps, refinements)
    attention = 2.0 * shape.layers * shape.hidden * (shape.sequence + 1)
    forward = 2.0 * shape.block_parameters + attention
    heads_attention = 2.0 * shape.extra_heads * shape.hidden * (shape.sequence + 1)
    heads = 2.0 * shape.head_parameters + heads_attention
    again, heads_again = forward, heads
    if recompute == "selective":
        again, heads_again = forward - attention, heads - heads_attention
    learned = learned_passes(pass_losses, steps) * product
    backward = shape.differentiated(steps)  # the last of them feeds nothing back
    mixture, gradient, losses, scores = 2.0 * product, 4.0 * product, 0.0, (backward - 1) * product
    if shape.feedback == "hidden":
        mixture = gradient = 0.0
        losses, scores = 3.0 * learned, steps * product - learned  # the statistics of a pass take a product
    elif shape.top_k is not None and shape.top_k < shape.vocabulary:
        rows = 2.0 * shape.top_k * shape.hidden
        mixture, gradient, losses, scores = product + rows, 4.0 * rows, 2.0 * learned, learned
    last = 3.0 * product
    if pass_losses == "exit":  # the op of the pondering embedding has the losses of single tokens
        read = 1.0
        if shape.feedback == "hidden":
            read, losses, scores = steps + 1.0, 0.0, 0.0
        last, scores = read * 6.0 * product, scores + read * product
    return Flops(
        passes=(steps + 1 + 2.0 * backward) * forward + 3.0 * heads,
        pondering=steps * mixture + (backward - 1) * gradient,
        loss=last + losses + 3.0 * shape.extra_heads * product,
        recomputed=RECOMPUTED_FORWARDS[recompute] * (backward * again + heads_again) + scores,
    )


def _interleaved_flops(shape: Shape, recompute: str, steps: float, refinements: float | None) -> Flops:
    """The FLOPs of a token and the positions after it. Nothing is fed back but hidden states."""
    product = 2.0 * shape.vocabulary * shape.hidden
    positions, keys = shape.positions(steps, refinements)
    attention = 2.0 * shape.layers * shape.hidden * keys
    forward = 2.0 * shape.block_parameters * positions + attention
    again = forward - attention if recompute == "selective" else forward
    return Flops(
        passes=3.0 * forward,
        pondering=0.0,
        loss=3.0 * product,
        recomputed=RECOMPUTED_FORWARDS[recompute] * again + steps * product,  # the statistics of the other positions
    )


def square_attention(shape: Shape, pondering_steps: float | None = None) -> float:
    """The FLOPs that PaLM's convention adds to `flops_per_token(...).model`: the masked half of attention's square."""
    steps = shape.pondering_steps if pondering_steps is None else pondering_steps
    if shape.feedback in INTERLEAVED:
        positions, keys = shape.positions(steps)
        return 3.0 * 2.0 * shape.layers * shape.hidden * (keys - 2.0 * positions)
    forwards = steps + 1 + 2.0 * shape.differentiated(steps)  # a backward takes two
    return (forwards * shape.layers + 3.0 * shape.extra_heads) * 2.0 * shape.hidden * (shape.sequence - 1)


def step_flops(
    shape: Shape,
    recompute: str,
    pondering_steps: int,
    tokens: int,
    pass_losses: str = "last",
    refinements: int | None = None,
) -> Flops:
    """The FLOPs of one optimizer step over all devices, for the pondering steps and refinements that it took."""
    each = flops_per_token(shape, recompute, pondering_steps, pass_losses, refinements)
    return Flops(tokens * each.passes, tokens * each.pondering, tokens * each.loss, tokens * each.recomputed)


@dataclass(frozen=True)
class StateBytes:
    """The bytes on one rank that live from step to step."""

    weights: int
    masters: int
    moments: int
    gradients: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.masters + self.moments + self.gradients


def state_bytes(parameters: int, stage: int, ranks: int, precision: str, *, average: bool = False) -> StateBytes:
    """The bytes of weights, fp32 masters, AdamW's moments and gradients on one rank.

    bf16 trains on 2-byte weights and gradients with fp32 masters. In fp32, stage 0 has no separate masters. A running
    average of the weights counts as a third moment.
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


def block_bytes(shape: Shape, tokens: int, *, learned: bool = False) -> tuple[int, int, int]:
    """The bytes of a block on a CPU while it runs: pondering embedding forward, its backward, and the loss.

    `model/backends.py` has two buffers of scores, and the libraries' products have a packed copy of a matrix (V, D). If
    W = E, the mixture uses attention instead, which holds a few rows of width D for each token.

    Args:
        learned: the losses of earlier passes are trained. Their backward needs a third buffer of scores, attention a
            copy of W and E and of their gradients, K tokens a second gradient of W.
    """
    scores = 2 * 4 * min(tokens * shape.vocabulary, CHUNK_ELEMENTS) + 4 * shape.vocabulary * shape.hidden
    of_heads = 4 * shape.vocabulary * shape.hidden  # the heads have one loss for all of their tokens
    of_heads += 2 * 4 * min(max(1, shape.extra_heads) * tokens * shape.vocabulary, CHUNK_ELEMENTS)
    attention, table = shape.tied and shape.top_k is None, 4 * shape.vocabulary * shape.hidden
    mixture = ATTENTION_ROWS * 4 * tokens * shape.hidden if attention else scores
    if not learned:
        return mixture, mixture, of_heads
    if attention:
        return mixture, mixture + 4 * table, of_heads
    more = 4 * min(tokens * shape.vocabulary, CHUNK_ELEMENTS) if shape.top_k is None else table
    return mixture, mixture + more, of_heads


def kernel_bytes(shape: Shape, tokens: int) -> tuple[int, int, int]:
    """The bytes of a block of the Triton kernels in bf16, in the order of `block_bytes`.

    Forward and the loss hold q, backward holds p and dz. The blocks of tokens and of the vocabulary are those of
    `model/kernels.py`.
    """
    forward = 2 * min(tokens, KERNEL_BLOCK) * shape.vocabulary
    loss = 2 * min(max(1, shape.extra_heads) * tokens, KERNEL_BLOCK) * shape.vocabulary
    return forward, 2 * 2 * tokens * min(shape.vocabulary, KERNEL_BLOCK), loss


LIVE, REUSE, PREFETCH = "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"


def is_open(zero: dict[str, Any], key: str) -> bool:
    """Whether a sharding file leaves a setting open: it has "auto", or does not have the key."""
    return zero.get(key, "auto") == "auto"


def gather_limits(zero: dict[str, Any], shape: Shape, *, keep: bool) -> dict[str, Any]:
    """ZeRO-3's settings, with the limits that the file leaves open set for this model.

    DeepSpeed's own defaults of 1e9 elements do not look at the model. The weights of a smaller model stay gathered from
    the first pass to the end of backward, which saves nothing over ZeRO-2. Those of a larger one are gathered for each
    pass.

    Args:
        keep: whether weights may stay gathered for all passes, if the file does not say so.
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
    """ZeRO-3's all-gathers of a micro-step."""

    regime: str
    volume: float  # in multiples of the weights' bytes
    live_share: float  # most weights that are gathered at a time, as a share of all
    rounds: float = 1.0  # how often each layer is gathered

    @property
    def sentence(self) -> str:
        """The regime in words, for the log of a run."""
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
    """The all-gathers of S + 1 passes under the limits of `gather_limits`. None for stages other than 3.

    If all weights fit within both limits, each is gathered once a micro-step. Otherwise that is true of the tables
    only, and of the extra heads, which are the last in forward and the first in backward. Each layer is gathered for
    each sweep through the layers: a pass, its backward, its recomputation.
    `python -m benchmarks comm` counts the same on real ranks.

    Args:
        pondering_steps: average over the steps. The default is the model's number.
    """
    if zero["stage"] != 3:
        return None
    if weights_kept(shape, zero):
        return Gathering("ZeRO-3 keeps all weights gathered from the first pass to the end of backward", 1.0, 1.0)
    blocks = shape.block_parameters / shape.parameters
    steps = shape.pondering_steps if pondering_steps is None else pondering_steps
    backward, again = shape.differentiated(steps), recompute in SWEEPS_AGAIN
    sweeps, turns = shape.passes(steps) + backward * (2 if again else 1), 2 * backward - 1 if again else 1
    rounds = sweeps - turns * min(1.0, KEPT_AT_TURN / shape.layers)
    # the heads are layers too, which take turns
    live_share = min(1.0, shape.table_parameters / shape.parameters + LIVE_LAYERS * blocks / shape.layers)
    return Gathering(
        "ZeRO-3 gathers each layer once per pass and releases it", rounds * blocks + (1.0 - blocks), live_share, rounds
    )


def steps_to_tokens(config: RunConfig) -> int:
    """The trained tokens of the whole run."""
    return config.train.sequences_until(config.train.steps) * config.data.seq_len
