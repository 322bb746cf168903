"""The pondering embedding and the loss by Triton kernels, which compute the softmax inside the matrix products.

N tokens, D hidden size, V vocabulary; the equations are those of `backends`, the kernels are in `products`:

    forward, by blocks of tokens    q = 2^(z - k), k = ceil(max z) of each row of each tile, in the product's epilogue
                                    T = c (q 2^(k - k_row)) E / sum q 2^(k - k_row), as one product with scaled operand
    backward, by blocks of V        p and dz from two products in one kernel; dE = p^T g and dW = dz^T h, each one
                                    product over all tokens, written once; dh += dz W in fp32
    loss, by blocks of tokens       dh = p W - W[label], and dW += dz^T h with dz made from q inside the product

The first kernel also gives the log-sum-exp, the entropy and the label's logit. T is divided by the sum of the rounded
q, so that rounding errors cancel in the row that all of E share. If there are fewer tiles than processors of the GPU,
the sum over V is split, and the parts are added in order. The same inputs give the same bits.

A GPU without a row in `tiles`, or on which a launch fails, uses `backends`. If a persistent kernel fails, the other one
is used. This file is imported only where it runs.
"""

# Triton ships no types
# mypy: disable-error-code="import-untyped"
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:  # guarded, because the loader of remote code requires every package that a file imports without a guard
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("the triton backend needs the package triton; use backend 'auto' or 'chunked'") from error

from . import backends
from .backends import (
    IGNORE_INDEX,
    Kept,
    Loss,
    Mixture,
    as_dtype,
    common_row,
    finished,
    mean_slope,
    shrinkage,
    total_loss,
)
from .learned import Learned
from .products import exp_product, gradient_products, head_gradient, persistent_exp_product, scaled_product
from .tiles import (
    FEW_TOKENS,
    DeviceTiles,
    LaunchFailed,
    Tiles,
    give_up,
    give_up_persistent,
    processors,
    splits,
    tiles_for,
)

LOG2_E = 1.0 / math.log(2.0)
TOKEN_BLOCK = 8192  # tokens whose q exist at a time: 0.8 GB in bf16 at V = 50304
VOCABULARY_BLOCK = 8192  # columns whose p and dz exist at a time
SAME_ROWS = 8  # row tiles that run beside each other, so that a tile of W is read from L2
DESCRIPTOR_BYTES = 16  # a tensor that TMA loads, and each of its rows, starts at a multiple of this


class _Scores(NamedTuple):
    """The results of the first kernel for a block of n tokens. Exponents are those of powers of two."""

    q: Tensor  # (n, V), rows padded to whole cache lines
    tile: int  # columns that share an exponent
    exponents: Tensor  # (tiles, n)
    row_exponents: Tensor  # (n,), the largest of them
    sums: Tensor  # (n,), sum of q at the row's exponent
    kept: Tensor  # (n,), the same sum of q as stored
    loss: Tensor  # (n,) in nats, 0 without labels
    entropy: Tensor  # (n,) in nats, 0 without labels


