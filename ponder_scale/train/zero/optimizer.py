"""Make the optimizers for DeepSpeed: torch's, or DeepSpeed's own where ZeRO needs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch

from ponder_scale.config import RunConfig
from ponder_scale.train.optim import parameter_groups


def make_optimizer(model: Any, config: RunConfig, *, offload: bool) -> torch.optim.Optimizer:
    """The optimizer of a run, at learning rate 0. With `offload` its states and its update are on the CPU."""
    groups = parameter_groups(model, config.optim)
    if config.optim.optimizer == "muon":
        return _muon(groups)
    # DeepSpeed steps some optimizers once at the start to allocate their state. With lr 0 this does not decay the
    # weights. The loop sets the rate of every step.
    shared: dict[str, Any] = {"lr": 0.0, "betas": (config.optim.beta1, config.optim.beta2), "eps": config.optim.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use, so imported only where it is used

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **shared)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **shared)


def _muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    for group in groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]  # tells ZeRO which gradients to orthogonalize
    return load_muon()(groups)


def load_muon() -> Any:
    """DeepSpeed's Muon, changed so that its functions are compiled when they are first called.

    Every engine imports Muon to ask whether its optimizer is one. On import, Muon compiles its functions, which loads
    torch's compiler. That would take a tenth of the time of a start, even in runs that do not use Muon.
    """
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    original = compiler.compile
    compiler.compile = lambda: _when_called
    try:
        return importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer").MuonWithAuxAdam
    finally:
        compiler.compile = original


def _when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = cache(lambda: torch.compile(function))

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        # Inside another compiled function it must stay a plain function, so that it becomes a part of that one.
        return (function if torch.compiler.is_compiling() else compiled())(*arguments, **options)

    return call
