"""The optimizers' parameter groups."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ponder_scale.config import OptimConfig
from ponder_scale.model.halting import HaltingGates
from ponder_scale.setup.width import learning_rate_scales


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups of parameters with and without weight decay, each in the order of the model.

    `decay: matrices` leaves norms, biases and embedding tables without decay. A tied head counts as its embedding
    table. With muon, the first groups are those that Muon updates: the matrices of the layers alone.
    `lr_scale` of a group is its learning rate relative to `lr`. `mup_base_width` sets it by the shape of the weight.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outside = {id(model.get_output_embeddings().weight)}  # type: ignore[operator]  # of the layers
    outside |= {
        id(weight) for module in model.modules() if isinstance(module, HaltingGates) for weight in module.parameters()
    }
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    of_muon: dict[float, list[nn.Parameter]] = {}  # key: the factor on their updates
    of_adam: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}  # key: decayed, scale
    scales = learning_rate_scales(model, optim.mup_base_width)
    for parameter in model.parameters():
        matrix = parameter.ndim >= 2 and id(parameter) not in tables
        if optim.optimizer == "muon" and matrix and id(parameter) not in outside:
            factor = transposed_factor(parameter) if id(parameter) in transposed else 1.0
            of_muon.setdefault(factor, []).append(parameter)
        else:
            of_adam.setdefault((matrix or optim.decay == "all", scales[id(parameter)]), []).append(parameter)
    groups: list[dict[str, Any]] = [
        # the optimizer multiplies decay by the learning rate, so dividing it here leaves the decay itself unscaled
        {"params": params, "weight_decay": optim.weight_decay / scale if decayed else 0.0, "lr_scale": scale}
        for (decayed, scale), params in of_adam.items()
    ]
    if optim.optimizer == "muon":
        adam = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "use_muon": False}
        muon = {"momentum": optim.muon_momentum, "use_muon": True}
        rate = (optim.muon_lr or 0.0) / optim.lr
        ours = [
            {"params": params, "weight_decay": optim.weight_decay / factor, "lr_scale": rate * factor, **muon}
            for factor, params in of_muon.items()
        ]
        groups = [*ours, *(group | adam for group in groups)]
    return [group for group in groups if group["params"]]


def transposed_factor(weight: nn.Parameter) -> float:
    """The factor on Muon's update of a Conv1D's weight (in, out), which is a linear layer's (out, in) transposed.

    DeepSpeed scales an update by sqrt(max(1, rows / columns)) and assumes a weight (out, in). The factor corrects this
    for the transposed weight.
    """
    inputs, outputs = weight.shape
    return math.sqrt(outputs / inputs)
