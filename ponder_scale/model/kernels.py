"""The pondering embedding and the loss by Triton kernels: the softmax lives inside the matrix products.

N tokens, D hidden size, V vocabulary; the equations are those of `backends`. Scores are kept in powers of two,
z = h W^T log2(e) / tau, and exponents as integers, so that bringing two tiles to one offset is exact in any dtype:

    forward, by blocks of tokens    q = 2^(z - k), k = ceil(max z) of each row of each tile, in the product's epilogue
                                    T = c (q 2^(k - k_row)) E / sum q 2^(k - k_row), as one product with scaled operand
    backward, by blocks of V        p and dz from two products in one kernel; dE = p^T g and dW = dz^T h, each one
                                    product over all tokens, written once; dh += dz W in fp32

The log-sum-exp, the entropy and the label's logit fall out of the first kernel. No atomics: same inputs, same bits.
Offsets into (N, V) are 64-bit. Sums are in fp32. This file is imported only where it runs.
"""

# Triton gives its own meaning to the annotations of a kernel, and ships no types
# mypy: disable-error-code="no-untyped-def, import-untyped"
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:  # guarded for the loader of remote code, which asks for every package that a file imports
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the triton backend needs the package triton; use backend 'auto' or 'chunked'") from error

from .backends import IGNORE_INDEX, total_loss
from .backends import CrossEntropy as TorchCrossEntropy

LOG2_E = 1.0 / math.log(2.0)
TOKEN_BLOCK = 8192  # tokens whose q exist at a time: 0.8 GB in bf16 at V = 50304
VOCABULARY_BLOCK = 8192  # columns whose p and dz exist at a time
SAME_ROWS = 8  # row tiles that run beside each other, so that a tile of W is read from L2


class Tiles(NamedTuple):
    """Extent of one program's product (rows, columns, depth of a step), warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# for Hopper's 228 KiB of shared memory and 255 registers a thread; twice the bytes an element take half the depth
EXP_TILES = {2: Tiles(128, 256, 64, 8, 3), 4: Tiles(64, 128, 32, 8, 3)}
MIX_TILES = {2: Tiles(128, 256, 64, 8, 3), 4: Tiles(64, 128, 32, 8, 3)}
ADD_TILES = {2: Tiles(128, 128, 64, 8, 3), 4: Tiles(64, 128, 32, 8, 3)}
LOSS_TILES = Tiles(16, 0, 0, 4, 3)  # as wide as the tiles of exp
GRADIENT_TILES = {2: Tiles(128, 128, 64, 8, 3), 4: Tiles(64, 64, 32, 8, 3)}


@triton.jit
def _tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles go through the columns together."""
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    size = min(row_tiles - first, GROUP)
    return first + program % (GROUP * column_tiles) % size, program % (GROUP * column_tiles) // size


