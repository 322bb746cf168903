"""The gradients of a sparse mixture by Triton: sum_k w[n, k] X[i[n, k]], with K of V rows for each of N tokens.

Torch's operations gather (N, K, D) in fp32 in blocks, write it, read it and sort it into the rows. These kernels read
each picked row of X where it is used. They sum each row of the gradient in registers, in the order of the tokens, and
write it once. There are no atomics, so the same inputs give the same bits.
"""

# Triton gives its own meaning to the annotations of a kernel, and ships no types
# mypy: disable-error-code="no-untyped-def, import-untyped"
from __future__ import annotations

import torch
from torch import Tensor

try:  # guarded, because the loader of remote code requires every package that a file imports without a guard
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the triton backend needs the package triton; use backend 'auto' or 'chunked'") from error

from .kernels import launch
from .tiles import Tiles

DOT_TILES = Tiles(1, 128, 32, 4, 3)  # columns, and picked rows at a time
SUM_TILES = Tiles(1, 128, 32, 4, 3)  # columns, and tokens at a time


@triton.jit
def picked_dots(upstream, matrix, index, slopes, top_k, width, N: tl.constexpr, K: tl.constexpr):
    """Write slopes (tokens, top_k): <upstream[n], matrix[index[n, k]]>."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * K + tl.arange(0, K)
    exists = places < top_k
    rows = tl.load(index + token * top_k + places, mask=exists, other=0)
    total = tl.zeros((K,), dtype=tl.float32)
    for start in range(0, width, N):
        columns = start + tl.arange(0, N)
        inside = columns < width
        above = tl.load(upstream + token * width + columns, mask=inside, other=0.0).to(tl.float32)
        cells = matrix + rows[:, None] * width + columns[None, :]
        picked = tl.load(cells, mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(picked * above[None, :], 1)
    tl.store(slopes + token * top_k + places, total, mask=exists)


@triton.jit
def picking_sums(weights, upstream, order, bounds, out, top_k, width, N: tl.constexpr, K: tl.constexpr):
    """Write out (rows, width): for each row, the sum of weights * upstream[token] over its picks.

    A pick is a token and a place k at which the token picked the row, as token * top_k + place. `order` lists all picks
    by row. Those of row v are between bounds[v] and bounds[v + 1].
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    inside = columns < width
    first, last = tl.load(bounds + row), tl.load(bounds + row + 1)
    total = tl.zeros((N,), dtype=tl.float32)
    for start in range(first, last, K):
        places = start + tl.arange(0, K)
        exists = places < last
        pairs = tl.load(order + places, mask=exists, other=0)
        weight = tl.load(weights + pairs, mask=exists, other=0.0)
        cells = upstream + (pairs // top_k)[:, None] * width + columns[None, :]
        above = tl.load(cells, mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(above * weight[:, None], 0)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=inside)


def gradients_by_kernels(
    index: Tensor, weights: Tensor, matrix: Tensor, upstream: Tensor, need_weights: bool, need_matrix: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the weights (N, K), in fp32, and of the matrix (V, D), from index (N, K) and upstream (N, D).

    Raises:
        LaunchFailed: a kernel did not start.
    """
    (tokens, top_k), (rows, width) = index.shape, matrix.shape
    index, matrix, upstream = index.contiguous(), matrix.contiguous(), upstream.contiguous()
    d_weights, d_matrix = torch.empty_like(weights), torch.empty_like(matrix) if need_matrix else None
    if need_weights and tokens:
        shape = DOT_TILES
        launch(
            picked_dots, (tokens, triton.cdiv(top_k, shape.k)), shape,
            upstream, matrix, index, d_weights, top_k, width, N=shape.n, K=shape.k,
        )  # fmt: skip
    if d_matrix is not None:
        shape = SUM_TILES
        picked, order = index.flatten().sort(stable=True)
        bounds = torch.searchsorted(picked, torch.arange(rows + 1, device=index.device))
        launch(
            picking_sums, (rows, triton.cdiv(width, shape.n)), shape,
            weights.contiguous(), upstream, order, bounds, d_matrix, top_k, width, N=shape.n, K=shape.k,
        )  # fmt: skip
    return d_weights, d_matrix
