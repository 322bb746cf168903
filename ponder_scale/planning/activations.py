"""How much memory the activations of a micro-batch take, without a device: traced, not estimated by formula.

The model's own code runs forward and backward on fake tensors, which have shapes and no storage, while torch's tracker
adds up what would be alive. With two depths the peak of any depth follows, since it is linear in the layers. The
pondering embedding and the loss would run through hundreds of blocks there, so stand-ins take their place, which keep
for backward what they keep; their blocks are counted in `cost`.
"""

from __future__ import annotations

import json
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ponder_scale.config import RunConfig
from ponder_scale.model.backends import Statistics, width
from ponder_scale.model.readout import Ops
from ponder_scale.setup.build import configuration_from_dict, model_class
from ponder_scale.setup.recompute import apply_recompute

DEPTHS = (2, 3)  # layers of the two models that are traced; with one layer the peak is another


def activation_bytes(config: RunConfig, configuration: Any) -> int:
    """Peak bytes alive in forward and backward of a micro-batch, besides weights, gradients and the op's blocks."""
    layers = configuration.num_hidden_layers
    if layers <= DEPTHS[1]:
        return _traced(config, configuration, layers)
    shallow, deep = (_traced(config, configuration, depth) for depth in DEPTHS)
    slope = (deep - shallow) / (DEPTHS[1] - DEPTHS[0])
    return round(deep + slope * (layers - DEPTHS[1]))


def _traced(config: RunConfig, configuration: Any, layers: int) -> int:
    values = configuration.to_dict()
    # GPT-2 calls it otherwise, and its configuration maps both names to one value
    values["n_layer" if "n_layer" in values else "num_hidden_layers"] = layers
    size = config.train.micro_batch_sequences, config.data.seq_len
    return _peak(json.dumps(values, sort_keys=True), config.train.recompute, config.train.precision, size)


@lru_cache(maxsize=256)
def _peak(values: str, recompute: str, precision: str, size: tuple[int, int]) -> int:
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
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # gradients are counted with the states
        stand_ins = Ops(_pondering_embedding, _cross_entropy)
        tokens = torch.zeros(size, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            tracker._mod_tracker.clear_user_hooks()  # they keep statistics of each module, half of the time
            model(input_ids=tokens, shift_labels=tokens, skip_logits=True, ops=stand_ins).loss.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    by_kind = {str(kind).split(".")[-1]: size for kind, size in peak.items()}
    return by_kind["Total"] - by_kind.get("PARAM", 0) - by_kind.get("BUFFER", 0)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _pondering_embedding(hidden: Tensor, head: Tensor, table: Tensor, **_: Any) -> tuple[Tensor, Statistics]:
    mixed, *statistics = _Mixture.apply(hidden, head, table)
    return mixed, Statistics(*statistics)


def _cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Statistics]:
    total, *statistics = _Loss.apply(hidden, head)
    return total, Statistics(*statistics)


def _per_token(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:-1].numel(), dtype=width(hidden))


class _Mixture(torch.autograd.Function):
    """Allocates what the backends of the pondering embedding do, but for the buffers of a block."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, loss, entropy = torch.empty_like(hidden), _per_token(hidden), _per_token(hidden)
        ctx.save_for_backward(hidden, head, table, mixed, _per_token(hidden), _per_token(hidden))
        ctx.mark_non_differentiable(loss, entropy)
        return mixed, loss, entropy

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, ...]:
        hidden, head, table, *_ = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden, dtype=width(hidden))
        gradients = torch.empty_like(head), torch.empty_like(table)
        return d_hidden.to(hidden.dtype), *gradients


class _Loss(torch.autograd.Function):
    """Allocates what the backends of the loss do: its gradients are made in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, entropy = _per_token(hidden), _per_token(hidden)
        d_hidden, d_head = torch.empty_like(hidden), torch.empty_like(head, dtype=width(head))
        ctx.save_for_backward(d_hidden, d_head.to(head.dtype))
        ctx.mark_non_differentiable(loss, entropy)
        return loss.sum(), loss, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_head * grad.to(d_head.dtype)