def launch_options(shape: Tiles) -> dict[str, Any]:
    """No fused multiply-add, because the compiler may place it differently in a kernel that also makes statistics."""
    return {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": False}


def launch(kernel: Any, grid: tuple[int, ...], shape: Tiles, *arguments: Any, **constants: Any) -> None:
    """Start a kernel.

    Raises:
        LaunchFailed: the compiler or the driver failed. If memory is short, OutOfMemoryError is raised instead.
    """
    try:
        kernel[grid](*arguments, **constants, **launch_options(shape))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        name = getattr(getattr(kernel, "fn", kernel), "__name__", "a kernel")
        raise LaunchFailed(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # matters only for fp32


def _check(*tensors: Tensor) -> None:
    kinds = {tensor.dtype for tensor in tensors}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float16, torch.bfloat16}:
        raise ValueError(
            f"backend 'triton' takes tensors of one dtype: fp32, fp16 or bf16; got {', '.join(map(str, kinds))}"
        )


def _log_sums(exponents: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exponent and sum of each row, (n,), and 2^(k - k_row) of each tile, (tiles, n)."""
    largest = exponents.amax(0)
    powers = torch.exp2(exponents - largest)
    return largest, (sums * powers).sum(0), powers


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """A buffer (rows, columns) whose rows start at multiples of 64 elements, as vector loads and wgmma need."""
    whole = like.new_empty(rows, (columns + 63) // 64 * 64)
    whole[:, columns:].zero_()  # torch's bf16 product on CPUs reads this padding and multiplies it by 0
    return whole[:, :columns]


def _scores(hidden: Tensor, head: Tensor, labels: Tensor | None, temperature: float, plan: DeviceTiles) -> _Scores:
    """q, the log-sum-exp and the statistics of a block of tokens, from one product."""
    (tokens, width), vocabulary = hidden.shape, head.shape[0]
    # chosen without regard to the statistics, which must never change the result
    shape = plan.few_exp if tokens <= FEW_TOKENS else plan.exp if temperature == 1.0 else plan.tempered
    tiles = triton.cdiv(vocabulary, shape.n)
    unit = labels is not None and temperature != 1.0
    q = _buffer(hidden, tokens, vocabulary)
    per_tile = hidden.new_empty(6, tiles, tokens, dtype=torch.float32)
    exponents, sums, kept, weighted, unit_exponents, unit_sums = per_tile.unbind()
    _start_exp_product(
        hidden, head, shape, plan, q, exponents, sums, kept, weighted, unit_exponents, unit_sums,
        tokens, vocabulary, width, q.stride(0), LOG2_E / temperature, LOG2_E,
        M=shape.m, N=shape.n, K=shape.k, GROUP=SAME_ROWS,
        STATISTICS=labels is not None, UNIT=unit, PRECISION=_precision(hidden),
    )  # fmt: skip
    largest, total, powers = _log_sums(exponents, sums)
    loss = entropy = torch.zeros_like(total)
    if labels is not None:
        # uses differences from the largest exponent, which both terms would contain
        mean = ((weighted + (exponents - largest) * sums) * powers).sum(0) / total
        entropy = (torch.log2(total) - mean) / LOG2_E
        lse = largest + torch.log2(total)
        if unit:
            unit_largest, unit_total, _ = _log_sums(unit_exponents, unit_sums)
            lse = unit_largest + torch.log2(unit_total)
        label_logits = (hidden.float() * head[labels.clamp(min=0)].float()).sum(-1)
        loss = torch.where(labels == IGNORE_INDEX, 0.0, lse / LOG2_E - label_logits)
    return _Scores(q, shape.n, exponents, largest, total, (kept * powers).sum(0), loss, entropy)


def _start_exp_product(
    hidden: Tensor, head: Tensor, shape: Tiles, plan: DeviceTiles, *arguments: Any, **constants: Any
) -> None:
    """The persistent kernel, or the other one if the former does not apply or does not start."""
    tiles = triton.cdiv(hidden.shape[0], shape.m) * triton.cdiv(head.shape[0], shape.n)
    starts = (hidden.data_ptr(), head.data_ptr(), hidden.shape[1] * hidden.element_size())
    if plan.persistent and not any(start % DESCRIPTOR_BYTES for start in starts) and hidden.shape[0] > FEW_TOKENS:
        blocks = ((hidden, [shape.m, shape.k]), (head, [shape.n, shape.k]))
        operands = [TensorDescriptor.from_tensor(tensor, block) for tensor, block in blocks]
        grid = (min(tiles, processors(hidden)),)
        try:
            launch(
                persistent_exp_product, grid, shape, *operands, *arguments, **constants, SPECIALIZED=plan.specialized
            )
        except LaunchFailed as failure:
            give_up_persistent(hidden, failure)
        else:
            return
    launch(exp_product, (tiles,), shape, hidden, head, *arguments, **constants, EVEN=hidden.shape[1] % shape.k == 0)


def _mean_row(seen: _Scores, table: Tensor, plan: DeviceTiles) -> Tensor:
    """sum_v p E of a block of tokens, (n, D) in fp32."""
    (tokens, vocabulary), width = seen.q.shape, table.shape[1]
    shape = plan.few_mix if tokens <= FEW_TOKENS else plan.mix
    programs = triton.cdiv(tokens, shape.m) * triton.cdiv(width, shape.n)
    steps = triton.cdiv(vocabulary, shape.k)
    steps = triton.cdiv(steps, splits(programs, steps, processors(table)))
    parts = triton.cdiv(vocabulary, shape.k * steps)
    mean = table.new_empty(parts, tokens, width, dtype=torch.float32)
    powers = torch.exp2(seen.exponents - seen.row_exponents)
    launch(
        scaled_product, (programs, parts), shape,
        seen.q, table, powers, 1.0 / seen.kept, mean, tokens, vocabulary, width, seen.q.stride(0), steps,
        TILE=seen.tile, M=shape.m, N=shape.n, K=shape.k, GROUP=SAME_ROWS, EVEN=vocabulary % shape.k == 0,
        SCALED=True, PRECISION=_precision(table),
    )  # fmt: skip
    return mean[0] if parts == 1 else mean.sum(0)


def _add_product(left: Tensor, right: Tensor, out: Tensor, plan: DeviceTiles) -> None:
    """out += left @ right, out (tokens, width) in fp32."""
    (tokens, inner), width, shape = left.shape, right.shape[1], plan.add
    launch(
        scaled_product, (triton.cdiv(tokens, shape.m) * triton.cdiv(width, shape.n), 1), shape,
        left, right, None, None, out, tokens, inner, width, left.stride(0), triton.cdiv(inner, shape.k),
        TILE=shape.k, M=shape.m, N=shape.n, K=shape.k, GROUP=SAME_ROWS, EVEN=inner % shape.k == 0,
        SCALED=False, PRECISION=_precision(left),
    )  # fmt: skip


def mix(
    hidden: Tensor, head: Tensor, table: Tensor, labels: Tensor | None, temperature: float, scale: float, keep: bool
) -> Mixture:
    """Like `backends.mix`, which it calls if the kernels do not start."""
    _check(hidden, head, table)
    plan = tiles_for(hidden.device, hidden.dtype)
    if plan is not None:
        try:
            return _mixture(hidden, head, table, labels, temperature, scale, keep, plan)
        except LaunchFailed as failure:
            give_up(hidden, failure)
    return backends.mix(hidden, head, table, labels, temperature, scale, keep)


def gradients(
    kept: Kept,
    grad: Tensor,
    needed: Sequence[bool],
    temperature: float,
    scale: float,
    learned: Learned | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Like `backends.gradients`, which it calls if the kernels do not start."""
    plan = tiles_for(grad.device, grad.dtype)
    if plan is not None:
        try:
            return _gradients(kept, grad, needed, temperature, scale, learned, plan)
        except LaunchFailed as failure:
            give_up(grad, failure)
    return backends.gradients(kept, grad, needed, temperature, scale, learned)


def _mixture(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    labels: Tensor | None,
    temperature: float,
    scale: float,
    keep: bool,
    plan: DeviceTiles,
) -> Mixture:
    tokens = hidden.shape[0]
    operands = tuple(tensor.contiguous() for tensor in (hidden, head, table))
    mixed = torch.empty_like(operands[0])
    centre, mean = (common_row(table), torch.empty_like(mixed)) if keep else (None, None)
    exponents, shares, loss, entropy = hidden.new_empty(4, tokens, dtype=torch.float32).unbind()
    for start in range(0, tokens, TOKEN_BLOCK):
        part = slice(start, start + TOKEN_BLOCK)
        seen = _scores(operands[0][part], operands[1], None if labels is None else labels[part], temperature, plan)
        exact = _mean_row(seen, operands[2], plan)
        mixed[part] = exact * scale
        if mean is not None and centre is not None:
            mean[part] = exact - centre
        exponents[part], shares[part] = seen.row_exponents, 1.0 / seen.sums
        loss[part], entropy[part] = seen.loss, seen.entropy
    return Mixture(mixed, loss.clone(), entropy.clone(), mean, centre, exponents / LOG2_E, shares.clone())


def _gradients(
    kept: Kept,
    grad: Tensor,
    needed: Sequence[bool],
    temperature: float,
    scale: float,
    learned: Learned | None,
    plan: DeviceTiles,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh, dW and dE from the kernels."""
    tied = kept.head is kept.table
    hidden, head, table, grad = (t.contiguous() for t in (kept.hidden, kept.head, kept.table, grad))
    (tokens, width), vocabulary = hidden.shape, head.shape[0]
    shrink = shrinkage(grad, table, scale / temperature, learned)
    above = grad if shrink is None else grad / shrink.to(grad.dtype)
    deltas = mean_slope(above, kept.mean, kept.centre, temperature, scale)
    exponents = torch.round(kept.largest * LOG2_E)  # whole numbers, as in the forward kernel
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needed[0] else None
    d_head = torch.empty_like(head) if needed[1] else None
    d_table = torch.empty_like(table) if needed[2] else None
    unit = learned is not None and temperature != 1.0
    shape = plan.tied if tied else plan.gradient
    if learned is not None:
        shape = plan.learned
    leaks = torch.zeros_like(deltas)
    labels = slopes = unit_logs = None
    if learned is not None:
        labels, slopes, unit_logs = learned.labels, learned.above(shrink).slopes, learned.lse * LOG2_E
        deltas = deltas if unit else deltas - slopes
    for start in range(0, vocabulary, VOCABULARY_BLOCK):
        part = slice(start, min(start + VOCABULARY_BLOCK, vocabulary))
        columns = part.stop - part.start
        p, dz = _buffer(hidden, tokens, columns), _buffer(hidden, tokens, columns)
        leaked = deltas.new_empty(triton.cdiv(columns, shape.n), tokens)
        launch(
            gradient_products, (triton.cdiv(tokens, shape.m) * leaked.shape[0],), shape,
            hidden, head[part], above, table[part], exponents, kept.peak, deltas, p, dz, leaked,
            None if labels is None else labels - start, slopes, unit_logs,
            tokens, columns, width, p.stride(0), LOG2_E / temperature, scale / temperature, LOG2_E,
            M=shape.m, N=shape.n, K=shape.k, GROUP=SAME_ROWS, EVEN=width % shape.k == 0, TIED=tied,
            LEARN=learned is not None, UNIT=unit, PRECISION=_precision(hidden),
        )  # fmt: skip
        if d_table is not None:
            torch.mm(p.t(), grad, out=d_table[part])
        if d_head is not None:
            torch.mm(dz.t(), hidden, out=d_head[part])
        if d_hidden is not None:
            _add_product(dz, head[part], d_hidden, plan)
            leaks += leaked.sum(0)
    if d_hidden is not None:
        d_hidden.sub_(leaks.unsqueeze(1) * common_row(head))  # before rounding, sum_v dz is 0
    if d_table is not None and scale != 1.0:
        d_table.mul_(scale)
    return finished(d_hidden, shrink, hidden), finished(d_head, shrink, head), d_table


def loss(hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float, need_hidden: bool, need_head: bool) -> Loss:
    """Like `backends.loss`, with three products. Torch's own operations compute it if the kernels do not start."""
    _check(hidden, head)
    plan = tiles_for(hidden.device, hidden.dtype)
    if plan is not None:
        try:
            return _loss(hidden, head, labels, z_loss, need_hidden, need_head, plan)
        except LaunchFailed as failure:
            give_up(hidden, failure)
    return backends.loss(hidden, head, labels, z_loss, need_hidden, need_head)


def _loss(
    hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float, need_hidden: bool, need_head: bool, plan: DeviceTiles
) -> Loss:
    hidden, head, labels = hidden.contiguous(), head.contiguous(), labels.contiguous()
    tokens = hidden.shape[0]
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
    losses, entropy, squares = hidden.new_empty(3, tokens, dtype=torch.float32).unbind()
    for start in range(0, tokens, TOKEN_BLOCK):
        part = slice(start, min(start + TOKEN_BLOCK, tokens))
        targets = labels[part]
        ignored = targets == IGNORE_INDEX
        seen = _scores(hidden[part], head, targets, 1.0, plan)
        losses[part], entropy[part] = seen.loss, seen.entropy
        lse = (seen.row_exponents + torch.log2(seen.sums)) / LOG2_E
        squares[part] = lse.square()
        slopes = torch.where(ignored, 0.0, 1.0 + 2.0 * z_loss * lse)
        if d_hidden is not None:
            chosen = head[targets.clamp(min=0)].float().masked_fill_(ignored.unsqueeze(1), 0.0)
            d_hidden[part] = slopes.unsqueeze(1) * _mean_row(seen, head, plan) - chosen
        if d_head is not None:
            _add_head_gradient(seen, slopes, targets, hidden[part], d_head, plan)
    total = total_loss(losses, squares, labels, z_loss)
    return Loss(total, losses.clone(), entropy.clone(), d_hidden, as_dtype(d_head, head))


def _add_head_gradient(
    seen: _Scores, slopes: Tensor, labels: Tensor, hidden: Tensor, out: Tensor, plan: DeviceTiles
) -> None:
    """out (V, D) in fp32 += the gradient of a block of tokens, each of whose losses has a slope to its lse."""
    (tokens, width), vocabulary, shape = hidden.shape, out.shape[0], plan.head
    powers = torch.exp2(seen.exponents - seen.row_exponents) * (slopes / seen.sums)
    launch(
        head_gradient, (triton.cdiv(vocabulary, shape.m) * triton.cdiv(width, shape.n),), shape,
        seen.q, powers, labels, hidden, out, tokens, vocabulary, width, seen.q.stride(0), IGNORE_INDEX,
        TILE=seen.tile, M=shape.m, N=shape.n, K=shape.k, GROUP=SAME_ROWS, PRECISION=_precision(hidden),
    )  # fmt: skip
