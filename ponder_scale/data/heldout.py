"""Held-out loss of every pass: the same code during training and after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ponder_scale.data.sequences import IGNORE_INDEX, MicroBatch
from ponder_scale.figures import perplexity


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy in nats of each of the S + 1 passes, over `tokens` predicted tokens."""

    losses: list[float]
    tokens: int

    @property
    def perplexities(self) -> list[float]:
        """exp of the losses; inf where that is more than a float holds."""
        return [perplexity(loss) for loss in self.losses]


def heldout_losses(
    predict: Callable[[Tensor, Tensor, Tensor | None], Any],
    batches: Iterable[MicroBatch],
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> HeldOut | None:
    """The held-out losses over all ranks, or None where there are no batches, or no label in them counts.

    Args:
        predict: the model's output for tokens, labels and positions, (B, T) each, as in `MicroBatch`.
        batches: those of `heldout_batches`.
        total: adds a tensor up over the ranks.
    """
    sums = loss_sums(predict, batches)
    return None if sums is None else of_sums(total(sums))


def loss_sums(
    predict: Callable[[Tensor, Tensor, Tensor | None], Any],
    batches: Iterable[MicroBatch],
    alive: Callable[[], None] = lambda: None,
) -> Tensor | None:
    """The summed losses of each pass and, last, their count, (S + 2,), of this rank. `alive` is called for each."""
    sums = None
    for tokens, labels, position_ids in batches:
        alive()
        count = (labels != IGNORE_INDEX).sum().double()
        losses = predict(tokens[:, :-1], labels, position_ids).pass_losses.double().cpu()
        part = torch.cat([losses * count, count.unsqueeze(0)])  # (S + 2,)
        sums = part if sums is None else sums + part
    return sums


def of_sums(sums: Tensor) -> HeldOut | None:
    """The means of `loss_sums`, those of all ranks added up; None where no label counts."""
    if not sums[-1]:
        return None
    return HeldOut((sums[:-1] / sums[-1]).tolist(), int(sums[-1]))


def mean_over(parts: Iterable[HeldOut]) -> HeldOut:
    """The mean over the tokens of several sources."""
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)
    columns = zip(*(part.losses for part in parts), strict=True)
    weights = [part.tokens / tokens for part in parts]
    return HeldOut([math.fsum(w * x for w, x in zip(weights, column, strict=True)) for column in columns], tokens)
