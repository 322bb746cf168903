"""The optimizers' parameter groups."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ponder_scale.config import OptimConfig


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups of parameters with and without weight decay, each in the order of the model.

    `decay: matrices` leaves norms, biases and embedding tables without decay; a tied head is its embedding table.
    With muon the first groups are its own: the matrices of the layers, so neither tables nor head. `lr_scale` of a
    group is its learning rate relative to `lr`.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = id(model.get_output_embeddings().weight) if optim.optimizer == "muon" else None  # type: ignore[operator]
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    of_muon: dict[float, list[nn.Parameter]] = {}  # by the factor on their updates
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        matrix = parameter.ndim >= 2 and id(parameter) not in tables
        if optim.optimizer == "muon" and matrix and id(parameter) != head:
            factor = transposed_factor(parameter) if id(parameter) in transposed else 1.0
            of_muon.setdefault(factor, []).append(parameter)
        else:
            (decayed if matrix or optim.decay == "all" else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if optim.optimizer == "muon":
        adam = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "use_muon": False}
        muon = {"momentum": optim.muon_momentum, "use_muon": True}
        rate = (optim.muon_lr or 0.0) / optim.lr
        ours = [
            # decay goes with the learning rate, and is not to be scaled
            {"params": params, "weight_decay": optim.weight_decay / factor, "lr_scale": rate * factor, **muon}
            for factor, params in of_muon.items()
        ]
        groups = [*ours, *(group | adam for group in groups)]
    return [group for group in groups if group["params"]]


def transposed_factor(weight: nn.Parameter) -> float:
    """The factor on Muon's update of a Conv1D's weight (in, out), which is a linear layer's (out, in) transposed.

    DeepSpeed scales an update by sqrt(max(1, rows / columns)), of a weight (out, in); this makes it that of the layer.
    """
    inputs, outputs = weight.shape
    return math.sqrt(outputs / inputs)