@triton.jit
def exp_product(
    hidden, head, out, exponents, sums, weighted, unit_exponents, unit_sums,
    tokens, vocabulary, width, out_stride, factor, unit_factor,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    STATISTICS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q (tokens, vocabulary) of hidden (tokens, width) and head; per (tile, row) its exponent and sum q.

    With STATISTICS sum q (z - exponent) too; with UNIT exponent and sum at temperature 1.
    """
    row_tile, tile = _tile_of(tl.program_id(0), tl.cdiv(tokens, M), tl.cdiv(vocabulary, N), GROUP)
    rows = row_tile * M + tl.arange(0, M)
    columns = tile * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    left = hidden + (rows % tokens).to(tl.int64)[:, None] * width + depth[None, :]
    right = head + (columns % vocabulary).to(tl.int64)[None, :] * width + depth[:, None]
    acc = tl.zeros((M, N), dtype=tl.float32)
    for step in range(tl.cdiv(width, K)):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            rest = depth < width - step * K
            a, b = tl.load(left, mask=rest[None, :], other=0.0), tl.load(right, mask=rest[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left += K
        right += K
    inside = columns[None, :] < vocabulary
    exists = rows < tokens
    place = tile * tokens + rows
    if UNIT:
        y = tl.where(inside, acc * unit_factor, float("-inf"))
        unit = tl.ceil(tl.max(y, 1))
        tl.store(unit_exponents + place, unit, mask=exists)
        tl.store(unit_sums + place, tl.sum(tl.exp2(y - unit[:, None]), 1), mask=exists)
    z = tl.where(inside, acc * factor, float("-inf"))
    exponent = tl.ceil(tl.max(z, 1))
    z = z - exponent[:, None]
    q = tl.exp2(z)
    tl.store(exponents + place, exponent, mask=exists)
    tl.store(sums + place, tl.sum(q, 1), mask=exists)
    if STATISTICS:
        tl.store(weighted + place, tl.sum(q * tl.maximum(z, -1e30), 1), mask=exists)
    cells = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(cells, q.to(out.dtype.element_ty), mask=exists[:, None] & inside)


@triton.jit
def scaled_product(
    left, right, powers, scales, out,
    tokens, inner, width, left_stride,
    TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SCALED: out = scales * ((left * powers) @ right); powers (inner / TILE, tokens), scales (tokens,).

    Otherwise out += left @ right. left (tokens, inner), right (inner, width), out (tokens, width).
    """
    row_tile, tile = _tile_of(tl.program_id(0), tl.cdiv(tokens, M), tl.cdiv(width, N), GROUP)
    rows = row_tile * M + tl.arange(0, M)
    columns = tile * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    rows_read, columns_read = rows % tokens, columns % width
    a_cells = left + rows_read.to(tl.int64)[:, None] * left_stride + depth[None, :]
    b_cells = right + depth.to(tl.int64)[:, None] * width + columns_read[None, :]
    cells = out + rows.to(tl.int64)[:, None] * width + columns[None, :]
    exists = (rows < tokens)[:, None] & (columns < width)[None, :]
    if SCALED:
        acc = tl.zeros((M, N), dtype=tl.float32)
    else:
        acc = tl.load(cells, mask=exists, other=0.0)
    for step in range(tl.cdiv(inner, K)):
        if EVEN:
            a, b = tl.load(a_cells), tl.load(b_cells)
        else:
            rest = depth < inner - step * K
            a, b = tl.load(a_cells, mask=rest[None, :], other=0.0), tl.load(b_cells, mask=rest[:, None], other=0.0)
        if SCALED:
            power = tl.load(powers + (step * K // TILE) * tokens + rows_read)
            a = a * power.to(a.dtype)[:, None]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_cells += K
        b_cells += K * width
    if SCALED:
        acc = acc * tl.load(scales + rows_read)[:, None]
    tl.store(cells, acc.to(out.dtype.element_ty), mask=exists)


@triton.jit
def gradient_products(
    hidden, head, grad, table, exponents, shares, deltas, probabilities, gradients,
    tokens, vocabulary, width, out_stride, factor, grad_factor,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p and dz (tokens, vocabulary) of a block of the vocabulary.

    p = 2^(hidden head^T factor - exponents) * shares and dz = p * (grad table^T grad_factor - deltas).
    """
    row_tile, tile = _tile_of(tl.program_id(0), tl.cdiv(tokens, M), tl.cdiv(vocabulary, N), GROUP)
    rows = row_tile * M + tl.arange(0, M)
    columns = tile * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    rows_read, columns_read = rows % tokens, columns % vocabulary
    row_cells = rows_read.to(tl.int64)[:, None] * width + depth[None, :]
    column_cells = columns_read.to(tl.int64)[None, :] * width + depth[:, None]
    scores = tl.zeros((M, N), dtype=tl.float32)
    slopes = tl.zeros((M, N), dtype=tl.float32)
    for step in range(tl.cdiv(width, K)):
        if EVEN:
            a, b = tl.load(hidden + row_cells), tl.load(head + column_cells)
            c, d = tl.load(grad + row_cells), tl.load(table + column_cells)
        else:
            rest = depth < width - step * K
            a = tl.load(hidden + row_cells, mask=rest[None, :], other=0.0)
            b = tl.load(head + column_cells, mask=rest[:, None], other=0.0)
            c = tl.load(grad + row_cells, mask=rest[None, :], other=0.0)
            d = tl.load(table + column_cells, mask=rest[:, None], other=0.0)
        scores = tl.dot(a, b, scores, input_precision=PRECISION)
        slopes = tl.dot(c, d, slopes, input_precision=PRECISION)
        row_cells += K
        column_cells += K
    p = tl.exp2(scores * factor - tl.load(exponents + rows_read)[:, None]) * tl.load(shares + rows_read)[:, None]
    dz = p * (slopes * grad_factor - tl.load(deltas + rows_read)[:, None])
    cells = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    exists = (rows < tokens)[:, None] & (columns < vocabulary)[None, :]
    tl.store(probabilities + cells, p.to(probabilities.dtype.element_ty), mask=exists)
    tl.store(gradients + cells, dz.to(gradients.dtype.element_ty), mask=exists)


@triton.jit
def loss_gradient(q, powers, labels, tokens, vocabulary, stride, ignored, TILE: tl.constexpr, M: tl.constexpr):
    """In place: q * powers - [column is the label], 0 in rows without a label; powers (V / TILE, tokens)."""
    tile = tl.program_id(1)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tile * TILE + tl.arange(0, TILE)
    exists = rows < tokens
    label = tl.load(labels + rows, mask=exists, other=ignored)
    power = tl.load(powers + tile * tokens + rows, mask=exists, other=0.0)
    cells = q + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = exists[:, None] & (columns < vocabulary)[None, :]
    p = tl.load(cells, mask=inside, other=0.0).to(tl.float32) * power[:, None]
    dz = p - tl.where(columns[None, :] == label[:, None], 1.0, 0.0)
    tl.store(cells, tl.where((label == ignored)[:, None], 0.0, dz).to(q.dtype.element_ty), mask=inside)


class _Scores(NamedTuple):
    """What the first kernel leaves of a block of n tokens, every number in powers of two."""

    q: Tensor  # (n, V), rows padded to whole cache lines
    exponents: Tensor  # (tiles, n)
    row_exponents: Tensor  # (n,), the largest of them
    sums: Tensor  # (n,), sum of q at the row's exponent
    loss: Tensor  # (n,) in nats, 0 without labels
    entropy: Tensor  # (n,) in nats, 0 without labels


def launch_options(shape: Tiles) -> dict[str, Any]:
    """Without fused multiply-add, which the compiler may place differently once a kernel makes statistics too."""
    return {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": False}


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # read for fp32 alone


def _check(*tensors: Tensor) -> None:
    kinds = {tensor.dtype for tensor in tensors}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float16, torch.bfloat16}:
        raise ValueError(f"backend 'triton' takes fp32, fp16 or bf16, one for all; got {', '.join(map(str, kinds))}")


def _log_sums(exponents: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exponent and sum of each row, (n,), and 2^(k - k_row) of each tile, (tiles, n)."""
    largest = exponents.amax(0)
    powers = torch.exp2(exponents - largest)
    return largest, (sums * powers).sum(0), powers


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) whose rows start at multiples of 64 elements, as vector loads and wgmma want it."""
    return like.new_empty(rows, (columns + 63) // 64 * 64)[:, :columns]


def _scores(hidden: Tensor, head: Tensor, labels: Tensor | None, temperature: float) -> _Scores:
    """q, log-sum-exp and statistics of a block of tokens, by one product."""
    (tokens, width), vocabulary = hidden.shape, head.shape[0]
    shape = EXP_TILES[hidden.element_size()]
    tiles = triton.cdiv(vocabulary, shape.n)
    unit = labels is not None and temperature != 1.0
    q = _buffer(hidden, tokens, vocabulary)
    per_tile = hidden.new_empty(5, tiles, tokens, dtype=torch.float32)
    exponents, sums, weighted, unit_exponents, unit_sums = per_tile.unbind()
    exp_product[(triton.cdiv(tokens, shape.m) * tiles,)](
        hidden, head, q, exponents, sums, weighted, unit_exponents, unit_sums,
        tokens, vocabulary, width, q.stride(0), LOG2_E / temperature, LOG2_E,
        M=shape.m, N=shape.n, K=shape.k, GROUP=SAME_ROWS, EVEN=width % shape.k == 0,
        STATISTICS=labels is not None, UNIT=unit, PRECISION=_precision(hidden),
        **launch_options(shape),
    )  # fmt: skip
    largest, total, powers = _log_sums(exponents, sums)
    loss = entropy = torch.zeros_like(total)
    if labels is not None:
        lse = largest + torch.log2(total)
        mean = ((weighted + exponents * sums) * powers).sum(0) / total
        entropy = (lse - mean) / LOG2_E
        if unit:
            unit_largest, unit_total, _ = _log_sums(unit_exponents, unit_sums)
            lse = unit_largest + torch.log2(unit_total)
        label_logits = (hidden.float() * head[labels.clamp(min=0)].float()).sum(-1)
        loss = torch.where(labels == IGNORE_INDEX, 0.0, lse / LOG2_E - label_logits)
    return _Scores(q, exponents, largest, total, loss, entropy)


def _scaled_product(left: Tensor, right: Tensor, out: Tensor, powers: Tensor | None, scales: Tensor | None) -> None:
    """out = scales * (left * powers) @ right, or out += left @ right without powers."""
    (tokens, inner), width = left.shape, right.shape[1]
    shape = (ADD_TILES if powers is None else MIX_TILES)[left.element_size()]
    scaled_product[(triton.cdiv(tokens, shape.m) * triton.cdiv(width, shape.n),)](
        left, right, powers, scales, out, tokens, inner, width, left.stride(0),
        TILE=EXP_TILES[left.element_size()].n, M=shape.m, N=shape.n, K=shape.k, GROUP=SAME_ROWS,
        EVEN=inner % shape.k == 0, SCALED=powers is not None, PRECISION=_precision(left),
        **launch_options(shape),
    )  # fmt: skip


class PonderingEmbedding(torch.autograd.Function):
    """Takes and gives what `backends.Chunked` does. Saves the inputs, the output and two numbers a token."""

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
        _check(hidden, head, table)
        tokens = hidden.shape[0]
        keep, (hidden, head, table) = (hidden, head, table), (t.contiguous() for t in (hidden, head, table))
        mixed = torch.empty_like(hidden)
        exponents, shares, loss, entropy = hidden.new_empty(4, tokens, dtype=torch.float32).unbind()
        for start in range(0, tokens, TOKEN_BLOCK):
            part = slice(start, start + TOKEN_BLOCK)
            seen = _scores(hidden[part], head, None if labels is None else labels[part], temperature)
            powers = torch.exp2(seen.exponents - seen.row_exponents)
            _scaled_product(seen.q, table, mixed[part], powers, scale / seen.sums)
            exponents[part], shares[part] = seen.row_exponents, 1.0 / seen.sums
            loss[part], entropy[part] = seen.loss, seen.entropy
        ctx.save_for_backward(*keep, mixed, exponents, shares)
        ctx.temperature, ctx.scale = temperature, scale
        ctx.mark_non_differentiable(loss, entropy)
        return mixed, loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, head, table, mixed, exponents, shares = ctx.saved_tensors
        hidden, head, table, grad = (t.contiguous() for t in (hidden, head, table, grad))
        need_hidden, need_head, need_table = ctx.needs_input_grad[:3]
        (tokens, width), vocabulary = hidden.shape, head.shape[0]
        deltas = (grad.float() * mixed.float()).sum(-1).div_(ctx.temperature)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        d_head = torch.empty_like(head) if need_head else None
        d_table = torch.empty_like(table) if need_table else None
        shape = GRADIENT_TILES[hidden.element_size()]
        for start in range(0, vocabulary, VOCABULARY_BLOCK):
            part = slice(start, min(start + VOCABULARY_BLOCK, vocabulary))
            columns = part.stop - part.start
            p, dz = _buffer(hidden, tokens, columns), _buffer(hidden, tokens, columns)
            gradient_products[(triton.cdiv(tokens, shape.m) * triton.cdiv(columns, shape.n),)](
                hidden, head[part], grad, table[part], exponents, shares, deltas, p, dz,
                tokens, columns, width, p.stride(0), LOG2_E / ctx.temperature, ctx.scale / ctx.temperature,
                M=shape.m, N=shape.n, K=shape.k, GROUP=SAME_ROWS, EVEN=width % shape.k == 0,
                PRECISION=_precision(hidden), **launch_options(shape),
            )  # fmt: skip
            if d_table is not None:
                torch.mm(p.t(), grad, out=d_table[part])
            if d_head is not None:
                torch.mm(dz.t(), hidden, out=d_head[part])
            if d_hidden is not None:
                _scaled_product(dz, head[part], d_hidden, None, None)
        if d_table is not None and ctx.scale != 1.0:
            d_table.mul_(ctx.scale)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_head, d_table, None, None, None


class CrossEntropy(TorchCrossEntropy):
    """Its forward by the kernels: three products, the gradients made here and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, with_gradient: bool, z_loss: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check(hidden, head)
        hidden, head, labels = hidden.contiguous(), head.contiguous(), labels.contiguous()
        (tokens, _), vocabulary = hidden.shape, head.shape[0]
        need_hidden, need_head = (needed and with_gradient for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
        loss, entropy, squares = hidden.new_empty(3, tokens, dtype=torch.float32).unbind()
        tile = EXP_TILES[hidden.element_size()].n
        for start in range(0, tokens, TOKEN_BLOCK):
            part = slice(start, min(start + TOKEN_BLOCK, tokens))
            count = part.stop - part.start
            seen = _scores(hidden[part], head, labels[part], 1.0)
            loss[part], entropy[part] = seen.loss, seen.entropy
            lse = (seen.row_exponents + torch.log2(seen.sums)) / LOG2_E
            squares[part] = lse.square()
            if d_hidden is None and d_head is None:
                continue
            powers = torch.exp2(seen.exponents - seen.row_exponents) * ((1.0 + 2.0 * z_loss * lse) / seen.sums)
            grid = (triton.cdiv(count, LOSS_TILES.m), triton.cdiv(vocabulary, tile))
            loss_gradient[grid](
                seen.q, powers, labels[part], count, vocabulary, seen.q.stride(0), IGNORE_INDEX,
                TILE=tile, M=LOSS_TILES.m, **launch_options(LOSS_TILES),
            )  # fmt: skip
            if d_hidden is not None:
                torch.mm(seen.q, head, out=d_hidden[part])
            if d_head is not None:
                d_head.add_(torch.mm(seen.q.t(), hidden[part]))
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        ctx.mark_non_differentiable(loss, entropy)
        return total_loss(loss, squares, labels, z_loss), loss, entropy
