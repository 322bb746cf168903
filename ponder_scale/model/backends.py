"""The pondering embedding and the loss in blocks of torch operations, with explicit gradients.

N tokens, D hidden size, V vocabulary; h (N, D) hidden states, W (V, D) head, E (V, D) embedding table (W may be E).
With z = h W^T / tau, p = softmax(z), T = c p E and g = dL/dT:

    dE = c p^T g        dp = c g E^T        dz = p * (dp - <g, T>)        dh = dz W / tau        dW = dz^T h / tau

<g, T> is sum_v p dp. If the loss of a pass is learned, with y = h W^T and a = dL/dloss of each token, the logits also
get

    dy += a (softmax(y) - [v is the label])        without a further product, because y, dh and dW are computed anyway

Forward goes through blocks of tokens, so that a softmax sees its whole row. Backward knows the largest score of each
row and its probability. So it uses p = p_max exp(z - z_max), which is more exact than exp(z - lse) if lse is large. It
goes through blocks of the vocabulary, so that each row of dW and dE is one product over all tokens, which sums it and
writes it once. Nothing of size (N, V) exists. If the inputs are narrower than fp32, statistics and sums are in fp32.
The same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .learned import Learned

# The most scores in one buffer, of which there are two. On CPUs 16 MiB in fp32 stays below the size from which glibc's
# allocator returns memory at every release. GPUs want products that are thousands wide.
CPU_CHUNK_ELEMENTS = 2**22
CUDA_CHUNK_ELEMENTS = 2**27
WIDENED_ELEMENTS = 2**20  # elements of a narrow operand that are copied to fp32 at a time
CUDA_ADDED_ELEMENTS = 2**25  # elements of a product that is added to a sum, in fp32; this many occupy a GPU
CENTRE_ROWS = 1000
IGNORE_INDEX = -100


class Statistics(NamedTuple):
    """Loss and entropy of each token in a pass, (N,). They are by-products of products that are computed anyway."""

    loss: Tensor  # cross-entropy at temperature 1 in nats, 0 where the label is ignored
    entropy: Tensor  # of the softmax at temperature tau, in nats


def width(tensor: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: fp64 for fp64, else fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or unchanged if it is in fp64."""
    return tensor.to(width(tensor))


def is_fake(tensor: Tensor) -> bool:
    """Whether this is one of torch's fake tensors, which have shapes but no values."""
    return type(tensor).__module__.startswith("torch._subclasses")


