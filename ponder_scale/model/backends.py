"""The pondering embedding and the loss as autograd functions of torch operations, with the gradients written out.

N tokens, D hidden size, V vocabulary; h (N, D) hidden states, W (V, D) head, E (V, D) embedding table (W may be E).
With z = h W^T / tau, p = softmax(z), T = c p E and g = dL/dT:

    dE = c p^T g        dp = c g E^T        dz = p * (dp - <g, T>)        dh = dz W / tau        dW = dz^T h / tau

<g, T> is sum_v p dp. Forward goes through blocks of tokens, so that a softmax sees its whole row. Backward knows the
largest score of each row and its probability, so p = p_max exp(z - z_max), which is more exact than exp(z - lse) where
lse is large, and goes through blocks of the vocabulary: each row of dW and dE is one product over all tokens, summed by
the product itself and written once. Nothing of size (N, V) exists. Statistics and sums are in fp32 where the inputs
are narrower. All of it gives the same bits again for the same inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# scores alive at a time in one buffer, of which there are two: 16 MiB in fp32 stays below the size from which glibc's
# allocator returns memory at every release, and GPUs want products thousands wide
CPU_CHUNK_ELEMENTS = 2**22
CUDA_CHUNK_ELEMENTS = 2**27
IGNORE_INDEX = -100


class Statistics(NamedTuple):
    """What the logits of a pass say, per token, (N,): by-products of products that are made anyway."""

    loss: Tensor  # cross-entropy at temperature 1 in nats, 0 where the label is ignored
    entropy: Tensor  # of the softmax at temperature tau, in nats


def width(tensor: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: fp32, or fp64 of fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """In fp32, or as it is in fp64."""
    return tensor.to(width(tensor))


def is_fake(tensor: Tensor) -> bool:
    """Whether it is one of torch's stand-ins, which have shapes and no values."""
    return type(tensor).__module__.startswith("torch._subclasses")


