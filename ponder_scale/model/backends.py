"""The pondering embedding and the loss by blocks of torch operations, with the gradients written out.

N tokens, D hidden size, V vocabulary; h (N, D) hidden states, W (V, D) head, E (V, D) embedding table (W may be E).
With z = h W^T / tau, p = softmax(z), T = c p E and g = dL/dT:

    dE = c p^T g        dp = c g E^T        dz = p * (dp - <g, T>)        dh = dz W / tau        dW = dz^T h / tau

<g, T> is sum_v p dp. Where the loss of a pass is learned, y = h W^T and a = dL/dloss of each token, its logits also get

    dy += a (softmax(y) - [v is the label])        which takes no further product: y and dh, dW are made anyway

Forward goes through blocks of tokens, so that a softmax sees its whole row. Backward knows the
largest score of each row and its probability, so p = p_max exp(z - z_max), which is more exact than exp(z - lse) where
lse is large, and goes through blocks of the vocabulary: each row of dW and dE is one product over all tokens, summed by
the product itself and written once. Nothing of size (N, V) exists. Statistics and sums are in fp32 where the inputs
are narrower. All of it gives the same bits again for the same inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .learned import Learned

# scores alive at a time in one buffer, of which there are two: 16 MiB in fp32 stays below the size from which glibc's
# allocator returns memory at every release, and GPUs want products thousands wide
CPU_CHUNK_ELEMENTS = 2**22
CUDA_CHUNK_ELEMENTS = 2**27
WIDENED_ELEMENTS = 2**20  # of a narrow operand, whose fp32 copy exists at a time
CENTRE_ROWS = 1000
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


def entropy_of(p: Tensor, z: Tensor, largest: Tensor, peak: Tensor) -> Tensor:
    """-sum_v p log p, (n,), of p = peak exp(z - largest); `z` is used up.

    Of differences from the largest score, as both the log-sum-exp and the mean score are as large as that. Softmax adds
    a row's terms one by one, and the p of a large vocabulary do not add up to 1; `sum` adds them in a tree.
    """
    total = p.sum(-1)
    return (total / peak).log() - z.sub_(largest.unsqueeze(1)).mul_(p).sum(-1) / total


def wide_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into `out`, (n, m), which has the dtype of sums: a product of narrow operands is not rounded."""
    if right.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    # elsewhere torch has no such product: the operands are widened, the larger one in blocks
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
    for part in _parts(*total.shape):
        rows = left[part]
        if right.dtype == total.dtype:
            total[part].addmm_(rows.to(total.dtype), right)
        else:
            total[part].add_(torch.mm(rows, right, out_dtype=total.dtype))


