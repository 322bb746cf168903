"""The held-out loss of every pass. Training and the evaluation after it use the same code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ponder_scale.data.sequences import IGNORE_INDEX, MicroBatch
from ponder_scale.data.text_bytes import TextBytes
from ponder_scale.figures import bits_per_byte, perplexity


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy in nats of each of the S + 1 passes.

    Args:
        tokens: number of predicted tokens that the losses are means over.
        bytes: size of the text that these tokens stand for. None if it is not known exactly.
    """

    losses: list[float]
    tokens: int
    bytes: int | None = None

    @property
    def perplexities(self) -> list[float]:
        """exp of the losses, or inf if a float cannot hold it."""
        return [perplexity(loss) for loss in self.losses]

    @property
    def bits_per_byte(self) -> list[float] | None:
        """For each pass, all bits of these tokens over all their bytes. None if the bytes are not known."""
        found = [bits_per_byte(loss, self.tokens, self.bytes) for loss in self.losses]
        return None if None in found else found  # type: ignore[return-value]


def heldout_losses(
    predict: Callable[[Tensor, Tensor, Tensor | None], Any],
    batches: Iterable[MicroBatch],
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    sizes: TextBytes | None = None,
) -> HeldOut | None:
    """The held-out losses over all ranks. None if there are no batches, or if no label in them counts.

    Args:
        predict: gives the model's output for tokens, labels and positions, (B, T) each, as in `MicroBatch`.
        batches: the batches of `heldout_batches`.
        total: sums a tensor over the ranks.
        sizes: bytes of the tokens. None if they are not known.
    """
    sums = loss_sums(predict, batches, sizes=sizes)
    return None if sums is None else of_sums(total(sums))


def loss_sums(
    predict: Callable[[Tensor, Tensor, Tensor | None], Any],
    batches: Iterable[MicroBatch],
    alive: Callable[[], None] = lambda: None,
    *,
    sizes: TextBytes | None = None,
) -> Tensor | None:
    """The sums of this rank, (S + 4,): the losses of each pass, the labels that count, their bytes if these are known,
    and the number of labels whose bytes are not known.

    `alive` is called for each batch.
    """
    sums = None
    for tokens, labels, position_ids in batches:
        alive()
        count = (labels != IGNORE_INDEX).sum().double()
        known, unknown = (0, int(count)) if sizes is None else sizes.of(tokens[:, :-1], labels)
        losses = predict(tokens[:, :-1], labels, position_ids).pass_losses.double().cpu()
        part = torch.cat([losses * count, torch.tensor([count, known, unknown], dtype=torch.float64)])
        sums = part if sums is None else sums + part
    return sums


def of_sums(sums: Tensor) -> HeldOut | None:
    """The means that follow from `loss_sums`, summed over all ranks. None if no label counts."""
    *losses, count, known, unknown = sums.tolist()
    if not count:
        return None
    return HeldOut([loss / count for loss in losses], int(count), None if unknown else int(known))


def mean_over(parts: Iterable[HeldOut]) -> HeldOut:
    """The mean over the tokens of several sources."""
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)
    columns = zip(*(part.losses for part in parts), strict=True)
    weights = [part.tokens / tokens for part in parts]
    losses = [math.fsum(w * x for w, x in zip(weights, column, strict=True)) for column in columns]
    sizes = [part.bytes for part in parts]
    return HeldOut(losses, tokens, None if None in sizes else sum(sizes))  # type: ignore[arg-type]
