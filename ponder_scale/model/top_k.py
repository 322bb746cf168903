"""The pondering embedding over the K most probable tokens, renormalised: sparse forward and backward.

N tokens, D hidden size, V vocabulary. The equations are those of `backends` with every sum over v cut to K terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import as_dtype, chunk, finished, label_loss, power_above, wide, wide_product, width
from .learned import Learned, loss_gradients
from .tiles import LaunchFailed, give_up, kernels_start


class Mixture(NamedTuple):
    """T (N, D), the statistics of each token (N,) (0 without labels), and the K tokens and probabilities (N, K)."""

    mixed: Tensor
    loss: Tensor
    entropy: Tensor
    picked: Tensor
    p: Tensor


def mix(
    hidden: Tensor, head: Tensor, table: Tensor, labels: Tensor | None, temperature: float, scale: float, top_k: int
) -> Mixture:
    """The mixture of the K most probable tokens, renormalised."""
    tokens, rows = hidden.shape[0], chunk(hidden, hidden.shape[0], head.shape[0])
    index = hidden.new_empty(tokens, top_k, dtype=torch.int64)
    p = hidden.new_empty(tokens, top_k, dtype=width(hidden))
    loss, entropy = (hidden.new_zeros(tokens, dtype=width(hidden)) for _ in range(2))
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        z = _logits(hidden[part], head)  # (n, V)
        if labels is not None:
            loss[part] = label_loss(z, labels[part], z.logsumexp(-1))
        values, index[part] = z.topk(top_k, dim=-1)
        p[part] = torch.softmax(values / temperature, dim=-1)
    if labels is not None:
        entropy = -torch.special.xlogy(p, p).sum(-1)
    mixed = F.embedding_bag(index, table, per_sample_weights=p.to(table.dtype), mode="sum")
    return Mixture(mixed.mul_(scale), loss, entropy, index, p)


def gradients(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    index: Tensor,
    p: Tensor,
    grad: Tensor,
    needed: Sequence[bool],
    temperature: float,
    scale: float,
    learned: Learned | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh, dW and dE from g (N, D). Each is None unless `needed`.

    If `learned` is given, they include the gradients of the losses. These are over the whole vocabulary and take three
    products with it.
    """
    of_sums = _way(hidden, p)
    dp, d_table = of_sums(index, p, table, grad * scale, True, needed[2])
    dz = p * (dp - (p * dp).sum(-1, keepdim=True)) / temperature
    d_head = of_sums(index, dz, head, hidden, False, needed[1])[1]
    d_hidden = None
    if needed[0]:
        # a dz may overflow in fp16 although its product with the head does not
        shrink = power_above(dz.abs().amax()) if dz.numel() and head.dtype == torch.float16 else None
        narrow = (dz if shrink is None else dz / shrink).to(head.dtype)
        d_hidden = finished(F.embedding_bag(index, head, per_sample_weights=narrow, mode="sum"), shrink, hidden)
    if learned is not None:
        dense = loss_gradients(hidden, head, learned, needed[0], needed[1])
        d_hidden, d_head = (
            None if some is None or more is None else more.add_(some)
            for some, more in zip((d_hidden, d_head), dense, strict=True)
        )
        d_hidden = as_dtype(d_hidden, hidden)
    return d_hidden, as_dtype(d_head, head), as_dtype(d_table, table)


def _way(hidden: Tensor, p: Tensor) -> Any:
    """The function that makes the gradients of sums of K rows on this device and in this dtype."""
    if hidden.device.type == "cpu" and hidden.dtype == p.dtype:
        return _gradients_in_bags
    return _gradients_on_gpu if kernels_start(hidden.device, hidden.dtype) else _gradients_in_blocks


def _gradients_on_gpu(
    index: Tensor, weights: Tensor, matrix: Tensor, upstream: Tensor, need_weights: bool, need_matrix: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients by kernels, or in blocks if the kernels do not start."""
    from .sparse import gradients_by_kernels  # needs triton, which not every machine has

    try:
        return gradients_by_kernels(index, weights, matrix, upstream, need_weights, need_matrix)
    except LaunchFailed as failure:
        give_up(upstream, failure)
        return _gradients_in_blocks(index, weights, matrix, upstream, need_weights, need_matrix)


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """The logits (n, V), not rounded to a narrow dtype, where other tokens could be the K most probable."""
    if hidden.dtype == width(hidden):
        return F.linear(hidden, head)
    return wide_product(hidden, head.t(), hidden.new_empty(hidden.shape[0], head.shape[0], dtype=width(hidden)))


def _gradients_in_bags(
    index: Tensor, weights: Tensor, matrix: Tensor, upstream: Tensor, need_weights: bool, need_matrix: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of sum_k weights[n, k] matrix[index[n, k]] (N, D) for the weights (N, K) and the matrix (V, D).

    This is the backward of torch's CPU kernel. It gathers nothing, but it would sum narrow dtypes in their own dtype.
    """
    (tokens, top_k), rows = index.shape, matrix.shape[0]
    flat, flat_weights, above = index.flatten(), weights.flatten(), upstream.contiguous()
    bags = torch.arange(tokens, device=index.device)
    starts, bag = bags * top_k, bags.repeat_interleave(top_k)
    aten, as_sums = torch.ops.aten, 0  # the number of the mode "sum"
    d_weights, d_matrix = weights, None
    if need_weights:
        found = aten._embedding_bag_per_sample_weights_backward(above, matrix, flat, starts, bag, as_sums)
        d_weights = found.view_as(weights)
    if need_matrix:
        sizes, none = torch.full_like(bags, top_k), bags.new_empty(0)
        d_matrix = aten._embedding_bag_dense_backward(above, flat, bag, sizes, none, rows, False, as_sums, flat_weights)
    return d_weights, d_matrix


def _gradients_in_blocks(
    index: Tensor, weights: Tensor, matrix: Tensor, upstream: Tensor, need_weights: bool, need_matrix: bool
) -> tuple[Tensor, Tensor | None]:
    """The same for any device and dtype. Gathers (n, K, D) for a block of n tokens at a time."""
    (tokens, top_k), hidden_size = index.shape, matrix.shape[1]
    d_weights = torch.empty_like(weights)
    d_matrix = torch.zeros_like(matrix, dtype=width(matrix)) if need_matrix else None
    rows = chunk(matrix, tokens, top_k * hidden_size)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        picked, above = index[part].flatten(), wide(upstream[part])  # (n * K,), (n, D)
        if need_weights:
            gathered = wide(matrix[picked]).view(-1, top_k, hidden_size)
            d_weights[part] = torch.bmm(gathered, above.unsqueeze(2)).squeeze(2)
        if d_matrix is not None:
            _add_rows(d_matrix, picked, weights[part].unsqueeze(2) * above.unsqueeze(1))
    return d_weights, d_matrix


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, (n, K, D) for (n * K,) indices into (V, D)."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows.flatten(0, 1))
    else:  # it sorts the indices, because index_add_ would add by atomics in any order
        total.index_put_((index,), rows.flatten(0, 1), accumulate=True)
