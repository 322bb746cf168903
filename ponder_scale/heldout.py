"""Held-out loss of every pass: the same code during training and after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ponder_scale.data.sequences import IGNORE_INDEX, MicroBatch


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy in nats of each of the S + 1 passes, over `tokens` predicted tokens."""

    losses: list[float]
    tokens: int

    @property
    def perplexities(self) -> list[float]:
        """exp of the losses."""
        return [math.exp(loss) for loss in self.losses]


def heldout_losses(
    predict: Callable[[Tensor, Tensor, Tensor | None], Any],
    batches: Iterable[MicroBatch],
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> HeldOut | None:
    """The held-out losses over all ranks, or None where there are no batches.

    Args:
        predict: the model's output for tokens, labels and positions, (B, T) each, as in `MicroBatch`.
        batches: those of `heldout_batches`.
        total: adds a tensor up over the ranks.
    """
    sums = None
    for tokens, labels, position_ids in batches:
        count = (labels != IGNORE_INDEX).sum().double()
        losses = predict(tokens[:, :-1], labels, position_ids).pass_losses.double().cpu()
        part = torch.cat([losses * count, count.unsqueeze(0)])  # (S + 2,)
        sums = part if sums is None else sums + part
    if sums is None:
        return None
    sums = total(sums)
    return HeldOut((sums[:-1] / sums[-1]).tolist(), int(sums[-1]))


def mean_over(parts: Iterable[HeldOut]) -> HeldOut:
    """The mean over the tokens of several sources."""
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)
    columns = zip(*(part.losses for part in parts), strict=True)
    weights = [part.tokens / tokens for part in parts]
    return HeldOut([math.fsum(w * x for w, x in zip(weights, column, strict=True)) for column in columns], tokens)
