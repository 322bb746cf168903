"""The Triton kernels of the pondering embedding and the loss: matrix products with the softmax inside them.

`kernels` combines them and describes their order. N tokens, D hidden size, V vocabulary. Scores are exponents of two,
z = h W^T log2(e) / tau, and the offsets of tiles are integers, so that rescaling a tile to another offset is exact in
any dtype. There are no atomics, so the same inputs give the same bits. Offsets into (N, V) are 64-bit. Sums are fp32.
"""

# Triton gives its own meaning to the annotations of a kernel, and ships no types
# mypy: disable-error-code="no-untyped-def, import-untyped"
from __future__ import annotations

try:  # guarded, because the loader of remote code requires every package that a file imports without a guard
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the triton backend needs the package triton; use backend 'auto' or 'chunked'") from error


@triton.jit
def _tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """The row tile and column tile of a program. GROUP row tiles go through the columns together."""
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    size = min(row_tiles - first, GROUP)
    return first + program % (GROUP * column_tiles) % size, program % (GROUP * column_tiles) // size


@triton.jit
def _store_exponentials(
    acc, row_tile, tile,
    out, exponents, sums, kept, weighted, unit_exponents, unit_sums,
    tokens, vocabulary, out_stride, factor, unit_factor,
    M: tl.constexpr, N: tl.constexpr, STATISTICS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """What `exp_product` writes, of one tile of hidden head^T, `acc`."""
    rows = row_tile * M + tl.arange(0, M)
    columns = tile * N + tl.arange(0, N)
    inside = columns[None, :] < vocabulary
    exists = rows < tokens
    place = tile * tokens + rows
    if UNIT:
        y = tl.where(inside, acc * unit_factor, float("-inf"))
        unit = tl.ceil(tl.max(y, 1))
        tl.store(unit_exponents + place, unit, mask=exists)
        tl.store(unit_sums + place, tl.sum(tl.exp2(y - unit[:, None]), 1), mask=exists)
    z = tl.where(inside, acc * factor, -1e30)  # times q, which is 0 there, it is 0
    exponent = tl.ceil(tl.max(z, 1))
    z = z - exponent[:, None]
    q = tl.exp2(z)
    tl.store(exponents + place, exponent, mask=exists)
    tl.store(sums + place, tl.sum(q, 1), mask=exists)
    if STATISTICS:
        tl.store(weighted + place, tl.sum(q * z, 1), mask=exists)
    stored = q.to(out.dtype.element_ty)
    tl.store(kept + place, tl.sum(stored.to(tl.float32), 1), mask=exists)
    cells = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(cells, stored, mask=exists[:, None] & inside)


@triton.jit
def exp_product(
    hidden, head, out, exponents, sums, kept, weighted, unit_exponents, unit_sums,
    tokens, vocabulary, width, out_stride, factor, unit_factor,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    STATISTICS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q (tokens, vocabulary) of hidden (tokens, width) and head; per (tile, row) exponent, sum q, sum of stored q.

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
    _store_exponentials(
        acc, row_tile, tile, out, exponents, sums, kept, weighted, unit_exponents, unit_sums,
        tokens, vocabulary, out_stride, factor, unit_factor, M, N, STATISTICS, UNIT,
    )  # fmt: skip


@triton.jit
def persistent_exp_product(
    hidden, head, out, exponents, sums, kept, weighted, unit_exponents, unit_sums,
    tokens, vocabulary, width, out_stride, factor, unit_factor,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    STATISTICS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """`exp_product` of operands given as tensor descriptors, with fewer programs than tiles.

    A program stays on its processor and computes every num_programs-th tile. The loads of its next tile, which take no
    registers, run during the exponentials of this one. SPECIALIZED: loads, products and exponentials have warps of
    their own, so that the products of the next tile also run then.
    """
    row_tiles, column_tiles = tl.cdiv(tokens, M), tl.cdiv(vocabulary, N)
    for program in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True, warp_specialize=SPECIALIZED
    ):
        row_tile, tile = _tile_of(program, row_tiles, column_tiles, GROUP)
        acc = tl.zeros((M, N), dtype=tl.float32)
        for step in range(tl.cdiv(width, K)):
            a, b = hidden.load([row_tile * M, step * K]), head.load([tile * N, step * K])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        _store_exponentials(
            acc, row_tile, tile, out, exponents, sums, kept, weighted, unit_exponents, unit_sums,
            tokens, vocabulary, out_stride, factor, unit_factor, M, N, STATISTICS, UNIT,
        )  # fmt: skip


@triton.jit
def scaled_product(
    left, right, powers, scales, out,
    tokens, inner, width, left_stride, steps,
    TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SCALED: out = scales * ((left * powers) @ right) over `steps` steps of K rows of `right` for each split.

    Otherwise out += left @ right, in one split. left (tokens, inner), right (inner, width), powers
    (inner / TILE, tokens), scales (tokens,), out (splits, tokens, width).
    """
    row_tile, tile = _tile_of(tl.program_id(0), tl.cdiv(tokens, M), tl.cdiv(width, N), GROUP)
    split = tl.program_id(1)
    rows = row_tile * M + tl.arange(0, M)
    columns = tile * N + tl.arange(0, N)
    start = split * steps * K
    depth = start + tl.arange(0, K)
    rows_read, columns_read = rows % tokens, columns % width
    a_cells = left + rows_read.to(tl.int64)[:, None] * left_stride + depth[None, :]
    b_cells = right + depth.to(tl.int64)[:, None] * width + columns_read[None, :]
    cells = out + (split.to(tl.int64) * tokens + rows)[:, None] * width + columns[None, :]
    exists = (rows < tokens)[:, None] & (columns < width)[None, :]
    if SCALED:
        acc = tl.zeros((M, N), dtype=tl.float32)
    else:
        acc = tl.load(cells, mask=exists, other=0.0)
    for step in range(min(steps, tl.cdiv(inner - start, K))):
        if EVEN:
            a, b = tl.load(a_cells), tl.load(b_cells)
        else:
            rest = depth < inner - step * K
            a, b = tl.load(a_cells, mask=rest[None, :], other=0.0), tl.load(b_cells, mask=rest[:, None], other=0.0)
        if SCALED:
            power = tl.load(powers + ((start + step * K) // TILE) * tokens + rows_read)
            a = a * power.to(a.dtype)[:, None]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_cells += K
        b_cells += K * width
    if SCALED:
        acc = acc * tl.load(scales + rows_read)[:, None]
    tl.store(cells, acc.to(out.dtype.element_ty), mask=exists)


@triton.jit
def gradient_products(
    hidden, head, grad, table, exponents, shares, deltas, probabilities, gradients, leaks,
    labels, label_slopes, unit_logs,
    tokens, vocabulary, width, out_stride, factor, grad_factor, unit_factor,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    TIED: tl.constexpr, LEARN: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p and dz (tokens, vocabulary) of a block of the vocabulary; per (tile, row) the sum of dz as stored, `leaks`.

    TIED: table is head, and loaded once.
    p = 2^(hidden head^T factor - exponents) * shares and dz = p * (grad table^T grad_factor - deltas).
    LEARN: dz -= label_slopes in the column of the label, which counts from the block's first; with UNIT also
    dz += 2^(hidden head^T unit_factor - unit_logs) * label_slopes, where that is not p label_slopes, put into `deltas`.
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
            a, b, c = tl.load(hidden + row_cells), tl.load(head + column_cells), tl.load(grad + row_cells)
        else:
            rest = depth < width - step * K
            a = tl.load(hidden + row_cells, mask=rest[None, :], other=0.0)
            b = tl.load(head + column_cells, mask=rest[:, None], other=0.0)
            c = tl.load(grad + row_cells, mask=rest[None, :], other=0.0)
        if TIED:
            d = b
        elif EVEN:
            d = tl.load(table + column_cells)
        else:
            d = tl.load(table + column_cells, mask=(depth < width - step * K)[:, None], other=0.0)
        scores = tl.dot(a, b, scores, input_precision=PRECISION)
        slopes = tl.dot(c, d, slopes, input_precision=PRECISION)
        row_cells += K
        column_cells += K
    p = tl.exp2(scores * factor - tl.load(exponents + rows_read)[:, None]) * tl.load(shares + rows_read)[:, None]
    dz = p * (slopes * grad_factor - tl.load(deltas + rows_read)[:, None])
    if LEARN:
        slope = tl.load(label_slopes + rows_read)[:, None]
        if UNIT:
            dz += tl.exp2(scores * unit_factor - tl.load(unit_logs + rows_read)[:, None]) * slope
        dz -= tl.where(columns[None, :] == tl.load(labels + rows_read)[:, None], slope, 0.0)
    cells = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    exists = (rows < tokens)[:, None] & (columns < vocabulary)[None, :]
    tl.store(probabilities + cells, p.to(probabilities.dtype.element_ty), mask=exists)
    stored = tl.where(exists, dz, 0.0).to(gradients.dtype.element_ty)
    tl.store(gradients + cells, stored, mask=exists)
    tl.store(leaks + tile * tokens + rows, tl.sum(stored.to(tl.float32), 1), mask=rows < tokens)


@triton.jit
def head_gradient(
    q, powers, labels, hidden, out,
    tokens, vocabulary, width, stride, ignored,
    TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out += dz^T hidden, where dz = q * powers - [column is the label] is the gradient of the loss to the logits.

    q (tokens, vocabulary) in rows of `stride`, a multiple of 64, with zeros after the vocabulary; powers
    (vocabulary / TILE, tokens), 0 for tokens without a label; hidden (tokens, width), out (vocabulary, width) in fp32.
    """
    row_tile, tile = _tile_of(tl.program_id(0), tl.cdiv(vocabulary, M), tl.cdiv(width, N), GROUP)
    rows = row_tile * M + tl.arange(0, M)
    columns = tile * N + tl.arange(0, N)
    cells = out + rows.to(tl.int64)[:, None] * width + columns[None, :]
    exists = (rows < vocabulary)[:, None] & (columns < width)[None, :]
    acc = tl.load(cells, mask=exists, other=0.0)
    row_powers = powers + (row_tile * M // TILE).to(tl.int64) * tokens
    for step in range(tl.cdiv(tokens, K)):
        depth = step * K + tl.arange(0, K)
        read = (depth % tokens).to(tl.int64)
        scores = tl.load(q + read[None, :] * stride + rows[:, None], mask=(rows < stride)[:, None], other=0.0)
        right = tl.load(hidden + read[:, None] * width + (columns % width)[None, :])
        power = tl.load(row_powers + depth, mask=depth < tokens, other=0.0)
        label = tl.load(labels + depth, mask=depth < tokens, other=ignored)
        dz = scores.to(tl.float32) * power[None, :] - tl.where(label[None, :] == rows[:, None], 1.0, 0.0)
        acc = tl.dot(dz.to(right.dtype), right, acc, input_precision=PRECISION)
    tl.store(cells, acc, mask=exists)
