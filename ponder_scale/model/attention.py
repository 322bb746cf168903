"""The pondering embedding as attention, by torch's flash kernel for CPUs: query h, keys W, values E, one head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import IGNORE_INDEX, Kept, Mixture, chunk, entropy_of, label_loss, wide, width


def mix(
    hidden: Tensor, head: Tensor, table: Tensor, labels: Tensor | None, temperature: float, scale: float, keep: bool
) -> Mixture:
    """As `backends.mix`."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mean, lse = attend(_one_head(hidden), _one_head(head), _one_head(table), 0.0, False, scale=1.0 / temperature)
    mean, lse = mean[0, 0], lse.flatten().to(width(hidden))
    loss, entropy = (hidden.new_zeros(hidden.shape[0], dtype=width(hidden)) for _ in range(2))
    if labels is not None:
        loss, entropy = _attention_statistics(hidden, head, table, labels, mean, lse, temperature)
    return Mixture(mean * scale, loss, entropy, mean if keep else None, None, lse, torch.ones_like(lse))


def gradients(kept: Kept, grad: Tensor, needed: Sequence[bool], temperature: float, scale: float) -> tuple[Tensor, ...]:
    """As `backends.gradients`, of all three whatever is needed."""
    attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # the kernel takes for granted that a row's elements lie side by side
    operands = [_one_head(tensor) for tensor in ((grad * scale).contiguous(), kept.hidden, kept.head, kept.table)]
    lse = kept.largest.view(1, 1, -1)
    found = attend_backward(*operands, _one_head(kept.mean), lse, 0.0, False, scale=1.0 / temperature)
    return tuple(gradient[0, 0] for gradient in found)


def _one_head(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0).unsqueeze(0)  # batch 1, head 1


def _attention_statistics(
    hidden: Tensor, head: Tensor, table: Tensor, labels: Tensor, mean: Tensor, lse: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss and entropy after attention: free at temperature 1 with W = E, where sum_v p z = h . sum_v p W_v.

    Elsewhere one more product with the vocabulary, in blocks of tokens.
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
