"""The optimizers' parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from ponder_scale.config import OptimConfig


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups of parameters with and without weight decay, each in the order of the model.

    `decay: matrices` leaves norms, biases and embedding tables without decay; a tied head is its embedding table.
    With muon the first group is its own: the matrices of the layers, so neither tables nor head. `lr_scale` of a
    group is its learning rate relative to `lr`.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = id(model.get_output_embeddings().weight) if optim.optimizer == "muon" else None  # type: ignore[operator]
    of_muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        matrix = parameter.ndim >= 2 and id(parameter) not in tables
        if optim.optimizer == "muon" and matrix and id(parameter) != head:
            of_muon.append(parameter)
        else:
            (decayed if matrix or optim.decay == "all" else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": of_muon, "weight_decay": optim.weight_decay, "lr_scale": (optim.muon_lr or 0.0) / optim.lr},
        {"params": decayed, "weight_decay": optim.weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if optim.optimizer == "muon":
        adam = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "use_muon": False}
        groups[0] |= {"momentum": optim.muon_momentum, "use_muon": True}
        groups[1:] = [group | adam for group in groups[1:]]
    return [group for group in groups if group["params"]]
