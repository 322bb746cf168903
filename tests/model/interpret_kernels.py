"""Run the Triton backend on the CPU by Triton's interpreter and print its errors against float64, as JSON.

`python -m tests.model.interpret_kernels fp16 bf16` does so in both: dtype -> case -> errors.

Run by test_kernels.py in a process of its own: TRITON_INTERPRET=1 counts when triton is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from ponder_scale.model import kernels, tiles
from ponder_scale.model.pondering_embedding import cross_entropy, pondering_embedding
from ponder_scale.model.sparse import gradients_by_kernels
from tests.model.interpret_bf16 import right_bf16

TOKENS, WIDTH, VOCABULARY = 150, 80, 1003  # no multiple of any tile
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = ("value", "loss", "entropy", "hidden", "head", "table")


def operands(
    dtype: torch.dtype, tied: bool, width: int = WIDTH
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, width, generator=generator)
    head = 0.4 * torch.randn(VOCABULARY, width, generator=generator)
    table = head if tied else torch.randn(VOCABULARY, width, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::7] = -100
    upstream = torch.randn(TOKENS, width, generator=generator)
    return [tensor.to(dtype) for tensor in (hidden, head, table)], labels, upstream.to(dtype)


def leaves(tensors: list[torch.Tensor], dtype: torch.dtype, tied: bool) -> list[torch.Tensor]:
    made = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
    return [*made[:2], made[1]] if tied else made


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def learned_errors(dtype: torch.dtype, tied: bool, **options: Any) -> dict[str, float]:
    """Of the gradients where the losses of tokens are learned, each with a weight of its own."""
    tensors, labels, upstream = operands(dtype, tied)
    ours, theirs = leaves(tensors, dtype, tied), leaves(tensors, torch.float64, tied)
    slopes = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1))
    for mine, backend in ((ours, "triton"), (theirs, "eager")):
        mixed, seen = pondering_embedding(*mine, labels=labels, learn=True, backend=backend, **options)
        torch.autograd.backward([mixed, seen.loss], [upstream.to(mixed.dtype), slopes.to(seen.loss.dtype)])
    pairs = [(got.grad, reference.grad) for got, reference in zip(ours, theirs, strict=True)]
    return {name: relative(*pair) for name, pair in zip(NAMES[3:], pairs, strict=True)}


def embedding_errors(dtype: torch.dtype, tied: bool, width: int = WIDTH, **options: Any) -> dict[str, float]:
    tensors, labels, upstream = operands(dtype, tied, width)
    ours, theirs = leaves(tensors, dtype, tied), leaves(tensors, torch.float64, tied)
    mixed, seen = pondering_embedding(*ours, labels=labels, backend="triton", **options)
    expected, wanted = pondering_embedding(*theirs, labels=labels, backend="eager", **options)
    unlabelled, _ = pondering_embedding(*ours, backend="triton", **options)
    mixed.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(mixed, expected), (seen.loss, wanted.loss), (seen.entropy, wanted.entropy)]
    pairs += [(got.grad, reference.grad) for got, reference in zip(ours, theirs, strict=True)]
    errors = {name: relative(*pair) for name, pair in zip(NAMES, pairs, strict=True)}
    return {**errors, "changed by statistics": float(not torch.equal(mixed, unlabelled))}


def loss_errors(dtype: torch.dtype, **options: Any) -> dict[str, float]:
    tensors, labels, _ = operands(dtype, tied=False)
    ours, theirs = (leaves(tensors, kind, tied=False)[:2] for kind in (dtype, torch.float64))
    total, seen = cross_entropy(*ours, labels, backend="triton", **options)
    expected, wanted = cross_entropy(*theirs, labels, **options)
    (total * 0.01).backward()
    (expected * 0.01).backward()
    pairs = [(total, expected), (seen.loss, wanted.loss), (seen.entropy, wanted.entropy)]
    pairs += [(got.grad, reference.grad) for got, reference in zip(ours, theirs, strict=True)]
    return {name: relative(*pair) for name, pair in zip(NAMES, pairs, strict=False)}


def sparse_errors(dtype: torch.dtype) -> dict[str, float]:
    """Of the gradients of sums of 7 rows, most of them picked by no token and one by all."""
    (_, _, table), _, upstream = operands(dtype, tied=False)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, VOCABULARY, (TOKENS, 7), generator=generator)
    index[:, 3] = 5
    weights = torch.rand(TOKENS, 7, generator=generator)
    d_weights, d_table = gradients_by_kernels(index, weights, table, upstream, True, True)
    dense = torch.zeros(TOKENS, VOCABULARY, dtype=torch.float64)
    dense.scatter_add_(1, index, weights.double())
    wanted = (upstream.double() @ table.double().t()).gather(1, index)
    return {"hidden": relative(d_weights, wanted), "table": relative(d_table, dense.t() @ upstream.double())}


def errors(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Of every case in a dtype."""
    return {
        "plain": embedding_errors(dtype, False),
        "temperature and scale": embedding_errors(dtype, False, temperature=0.9, scale=2.5),
        "tied": embedding_errors(dtype, True, temperature=0.9, scale=2.5),
        "rows that no descriptor takes": embedding_errors(dtype, False, WIDTH - 1),
        "learned": learned_errors(dtype, False),
        "learned, tied": learned_errors(dtype, True, scale=2.5),
        "learned, temperature": learned_errors(dtype, False, temperature=0.9, scale=2.5),
        "learned, tied, temperature": learned_errors(dtype, True, temperature=1.3),
        "sparse": sparse_errors(dtype),
        "loss": loss_errors(dtype),
        "loss with z-loss": loss_errors(dtype, z_loss=0.05),
    }


def main() -> None:
    """Blocks are small enough that there are several, the last of them of few tokens."""
    kernels.TOKEN_BLOCK, kernels.VOCABULARY_BLOCK = 96, 512
    tiles.PROCESSORS_INTERPRETED = 3  # fewer than tiles, so that a persistent program computes several
    right_bf16()
    assert tiles.FEW_TOKENS < kernels.TOKEN_BLOCK and TOKENS % kernels.TOKEN_BLOCK <= tiles.FEW_TOKENS
    print(json.dumps({name: errors(DTYPES[name]) for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
