"""Trace the operations of a micro-batch and the memory of its activations, without a device.

The model's own code runs forward and backward on fake tensors, which have shapes but no storage. Meanwhile torch's
tracker adds up the memory that would be alive, and each operation is counted. Everything is linear in the number of
layers, so the traces of two depths give any depth.

The pondering embedding and the loss would run through hundreds of blocks here. Stand-ins take their place, which keep
the same tensors for backward. `cost` counts their blocks.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ponder_scale.config import RunConfig
from ponder_scale.model.backends import Statistics, width
from ponder_scale.model.readout import Ops
from ponder_scale.planning.cost import learned_passes
from ponder_scale.planning.operations import Counting, Operations
from ponder_scale.setup.build import configuration_from_dict, model_class
from ponder_scale.setup.recompute import apply_recompute

Ends = Callable[[str], None]  # called with the name of an op when it ends
DEPTHS = (2, 3)  # layers of the two traced models; with one layer the peak would not be on the line


OPS = ("mixture forward", "mixture backward", "loss")


class Traced(NamedTuple):
    """The trace of a micro-batch, forward and backward, without the blocks of the pondering embedding and the loss."""

    peak_bytes: int  # without weights and gradients
    operations: Operations
    at_op: tuple[int, ...] = (0,) * len(OPS)  # most bytes alive when each of `OPS` ends, without weights


def with_blocks(traced: Traced, blocks: tuple[int, ...]) -> int:
    """The peak with the blocks of each of `OPS`, added when that op ends, because passes and blocks peak apart."""
    return max(traced.peak_bytes, *(alive + block for alive, block in zip(traced.at_op, blocks, strict=True)))


def activation_bytes(config: RunConfig, configuration: Any) -> int:
    """The peak bytes alive in forward and backward of a micro-batch, without weights, gradients and the ops' blocks."""
    return micro_batch(config, configuration).peak_bytes


def micro_batch(config: RunConfig, configuration: Any) -> Traced:
    """The trace of forward and backward of a micro-batch of the run."""
    layers = configuration.num_hidden_layers
    if layers <= DEPTHS[1]:
        return _traced(config, configuration, layers)
    shallow, deep = (_traced(config, configuration, depth) for depth in DEPTHS)
    more = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    peak = shallow.peak_bytes + more * (deep.peak_bytes - shallow.peak_bytes)
    at_op = (a + more * (b - a) for a, b in zip(shallow.at_op, deep.at_op, strict=True))
    return Traced(round(peak), shallow.operations.deeper(deep.operations, more), tuple(round(alive) for alive in at_op))


def _traced(config: RunConfig, configuration: Any, layers: int) -> Traced:
    values = configuration.to_dict()
    # GPT-2 uses the name n_layer, and its configuration maps both names to one value.
    values["n_layer" if "n_layer" in values else "num_hidden_layers"] = layers
    size = config.train.micro_batch_sequences, config.data.seq_len
    train, steps = config.train, configuration.pondering_steps
    options: dict[str, Any] = {"backward_passes": train.pondering.backward_passes}
    if train.pass_losses != "exit":  # the gates weigh the losses instead
        options["pass_weights"] = _weights(train.pass_losses, steps)
    if configuration.halting != "none":
        options["halting_loss"] = train.halting.weight, train.halting.share
    if configuration.extra_heads:
        options["multi_token_weight"] = train.multi_token_weight
    if configuration.feedback == "latent":
        options["refinements"] = configuration.published_refinements[1]  # a step with the most has the peak
    text = json.dumps(values, sort_keys=True)
    return _trace(text, train.recompute, train.precision, size, tuple(options.items()))


def _weights(pass_losses: str, steps: int) -> tuple[float, ...] | None:
    """Weights of the passes' losses that are 0 in as many passes as those of a step are."""
    learned = round(learned_passes(pass_losses, steps))
    return None if pass_losses == "last" else (*[1.0] * learned, *[0.0] * (steps - learned), 1.0)


@lru_cache(maxsize=256)
def _trace(
    values: str, recompute: str, precision: str, size: tuple[int, int], asked: tuple[tuple[str, Any], ...]
) -> Traced:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    configuration = configuration_from_dict(json.loads(values))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = model_class(configuration)(configuration).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model.to_empty(device="cpu")
        apply_recompute(model, recompute)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # `cost` counts gradients with the states
        tokens = torch.zeros(size, dtype=torch.int64)
        tracker, counting = MemTracker(), Counting()
        at_op = dict.fromkeys(OPS, 0)

        def ends(op: str) -> None:
            (now,) = tracker.get_tracker_snapshot("current").values()
            at_op[op] = max(at_op[op], _activations(now))

        stand_ins = Ops(partial(_pondering_embedding, ends), partial(_cross_entropy, ends))
        tracker.track_external(model)
        with tracker, counting:
            tracker._mod_tracker.clear_user_hooks()  # the statistics of each module would take half of the time
            options: dict[str, Any] = {**dict(asked), "skip_logits": True, "ops": stand_ins}
            model(input_ids=tokens, shift_labels=tokens, **options).loss.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return Traced(_activations(peak), counting.operations, tuple(at_op.values()))


def _activations(snapshot: dict[Any, int]) -> int:
    """The bytes alive without weights and buffers, from the tracker's sums by kind."""
    by_kind = {str(kind).split(".")[-1]: size for kind, size in snapshot.items()}
    return by_kind["Total"] - by_kind.get("PARAM", 0) - by_kind.get("BUFFER", 0)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _pondering_embedding(
    ends: Ends, hidden: Tensor, head: Tensor, table: Tensor, *, learn: bool = False, **_: Any
) -> tuple[Tensor, Statistics]:
    mixed, *statistics = _Mixture.apply(hidden, head, table, ends, learn)
    return mixed, Statistics(*statistics)


def _cross_entropy(ends: Ends, hidden: Tensor, head: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Statistics]:
    total, *statistics = _Loss.apply(hidden, head, ends)
    return total, Statistics(*statistics)


def _per_token(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:-1].numel(), dtype=width(hidden))


class _Mixture(torch.autograd.Function):
    """Allocates what the backends of the pondering embedding allocate, except the buffers of a block."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, table: Tensor, ends: Ends, learn: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, loss, entropy = torch.empty_like(hidden), _per_token(hidden), _per_token(hidden)
        kept = [loss] if learn else []  # for the log-sum-exp at temperature 1
        ctx.save_for_backward(hidden, head, table, mixed, _per_token(hidden), _per_token(hidden), *kept)
        ctx.mark_non_differentiable(entropy, *([] if learn else [loss]))
        ctx.ends = ends
        ends("mixture forward")
        return mixed, loss, entropy

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, head, table, *_ = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden, dtype=width(hidden))
        gradients = torch.empty_like(head), torch.empty_like(table)
        ctx.ends("mixture backward")
        return d_hidden.to(hidden.dtype), *gradients, None, None


class _Loss(torch.autograd.Function):
    """Allocates what the backends of the loss allocate. They make the gradients in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ends: Ends) -> tuple[Tensor, Tensor, Tensor]:
        loss, entropy = _per_token(hidden), _per_token(hidden)
        d_hidden, d_head = torch.empty_like(hidden), torch.empty_like(head, dtype=width(head))
        ends("loss")
        ctx.save_for_backward(d_hidden, d_head.to(head.dtype))
        ctx.mark_non_differentiable(loss, entropy)
        return loss.sum(), loss, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_head * grad.to(d_head.dtype), None