def _parts(extent: int, other: int) -> list[slice]:
    """Slices of `extent` rows, `other` long, of which one is widened at a time."""
    rows = max(1, WIDENED_ELEMENTS // max(1, other))
    return [slice(start, min(start + rows, extent)) for start in range(0, extent, rows)]


def as_dtype(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient in the dtype of what it is of; None stays None."""
    return None if gradient is None else gradient.to(like.dtype)


def common_row(table: Tensor) -> Tensor:
    """About the mean row of E, (D,): of a thousand rows, as any row that they have in common will do."""
    return wide(table[:: max(1, table.shape[0] // CENTRE_ROWS)]).mean(0)


def mean_slope(grad: Tensor, mean: Tensor, centre: Tensor | None, temperature: float, scale: float) -> Tensor:
    """<g, T> / tau, (N,), of what `Kept` has of T."""
    if centre is None:
        return (wide(grad) * wide(mean)).sum(-1).div_(temperature)
    return (wide(grad) * (wide(mean) + centre)).sum(-1).mul_(scale / temperature)


def shrinkage(grad: Tensor, table: Tensor, factor: float, learned: Learned | None = None) -> Tensor | None:
    """In fp16 the power of two, a scalar, by which g is divided so that no dz overflows; None elsewhere.

    |dz| <= 2 factor |g| max |E_v| + |a|, with factor = c / tau.
    """
    if grad.dtype != torch.float16 or grad.numel() == 0:
        return None
    norms = (torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32).amax() for tensor in (grad, table))
    bound = 2.0 * factor * next(norms) * next(norms)
    return power_above(bound if learned is None else bound + learned.slopes.abs().amax())


def power_above(bound: Tensor) -> Tensor:
    """The least power of two, at least 1, that brings numbers up to `bound` into half of what fp16 holds."""
    return torch.exp2(torch.log2(bound / 2**15).ceil_().clamp_(min=0.0))


def scores(hidden: Tensor, weights: Tensor, offset: Tensor, factor: float, out: Tensor) -> Tensor:
    """factor * hidden @ weights^T - offset into `out`, (N, n); offset (N, 1)."""
    if hidden.dtype == out.dtype:
        return torch.addmm(offset, hidden, weights.t(), beta=-1, alpha=factor, out=out)
    return wide_product(hidden, weights.t(), out).mul_(factor).sub_(offset)


class Kept(NamedTuple):
    """What forward leaves for backward; the same of every backend, so that backward may be another's.

    In narrow dtypes T is kept without the row that all of E have in common. Rounded with that row in it, its error
    would be as large as all that tells tokens apart.
    """

    hidden: Tensor
    head: Tensor
    table: Tensor
    mean: Tensor  # (N, D): T / c of attention, T in wide dtypes, else T / c - centre
    centre: Tensor | None  # (D,)
    largest: Tensor  # (N,): p = peak exp(z - largest)
    peak: Tensor  # (N,)


class Mixture(NamedTuple):
    """T, the statistics of each token, 0 without labels, and what `Kept` has of them."""

    mixed: Tensor  # (N, D)
    loss: Tensor  # (N,)
    entropy: Tensor  # (N,)
    mean: Tensor | None  # None where it is T, or nothing is kept
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
    """The mixture of the whole vocabulary; `keep`: with what backward needs, the inputs aside."""
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
    """sum_v p E / sum_v p, (n, D) in fp32, of p (n, V) as rounded: its errors cancel in the row that all E share."""
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
    """dh, dW and dE of the mixture over the whole vocabulary, each None unless `needed`, from g (N, D).

    `learned`: of the losses too.
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
    by_unit = learned is not None and temperature != 1.0  # whose softmax is another one
    if learned is not None and not by_unit:
        delta = delta - learned.slopes.unsqueeze(1)  # a p beside p (dp - <g, T>)
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
        d_hidden.sub_(leaks * common_row(head))  # sum_v dz is 0 before dz is rounded
    if d_table is not None and scale != 1.0:
        d_table.mul_(scale)
    return finished(d_hidden, shrink, hidden), finished(d_head, shrink, head), d_table


def finished(gradient: Tensor | None, shrink: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient at its true size, in the dtype of what it is of."""
    if gradient is not None and shrink is not None:
        gradient.mul_(shrink.to(gradient.dtype))
    return as_dtype(gradient, like)


class Loss(NamedTuple):
    """The summed loss, the statistics of each token, and the gradients of the sum, None unless asked for."""

    total: Tensor  # scalar
    loss: Tensor  # (N,)
    entropy: Tensor  # (N,)
    d_hidden: Tensor | None
    d_head: Tensor | None


def loss(hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float, need_hidden: bool, need_head: bool) -> Loss:
    """The summed loss, and z_loss * lse^2 on top of it, whose gradient to the logits is 2 z_loss lse p.

    The gradient is known up to a factor in forward, so it is made there, with one product less.
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
    """A gradient (n, D) times a scalar. In narrow dtypes that stays wide: a loss scale of 2^16 is infinite in fp16."""
    if gradient.dtype == width(gradient):
        return gradient * factor.to(gradient.dtype)
    scaled = torch.empty_like(gradient)
    for part in _parts(*gradient.shape):
        scaled[part] = wide(gradient[part]) * factor
    return scaled
