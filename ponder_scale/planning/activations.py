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
from torch.utils._python_dispatch import TorchDispatchMode

from ponder_scale.config import RunConfig
from ponder_scale.model.backends import Statistics, width
from ponder_scale.model.readout import Ops
from ponder_scale.planning.cost import learned_passes
from ponder_scale.planning.operations import Counting, Operations
from ponder_scale.setup.build import configuration_from_dict, model_class
from ponder_scale.setup.recompute import apply_recompute

Ends = Callable[[str], None]  # called with the name of an op when it ends
DEPTHS = (2, 3)  # layers of the two traced models; with one layer the peak would not be on the line


NOT_COUNTED = ("PARAM", "BUFFER")  # names of the tracker's kinds of memory
OPS = ("mixture forward", "mixture backward", "loss")


class Alive(NamedTuple):
    """Bytes alive in a micro-batch, without weights and without the blocks of the pondering embedding and the loss."""

    peak: float
    at_op: tuple[float, ...] = (0,) * len(OPS)  # most when each of `OPS` ends

    def with_blocks(self, blocks: tuple[int, ...]) -> float:
        """The peak with the blocks of each of `OPS`, added when that op ends: passes and blocks peak apart."""
        return max(self.peak, *(alive + block for alive, block in zip(self.at_op, blocks, strict=True)))

    def towards(self, other: Alive, times: float) -> Alive:
        """These bytes and `times` their difference to `other`."""
        at_op = tuple(a + times * (b - a) for a, b in zip(self.at_op, other.at_op, strict=True))
        return Alive(self.peak + times * (other.peak - self.peak), at_op)


class Traced(NamedTuple):
    """The trace of a micro-batch, forward and backward.

    A gradient is complete when all uses of its weight have gone backward. Whether it then stays or goes depends on the
    ZeRO stage. Gradients that are not complete count in both.
    """

    alive: Alive  # without complete gradients
    whole: Alive  # with them
    operations: Operations

    def towards(self, other: Traced, times: float, operations: Operations) -> Traced:
        """This trace and `times` its difference to `other`, with these operations."""
        return Traced(self.alive.towards(other.alive, times), self.whole.towards(other.whole, times), operations)


def activation_bytes(config: RunConfig, configuration: Any) -> int:
    """The peak of a micro-batch in bytes, without weights, complete gradients and the ops' blocks."""
    return round(micro_batch(config, configuration).alive.peak)


def micro_batch(config: RunConfig, configuration: Any) -> Traced:
    """The trace of forward and backward of a micro-batch of the run."""
    layers = configuration.num_hidden_layers
    if layers <= DEPTHS[1]:
        return _traced(config, configuration, layers)
    shallow, deep = (_traced(config, configuration, depth) for depth in DEPTHS)
    more = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return shallow.towards(deep, more, shallow.operations.deeper(deep.operations, more))


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
        tokens, tracker, counting = torch.zeros(size, dtype=torch.int64), MemTracker(), Counting()
        watching = _Watching(tracker)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(watching.completes)
        stand_ins = Ops(partial(_pondering_embedding, watching.ends), partial(_cross_entropy, watching.ends))
        tracker.track_external(model)
        with tracker, counting, watching:
            tracker._mod_tracker.clear_user_hooks()  # the statistics of each module would take half of the time
            options: dict[str, Any] = {**dict(asked), "skip_logits": True, "ops": stand_ins}
            model(input_ids=tokens, shift_labels=tokens, **options).loss.backward()
    return Traced(*watching.found, counting.operations)


class _Watching(TorchDispatchMode):
    """Follows the bytes alive, with and without the gradients that are complete. The trace drops these.

    Args:
        tracker: torch's, which is entered before this.
    """

    def __init__(self, tracker: Any) -> None:
        super().__init__()
        self._tracker, self._complete = tracker, 0
        self._peaks, self._at_op = [0, 0], [dict.fromkeys(OPS, 0) for _ in range(2)]

    @property
    def found(self) -> tuple[Alive, Alive]:
        """Without complete gradients, and with them."""
        without, whole = (Alive(peak, tuple(ops.values())) for peak, ops in zip(self._peaks, self._at_op, strict=True))
        return without, whole

    def ends(self, op: str) -> None:
        """An op ends."""
        for ops, alive in zip(self._at_op, self._alive(), strict=True):
            ops[op] = max(ops[op], alive)

    def completes(self, parameter: Tensor) -> None:
        """A gradient is complete."""
        assert parameter.grad is not None
        self._peaks = list(map(max, self._peaks, self._alive()))
        self._complete += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    def _alive(self) -> tuple[int, int]:
        alive = sum(map(_activations, self._tracker._curr_mem_snap.values()))  # its public snapshot is a deep copy
        return alive, alive + self._complete

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self._peaks = list(map(max, self._peaks, self._alive()))
        return result


def _activations(snapshot: dict[Any, int]) -> int:
    """The bytes alive without weights and buffers, from the tracker's sums by kind."""
    return snapshot["Total"] - sum(size for kind, size in snapshot.items() if getattr(kind, "name", "") in NOT_COUNTED)


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
