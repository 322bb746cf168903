"""The pondering embedding as attention, by torch's flash kernel for CPUs: query h, keys W, values E, one head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import IGNORE_INDEX, Kept, Mixture, chunk, entropy_of, label_loss, wide, width
from .learned import Learned


def mix(
    hidden: Tensor, head: Tensor, table: Tensor, labels: Tensor | None, temperature: float, scale: float, keep: bool
) -> Mixture:
    """Like `backends.mix`."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mean, lse = attend(_one_head(hidden), _one_head(head), _one_head(table), 0.0, False, scale=1.0 / temperature)
    mean, lse = mean[0, 0], lse.flatten().to(width(hidden))
    loss, entropy = (hidden.new_zeros(hidden.shape[0], dtype=width(hidden)) for _ in range(2))
    if labels is not None:
        loss, entropy = _attention_statistics(hidden, head, table, labels, mean, lse, temperature)
    return Mixture(mean * scale, loss, entropy, mean if keep else None, None, lse, torch.ones_like(lse))


def gradients(
    kept: Kept,
    grad: Tensor,
    needed: Sequence[bool],
    temperature: float,
    scale: float,
    learned: Learned | None = None,
) -> tuple[Tensor, ...]:
    """Like `backends.gradients`, but always gives all three. Losses can learn only at temperature 1."""
    attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    operands, mean = [grad * scale, kept.hidden, kept.head, kept.table], kept.mean
    if learned is not None:
        # Add a column with a in g, 1 in E and 0 elsewhere. Then dp contains a but <g, T> does not, so dz gets a p.
        columns: list[Tensor | float] = [learned.slopes.to(grad.dtype), 0.0, 0.0, 1.0]
        operands = [_with_column(matrix, values) for matrix, values in zip(operands, columns, strict=True)]
        mean = _with_column(mean, 0.0)
    # the kernel assumes that the elements of a row lie side by side
    operands = [_one_head(tensor.contiguous()) for tensor in operands]
    lse = kept.largest.view(1, 1, -1)
    found = attend_backward(*operands, _one_head(mean), lse, 0.0, False, scale=1.0 / temperature)
    d_hidden, d_head, d_table = (gradient[0, 0] for gradient in found)
    if learned is None:
        return d_hidden, d_head, d_table
    d_hidden, d_head, d_table = (gradient[:, :-1].contiguous() for gradient in (d_hidden, d_head, d_table))
    rows, slopes = learned.labels.clamp(min=0), learned.slopes.unsqueeze(1)
    d_hidden.addcmul_(slopes, F.embedding(rows, kept.head), value=-1.0)
    d_head.index_add_(0, rows, slopes * kept.hidden, alpha=-1.0)
    return d_hidden, d_head, d_table


def _with_column(matrix: Tensor, values: Tensor | float) -> Tensor:
    """(n, D + 1): a matrix (n, D) with one more column."""
    column = matrix.new_empty(matrix.shape[0], 1)
    column[:, 0] = values
    return torch.cat([matrix, column], 1)


def _one_head(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0).unsqueeze(0)  # batch 1, head 1


def _attention_statistics(
    hidden: Tensor, head: Tensor, table: Tensor, labels: Tensor, mean: Tensor, lse: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss and entropy after attention.

    They are free at temperature 1 with W = E, because sum_v p z = h . sum_v p W_v. Otherwise they take one more product
    with the vocabulary, in blocks of tokens.
    """
    if head is table and temperature == 1.0:
        picked = (wide(hidden) * wide(F.embedding(labels.clamp(min=0), head))).sum(-1)
        loss = torch.where(labels == IGNORE_INDEX, torch.zeros_like(lse), lse - picked)
        return loss, lse - (wide(hidden) * wide(mean)).sum(-1)
    loss, entropy = torch.empty_like(lse), torch.empty_like(lse)
    rows = chunk(hidden, hidden.shape[0], head.shape[0])
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logits = wide(F.linear(hidden[part], head))  # (n, V)
        unit = lse[part] if temperature == 1.0 else logits.logsumexp(-1)
        loss[part] = label_loss(logits, labels[part], unit)
        z = logits.div_(temperature)
        p = (z - lse[part].unsqueeze(1)).exp_()
        entropy[part] = entropy_of(p, z, lse[part], torch.ones_like(lse[part]))
    return loss, entropy
