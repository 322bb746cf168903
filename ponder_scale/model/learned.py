"""Learned losses of passes that also feed back a mixture: the gradients of their logits.

N tokens, D hidden size, V vocabulary; y = h W^T (N, V), and a = dL/dloss of each token, 0 where the label is ignored:

    dy = a (softmax(y) - [v is the label])        dh = dy W        dW = dy^T h

The backward of the mixture computes y, dh and dW anyway, so the losses need no further product with the vocabulary.
Forward already has the losses. The log-sum-exp is the loss plus the label's logit, so nothing more is kept for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import IGNORE_INDEX, add_product, chunk, power_above, scores, wide, width


class Learned(NamedTuple):
    """The tensors that backward needs if the loss of each token is learned, (N,) each."""

    labels: Tensor
    lse: Tensor  # log-sum-exp of the logits at temperature 1; infinite where the label is ignored
    slopes: Tensor  # a = dL/dloss; 0 where the label is ignored

    def above(self, shrink: Tensor | None) -> Learned:
        """The same, with the slopes divided by the result of `shrinkage`."""
        return self if shrink is None else self._replace(slopes=self.slopes / shrink)

    def subtract_labels(self, dz: Tensor, start: int) -> None:
        """dz -= a [v is the label], in place, for columns of the vocabulary from `start` on."""
        column = self.labels - start
        inside = (column >= 0) & (column < dz.shape[1])
        dz.scatter_add_(
            1, column.clamp(0, dz.shape[1] - 1).unsqueeze(1), torch.where(inside, -self.slopes, 0.0).unsqueeze(1)
        )


def learned_of(hidden: Tensor, head: Tensor, labels: Tensor, loss: Tensor, slopes: Tensor) -> Learned:
    """The tensors for backward, from the losses of forward. The log-sum-exp is the loss plus the label's logit."""
    counted = labels != IGNORE_INDEX
    picked = (wide(hidden) * wide(head[labels.clamp(min=0)])).sum(-1)
    return Learned(labels, torch.where(counted, loss + picked, torch.inf), torch.where(counted, slopes, 0.0))


def loss_gradients(
    hidden: Tensor, head: Tensor, learned: Learned, need_hidden: bool, need_head: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dh and dW of only the learned losses, in the dtype of sums, by three products in blocks of the vocabulary."""
    tokens, vocabulary = hidden.shape[0], head.shape[0]
    d_hidden = torch.zeros_like(hidden, dtype=width(hidden)) if need_hidden else None
    d_head = torch.zeros_like(head, dtype=width(head)) if need_head else None
    fp16 = hidden.dtype == torch.float16 and tokens > 0
    shrink = power_above(learned.slopes.abs().amax()) if fp16 else None
    learned = learned.above(shrink)
    columns = chunk(hidden, vocabulary, tokens)
    buffer = hidden.new_empty(tokens * columns, dtype=width(hidden))
    for start in range(0, vocabulary, columns):
        part = slice(start, min(start + columns, vocabulary))
        dz = buffer[: tokens * (part.stop - start)].view(tokens, -1)  # (N, n)
        scores(hidden, head[part], learned.lse.unsqueeze(1), 1.0, dz).exp_().mul_(learned.slopes.unsqueeze(1))
        learned.subtract_labels(dz, start)
        narrow = dz.to(hidden.dtype)
        if d_hidden is not None:
            add_product(d_hidden, narrow, head[part])
        if d_head is not None:
            add_product(d_head[part], narrow.t(), hidden)
    for gradient in (d_hidden, d_head):
        if gradient is not None and shrink is not None:
            gradient.mul_(shrink)
    return d_hidden, d_head