def chunk(like: Tensor, extent: int, other: int) -> int:
    """How many of a matrix's `extent` rows (or columns), `other` long, are made at a time on the device of `like`."""
    elements = CPU_CHUNK_ELEMENTS if like.device.type == "cpu" else CUDA_CHUNK_ELEMENTS
    return max(1, min(extent, elements // max(1, other)))


def label_loss(logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """lse - logit of the label, 0 where the label is ignored; (n,)."""
    picked = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(labels == IGNORE_INDEX, torch.zeros_like(lse), lse - picked)


def total_loss(loss: Tensor, squares: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    """The sum of the losses and of z_loss times the squared log-sum-exps, over the tokens with a label."""
    if z_loss == 0.0:
        return loss.sum()
    return loss.sum() + z_loss * torch.where(labels == IGNORE_INDEX, 0.0, squares).sum()


def _mean_score(p: Tensor, z: Tensor) -> Tensor:
    """sum_v p z, (n,), as a batched dot product so that p * z is never stored."""
    return torch.bmm(p.unsqueeze(1), z.unsqueeze(2)).flatten()


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into `out`, which may be wider than they are."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return out.copy_(torch.mm(left, right))


def _scores(hidden: Tensor, weights: Tensor, offset: Tensor, factor: float, out: Tensor) -> Tensor:
    """factor * hidden @ weights^T - offset into `out`, (N, n); offset (N, 1)."""
    if hidden.dtype == out.dtype:
        return torch.addmm(offset, hidden, weights.t(), beta=-1, alpha=factor, out=out)
    return out.copy_(torch.mm(hidden, weights.t())).mul_(factor).sub_(offset)


class Chunked(torch.autograd.Function):
    """Over the whole vocabulary. Saves the inputs, the output and two numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        table: Tensor,
        labels: Tensor | None,
        temperature: float,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocabulary = hidden.shape[0], head.shape[0]
        rows = chunk(hidden, tokens, vocabulary)
        mixed = table.new_empty(tokens, table.shape[1])
        largest, peak, loss, entropy = (hidden.new_zeros(tokens, dtype=width(hidden)) for _ in range(4))
        buffers = [hidden.new_empty(rows, vocabulary, dtype=width(hidden)) for _ in range(2)]
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            z, p = (buffer[: part.stop - start] for buffer in buffers)  # (n, V)
            _product(hidden[part], head.t(), z)
            if labels is not None and temperature != 1.0:
                loss[part] = label_loss(z, labels[part], z.logsumexp(-1))
            if temperature != 1.0:
                z.div_(temperature)
            torch.softmax(z, dim=-1, out=p)
            largest[part], peak[part] = z.amax(-1), p.amax(-1)
            if labels is not None:
                lse = largest[part] - peak[part].log()
                entropy[part] = lse - _mean_score(p, z)
                if temperature == 1.0:
                    loss[part] = label_loss(z, labels[part], lse)
            torch.mm(p.to(table.dtype), table, out=mixed[part])
        mixed.mul_(scale)
        ctx.save_for_backward(hidden, head, table, mixed, largest, peak)
        ctx.temperature, ctx.scale = temperature, scale
        ctx.mark_non_differentiable(loss, entropy)
        return mixed, loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, head, table, mixed, largest, peak = ctx.saved_tensors
        need_hidden, need_head, need_table = ctx.needs_input_grad[:3]
        tokens, vocabulary = hidden.shape[0], head.shape[0]
        d_hidden = torch.zeros_like(hidden, dtype=width(hidden)) if need_hidden else None
        d_head = torch.empty_like(head) if need_head else None
        d_table = torch.empty_like(table) if need_table else None
        delta = (wide(grad) * wide(mixed)).sum(-1, keepdim=True).div_(ctx.temperature)  # (N, 1)
        grad, largest, peak = grad.contiguous(), largest.unsqueeze(1), peak.unsqueeze(1)
        columns = chunk(hidden, vocabulary, tokens)
        buffers = [hidden.new_empty(tokens * columns, dtype=width(hidden)) for _ in range(2)]
        for start in range(0, vocabulary, columns):
            part = slice(start, min(start + columns, vocabulary))
            p, dz = (buffer[: tokens * (part.stop - start)].view(tokens, -1) for buffer in buffers)  # (N, n)
            _scores(hidden, head[part], largest, 1.0 / ctx.temperature, p).exp_().mul_(peak)
            if d_table is not None:
                torch.mm(p.to(grad.dtype).t(), grad, out=d_table[part])
            if d_hidden is None and d_head is None:
                continue
            _scores(grad, table[part], delta, ctx.scale / ctx.temperature, dz).mul_(p)
            narrow = dz.to(hidden.dtype)
            if d_hidden is not None:
                _add_product(d_hidden, narrow, head[part])
            if d_head is not None:
                torch.mm(narrow.t(), hidden, out=d_head[part])
        if d_table is not None and ctx.scale != 1.0:
            d_table.mul_(ctx.scale)
        return _as(d_hidden, hidden), d_head, d_table, None, None, None


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
        return *(gradient[0, 0] for gradient in gradients), None, None, None


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
        p = (logits / temperature).sub_(lse[part].unsqueeze(1)).exp_()
        entropy[part] = lse[part] - _mean_score(p, logits) / temperature
    return loss, entropy


class TopK(torch.autograd.Function):
    """Over the K most probable tokens, renormalised. Saves (N, K) indices and probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        table: Tensor,
        labels: Tensor | None,
        temperature: float,
        scale: float,
        top_k: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, rows = hidden.shape[0], chunk(hidden, hidden.shape[0], head.shape[0])
        index = hidden.new_empty(tokens, top_k, dtype=torch.int64)
        p = hidden.new_empty(tokens, top_k, dtype=width(hidden))
        loss, entropy = (hidden.new_zeros(tokens, dtype=width(hidden)) for _ in range(2))
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            z = wide(F.linear(hidden[part], head))  # (n, V)
            if labels is not None:
                loss[part] = label_loss(z, labels[part], z.logsumexp(-1))
            values, index[part] = z.topk(top_k, dim=-1)
            p[part] = torch.softmax(values / temperature, dim=-1)
        if labels is not None:
            entropy = -torch.special.xlogy(p, p).sum(-1)
        mixed = F.embedding_bag(index, table, per_sample_weights=p.to(table.dtype), mode="sum")
        ctx.save_for_backward(hidden, head, table, index, p)
        ctx.temperature, ctx.scale = temperature, scale
        ctx.mark_non_differentiable(loss, entropy)
        return mixed.mul_(scale), loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, head, table, index, p = ctx.saved_tensors
        need_hidden, need_head, need_table = ctx.needs_input_grad[:3]
        in_bags = hidden.device.type == "cpu" and hidden.dtype == p.dtype
        gradients = _gradients_in_bags if in_bags else _gradients_in_blocks
        dp, d_table = gradients(index, p, table, grad * ctx.scale, True, need_table)
        dz = p * (dp - (p * dp).sum(-1, keepdim=True)) / ctx.temperature
        d_head = gradients(index, dz, head, hidden, False, need_head)[1]
        d_hidden = None
        if need_hidden:
            d_hidden = F.embedding_bag(index, head, per_sample_weights=dz.to(head.dtype), mode="sum")
        return d_hidden, _as(d_head, head), _as(d_table, table), None, None, None, None


def _gradients_in_bags(
    index: Tensor, weights: Tensor, matrix: Tensor, upstream: Tensor, need_weights: bool, need_matrix: bool
) -> tuple[Tensor, Tensor | None]:
    """Of sum_k weights[n, k] matrix[index[n, k]] (N, D), to the weights (N, K) and to the matrix (V, D).

    By the backward of torch's CPU kernel, which gathers nothing, but in narrow dtypes would also sum in them.
    """
    with torch.enable_grad():
        leaves = weights.detach().requires_grad_(need_weights), matrix.detach().requires_grad_(need_matrix)
        if not (need_weights or need_matrix):
            return weights, None
        bag = F.embedding_bag(index, leaves[1], per_sample_weights=leaves[0], mode="sum")
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    found: list[Tensor] = list(torch.autograd.grad(bag, asked, upstream))
    d_weights = found.pop(0) if need_weights else weights
    return d_weights, found[0] if need_matrix else None


def _gradients_in_blocks(
    index: Tensor, weights: Tensor, matrix: Tensor, upstream: Tensor, need_weights: bool, need_matrix: bool
) -> tuple[Tensor, Tensor | None]:
    """The same for any device and dtype, gathering (n, K, D) for a block of n tokens at a time."""
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
    else:  # sorts the indices, where index_add_ would use atomics in any order
        total.index_put_((index,), rows.flatten(0, 1), accumulate=True)


class CrossEntropy(torch.autograd.Function):
    """The summed loss, and z_loss * lse^2 on top of it, whose gradient to the logits is 2 z_loss lse p.

    The gradient is known up to a factor in forward, so it is made there, with one product less.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, with_gradient: bool, z_loss: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocabulary = hidden.shape[0], head.shape[0]
        rows = chunk(hidden, tokens, vocabulary)
        need_hidden, need_head = (needed and with_gradient for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head, dtype=width(head)) if need_head else None
        loss, entropy, squares = (hidden.new_zeros(tokens, dtype=width(hidden)) for _ in range(3))
        buffers = [hidden.new_empty(rows, vocabulary, dtype=width(hidden)) for _ in range(2)]
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            z, p = (buffer[: part.stop - start] for buffer in buffers)  # (n, V)
            _product(hidden[part], head.t(), z)
            torch.softmax(z, dim=-1, out=p)
            lse = z.amax(-1) - p.amax(-1).log()  # z_j - log p_j is the same for every j
            loss[part] = label_loss(z, labels[part], lse)
            entropy[part] = lse - _mean_score(p, z)
            squares[part] = lse.square()
            if d_hidden is None and d_head is None:
                continue
            kept = (labels[part] != IGNORE_INDEX).to(p.dtype).unsqueeze(1)
            p.mul_(kept * (1.0 + 2.0 * z_loss * lse).unsqueeze(1)).scatter_add_(
                1, labels[part].clamp(min=0).unsqueeze(1), -kept
            )
            dz = p.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(dz, head, out=d_hidden[part])
            if d_head is not None:
                _add_product(d_head, dz.t(), hidden[part])
        ctx.save_for_backward(d_hidden, _as(d_head, head))
        ctx.mark_non_differentiable(loss, entropy)
        return total_loss(loss, squares, labels, z_loss), loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        scaled = [None if d is None else d * grad.to(d.dtype) for d in (d_hidden, d_head)]
        return scaled[0], scaled[1], None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the width of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


def _as(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
