"""Runs whose loss is multiplied at a step, so that they skip, rewind or go on."""

from __future__ import annotations

from typing import Any

import torch

from ponder_scale.config import RunConfig
from ponder_scale.settings import load


def train_with_an_incident(case: dict[str, Any]) -> int:
    """Train; at step `at` of the attempt rank 1's second loss is multiplied by `factor`, or a bit of rank 2 flips."""
    from ponder_scale.train import loop
    from ponder_scale.train.survive.incidents import Incidents
    from ponder_scale.train.zero.engine import Engine

    torch.set_num_threads(1)
    at, micro_batches, begins = case.get("at"), [], []
    backward, begin_step = Engine._backward, Incidents.begin_step

    def begin(self: Any) -> None:
        begins.append(1)
        micro_batches.clear()
        if len(begins) == at and "factor" not in case and self._engine.rank == 2:
            next(self._engine.module.parameters()).data.view(torch.int16)[0, 0] ^= 1
        begin_step(self)

    def sick(self: Any, loss: torch.Tensor) -> None:
        micro_batches.append(1)
        mine = len(begins) == at and len(micro_batches) == 2 and self.rank == 1
        backward(self, loss * case["factor"] if mine and "factor" in case else loss)

    Engine._backward = sick  # type: ignore[method-assign]
    Incidents.begin_step = begin  # type: ignore[method-assign]
    return loop.train(load(RunConfig, None, case["overrides"]))


FLAT = ["optim.schedule=constant", "optim.warmup_steps=0", "checkpoint.every_steps=2"]
