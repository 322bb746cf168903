"""The pondering embedding as attention, by torch's flash kernel for CPUs: query h, keys W, values E, one head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import IGNORE_INDEX, chunk, entropy_of, label_loss, wide, width


class Attention(torch.autograd.Function):
    """Over the whole vocabulary by torch's CPU flash kernel: query h, keys W, values E, one head of width D."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        table: Tensor,
        labels: Tensor | None,
        temperature: float,
        scale: float,
        with_gradient: bool = True,  # taken as by the others; what is kept is needed for the result
    ) -> tuple[Tensor, Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mean, lse = attend(_one_head(hidden), _one_head(head), _one_head(table), 0.0, False, scale=1.0 / temperature)
        loss, entropy = (hidden.new_zeros(hidden.shape[0], dtype=width(hidden)) for _ in range(2))
        if labels is not None:
            loss, entropy = _attention_statistics(hidden, head, table, labels, mean, lse.flatten(), temperature)
        ctx.save_for_backward(hidden, head, table, mean, lse)
        ctx.temperature, ctx.scale = temperature, scale
        ctx.mark_non_differentiable(loss, entropy)
        return mean[0, 0] * scale, loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, head, table, mean, lse = ctx.saved_tensors
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        # the kernel takes for granted that a row's elements lie side by side
        operands = [_one_head(tensor) for tensor in ((grad * ctx.scale).contiguous(), hidden, head, table)]
        gradients = attend_backward(*operands, mean, lse, 0.0, False, scale=1.0 / ctx.temperature)
        return *(gradient[0, 0] for gradient in gradients), None, None, None, None


def _one_head(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0).unsqueeze(0)  # batch 1, head 1


def _attention_statistics(
    hidden: Tensor, head: Tensor, table: Tensor, labels: Tensor, mean: Tensor, lse: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss and entropy after attention: free at temperature 1 with W = E, where sum_v p z = h . sum_v p W_v.

    Elsewhere one more product with the vocabulary, in blocks of tokens.
    """
    lse = lse.to(width(hidden))
    if head is table and temperature == 1.0:
        picked = (wide(hidden) * wide(F.embedding(labels.clamp(min=0), head))).sum(-1)
        loss = torch.where(labels == IGNORE_INDEX, torch.zeros_like(lse), lse - picked)
        return loss, lse - (wide(hidden) * wide(mean[0, 0])).sum(-1)
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