def chunk(like: Tensor, extent: int, other: int) -> int:
    """How many of a matrix's `extent` rows (or columns) of length `other` to compute at a time on `like`'s device."""
    elements = CPU_CHUNK_ELEMENTS if like.device.type == "cpu" else CUDA_CHUNK_ELEMENTS
    return max(1, min(extent, elements // max(1, other)))


def label_loss(logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """lse - logit of the label, (n,), and 0 where the label is ignored."""
    picked = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(labels == IGNORE_INDEX, torch.zeros_like(lse), lse - picked)


def total_loss(loss: Tensor, squares: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    """The sum of the losses and of z_loss times the squared log-sum-exps, over the tokens with a label."""
    if z_loss == 0.0:
        return loss.sum()
    return loss.sum() + z_loss * torch.where(labels == IGNORE_INDEX, 0.0, squares).sum()


def entropy_of(p: Tensor, z: Tensor, largest: Tensor, peak: Tensor) -> Tensor:
    """-sum_v p log p, (n,), for p = peak exp(z - largest). Overwrites `z`.

    It uses differences from the largest score, because both the log-sum-exp and the mean score are about that large.
    Softmax adds the terms of a row one by one, so the p of a large vocabulary do not add up to 1. `sum` adds them in a
    tree.
    """
    total = p.sum(-1)
    return (total / peak).log() - z.sub_(largest.unsqueeze(1)).mul_(p).sum(-1) / total


def wide_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into `out`, (n, m), in the dtype of sums, so that a product of narrow operands is not rounded."""
    if right.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    # Elsewhere torch has no such product, so the operands are widened, and the larger one in blocks.
    left, (inner, columns) = left.to(out.dtype), right.shape
    if inner > columns:
        out.zero_()
        for part in _parts(inner, columns):
            out.addmm_(left[:, part], right[part].to(out.dtype))
    else:
        for part in _parts(columns, inner):
            out[:, part] = torch.mm(left, right[:, part].to(out.dtype))
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, (n, m), in the dtype of `total`."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
        return
    if not (left.is_cuda and torch.version.hip is None):
        right = right.to(total.dtype)
    elements = CUDA_ADDED_ELEMENTS if left.is_cuda else WIDENED_ELEMENTS
    for part in _parts(total.shape[0], total.shape[1], elements):
        rows = left[part]
        if right.dtype == total.dtype:
            total[part].addmm_(rows.to(total.dtype), right)
        else:
            total[part].add_(torch.mm(rows, right, out_dtype=total.dtype))


def _parts(extent: int, other: int, elements: int = WIDENED_ELEMENTS) -> list[slice]:
    """Slices of `extent` rows of length `other` with about so many elements, which are computed one at a time."""
    rows = max(1, elements // max(1, other))
    return [slice(start, min(start + rows, extent)) for start in range(0, extent, rows)]


def as_dtype(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient in the dtype of its tensor. None stays None."""
    return None if gradient is None else gradient.to(like.dtype)


def common_row(table: Tensor) -> Tensor:
    """About the mean row of E, (D,), from a thousand rows. Any row that all rows have in common will do."""
    return wide(table[:: max(1, table.shape[0] // CENTRE_ROWS)]).mean(0)


def mean_slope(grad: Tensor, mean: Tensor, centre: Tensor | None, temperature: float, scale: float) -> Tensor:
    """<g, T> / tau, (N,), from T as `Kept` has it."""
    if centre is None:
        return (wide(grad) * wide(mean)).sum(-1).div_(temperature)
    return (wide(grad) * (wide(mean) + centre)).sum(-1).mul_(scale / temperature)


def shrinkage(grad: Tensor, table: Tensor, factor: float, learned: Learned | None = None) -> Tensor | None:
    """For fp16, the power of two (a scalar) by which to divide g so that no dz overflows. None for other dtypes.

    |dz| <= 2 factor |g| max |E_v| + |a|, with factor = c / tau.
    """
    if grad.dtype != torch.float16 or grad.numel() == 0:
        return None
    norms = (torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32).amax() for tensor in (grad, table))
    bound = 2.0 * factor * next(norms) * next(norms)
    return power_above(bound if learned is None else bound + learned.slopes.abs().amax())


def power_above(bound: Tensor) -> Tensor:
    """The least power of two, at least 1, that as a divisor brings `bound` into half of the range of fp16."""
    return torch.exp2(torch.log2(bound / 2**15).ceil_().clamp_(min=0.0))


def scores(hidden: Tensor, weights: Tensor, offset: Tensor, factor: float, out: Tensor) -> Tensor:
    """factor * hidden @ weights^T - offset into `out`, (N, n), with an offset (N, 1)."""
    if hidden.dtype == out.dtype:
        return torch.addmm(offset, hidden, weights.t(), beta=-1, alpha=factor, out=out)
    return wide_product(hidden, weights.t(), out).mul_(factor).sub_(offset)


class Kept(NamedTuple):
    """The tensors that forward keeps for backward. They are the same in every backend, so that another backend may run
    the backward.

    In narrow dtypes T is kept without the row that all rows of E have in common. Rounded with that row, its error would
    be as large as the differences between tokens.
    """

    hidden: Tensor
    head: Tensor
    table: Tensor
    mean: Tensor  # (N, D): T / c from attention, T in wide dtypes, else T / c - centre
    centre: Tensor | None  # (D,)
    largest: Tensor  # (N,): p = peak exp(z - largest)
    peak: Tensor  # (N,)


class Mixture(NamedTuple):
    """T, the statistics of each token (0 without labels), and the tensors for `Kept`."""

    mixed: Tensor  # (N, D)
    loss: Tensor  # (N,)
    entropy: Tensor  # (N,)
    mean: Tensor | None  # None if it is T, or if nothing is kept
    centre: Tensor | None
    largest: Tensor
    peak: Tensor


def mix(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    labels: Tensor | None,
    temperature: float,
    scale: float,
    keep: bool,
) -> Mixture:
    """The mixture of the whole vocabulary. With `keep`, also the tensors that backward needs besides the inputs."""
    tokens, vocabulary = hidden.shape[0], head.shape[0]
    rows = chunk(hidden, tokens, vocabulary)
    mixed = table.new_empty(tokens, table.shape[1])
    narrow = table.dtype != width(table)
    centre, mean = (common_row(table), torch.empty_like(mixed)) if narrow and keep else (None, None)
    largest, peak, loss, entropy = (hidden.new_zeros(tokens, dtype=width(hidden)) for _ in range(4))
    buffers = [hidden.new_empty(rows, vocabulary, dtype=width(hidden)) for _ in range(2)]
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        z, p = (buffer[: part.stop - start] for buffer in buffers)  # (n, V)
        wide_product(hidden[part], head.t(), z)
        if labels is not None and temperature != 1.0:
            loss[part] = label_loss(z, labels[part], z.logsumexp(-1))
        if temperature != 1.0:
            z.div_(temperature)
        torch.softmax(z, dim=-1, out=p)
        largest[part], peak[part] = z.amax(-1), p.amax(-1)
        if labels is not None:
            if temperature == 1.0:
                loss[part] = label_loss(z, labels[part], largest[part] - peak[part].log())
            entropy[part] = entropy_of(p, z, largest[part], peak[part])
        if not narrow:
            torch.mm(p, table, out=mixed[part]).mul_(scale)
            continue
        exact = _mean_row(p.to(table.dtype), table)
        mixed[part] = exact * scale
        if mean is not None and centre is not None:
            mean[part] = exact - centre
    return Mixture(mixed, loss, entropy, mean, centre, largest, peak)


def _mean_row(p: Tensor, table: Tensor) -> Tensor:
    """sum_v p E / sum_v p, (n, D) in fp32, for rounded p (n, V). The errors cancel in the row that all of E share."""
    mean = wide_product(p, table, torch.empty(p.shape[0], table.shape[1], dtype=width(table), device=table.device))
    return mean.div_(p.sum(-1, keepdim=True, dtype=mean.dtype))


def gradients(
    kept: Kept,
    grad: Tensor,
    needed: Sequence[bool],
    temperature: float,
    scale: float,
    learned: Learned | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh, dW and dE of the mixture over the whole vocabulary, from g (N, D). Each is None unless `needed`.

    If `learned` is given, they include the gradients of the losses.
    """
    hidden, head, table, mean, centre, largest, peak = kept
    tokens, vocabulary = hidden.shape[0], head.shape[0]
    d_hidden = torch.zeros_like(hidden, dtype=width(hidden)) if needed[0] else None
    d_head = torch.empty_like(head) if needed[1] else None
    d_table = torch.empty_like(table) if needed[2] else None
    grad, largest, peak = grad.contiguous(), largest.unsqueeze(1), peak.unsqueeze(1)
    shrink = shrinkage(grad, table, scale / temperature, learned)
    above = grad if shrink is None else grad / shrink.to(grad.dtype)
    delta = mean_slope(above, mean, centre, temperature, scale).unsqueeze(1)  # (N, 1)
    learned = None if learned is None else learned.above(shrink)
    by_unit = learned is not None and temperature != 1.0  # then the losses have another softmax
    if learned is not None and not by_unit:
        delta = delta - learned.slopes.unsqueeze(1)  # adds a p to p (dp - <g, T>)
    columns = chunk(hidden, vocabulary, tokens)
    leaks = None if centre is None else torch.zeros_like(delta)
    buffers = [hidden.new_empty(tokens * columns, dtype=width(hidden)) for _ in range(3 if by_unit else 2)]
    for start in range(0, vocabulary, columns):
        part = slice(start, min(start + columns, vocabulary))
        p, dz, *unit = (buffer[: tokens * (part.stop - start)].view(tokens, -1) for buffer in buffers)  # (N, n)
        scores(hidden, head[part], largest, 1.0 / temperature, p)
        if learned is not None and by_unit:
            shift = (temperature * largest.squeeze(1) - learned.lse).unsqueeze(1)
            torch.mul(p, temperature, out=unit[0]).add_(shift).exp_().mul_(learned.slopes.unsqueeze(1))
        p.exp_().mul_(peak)
        if d_table is not None:
            torch.mm(p.to(grad.dtype).t(), grad, out=d_table[part])
        if d_hidden is None and d_head is None:
            continue
        scores(above, table[part], delta, scale / temperature, dz).mul_(p)
        if learned is not None:
            learned.subtract_labels(dz.add_(unit[0]) if by_unit else dz, start)
        narrow = dz.to(hidden.dtype)
        if d_hidden is not None:
            add_product(d_hidden, narrow, head[part])
            if leaks is not None:
                leaks += narrow.sum(-1, keepdim=True, dtype=leaks.dtype)
        if d_head is not None:
            torch.mm(narrow.t(), hidden, out=d_head[part])
    if d_hidden is not None and leaks is not None:
        d_hidden.sub_(leaks * common_row(head))  # before rounding, sum_v dz is 0
    if d_table is not None and scale != 1.0:
        d_table.mul_(scale)
    return finished(d_hidden, shrink, hidden), finished(d_head, shrink, head), d_table


def finished(gradient: Tensor | None, shrink: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient at its true size, in the dtype of its tensor."""
    if gradient is not None and shrink is not None:
        gradient.mul_(shrink.to(gradient.dtype))
    return as_dtype(gradient, like)


class Loss(NamedTuple):
    """The summed loss, the statistics of each token, and the gradients of the sum, which are None if not needed."""

    total: Tensor  # scalar
    loss: Tensor  # (N,)
    entropy: Tensor  # (N,)
    d_hidden: Tensor | None
    d_head: Tensor | None


def loss(hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float, need_hidden: bool, need_head: bool) -> Loss:
    """The summed loss plus z_loss * lse^2, whose gradient to the logits is 2 z_loss lse p.

    Forward already knows the gradient up to a factor, so it computes it, which saves a product.
    """
    tokens, vocabulary = hidden.shape[0], head.shape[0]
    rows = chunk(hidden, tokens, vocabulary)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_head = torch.zeros_like(head, dtype=width(head)) if need_head else None
    losses, entropy, squares = (hidden.new_zeros(tokens, dtype=width(hidden)) for _ in range(3))
    buffers = [hidden.new_empty(rows, vocabulary, dtype=width(hidden)) for _ in range(2)]
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        z, p = (buffer[: part.stop - start] for buffer in buffers)  # (n, V)
        wide_product(hidden[part], head.t(), z)
        torch.softmax(z, dim=-1, out=p)
        largest, peak = z.amax(-1), p.amax(-1)
        lse = largest - peak.log()  # z_j - log p_j is the same for every j
        losses[part] = label_loss(z, labels[part], lse)
        entropy[part] = entropy_of(p, z, largest, peak)
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
            add_product(d_head, dz.t(), hidden[part])
    return Loss(total_loss(losses, squares, labels, z_loss), losses, entropy, d_hidden, as_dtype(d_head, head))


def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient (n, D) times a scalar that stays in fp32, because a loss scale of 2^16 is infinite in fp16."""
    if gradient.dtype == width(gradient):
        return gradient * factor.to(gradient.dtype)
    scaled = torch.empty_like(gradient)
    for part in _parts(*gradient.shape):
        scaled[part] = wide(gradient[part]) * factor
    return scaled
