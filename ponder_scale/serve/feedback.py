"""The pondering embedding of served tokens, with the vocabulary on one device or a part of it on each.

N tokens, D hidden size, V vocabulary, n rows of it on this rank; hidden (N, D), head and table (n, D). Tokens go in
blocks, so that no (N, V) matrix exists. Parts of a vocabulary meet in one gather and two sums for each block:

    m = max over ranks of max_v z_v        Z = sum over ranks of sum_v exp(z_v - m)
    T = c / Z * sum over ranks of sum_v exp(z_v - m) E[v]

With top-K the ranks gather their K largest scores instead, and each adds up the rows that are among the K of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ponder_scale.model.backends import chunk, wide
from ponder_scale.model.pondering_embedding import pondering_embedding


class Ranks(Protocol):
    """The collectives of the ranks that share a vocabulary."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors (N, k) of all ranks behind each other, (N, k * ranks), in the order of the ranks."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""


@dataclass(frozen=True)
class Mixing:
    """The settings of the pondering softmax: tau, the factor c, K or None."""

    temperature: float
    scale: float
    top_k: int | None


def mix(hidden: Tensor, head: Tensor, table: Tensor, mixing: Mixing) -> Tensor:
    """The pondering embedding (N, D) where all of the vocabulary is here."""
    mixed, _ = pondering_embedding(
        hidden, head, table, temperature=mixing.temperature, scale=mixing.scale, top_k=mixing.top_k
    )
    return mixed


def mix_parts(
    hidden: Tensor, head: Tensor, table: Tensor, mixing: Mixing, *, ranks: Ranks, rank: int, part: int, vocabulary: int
) -> Tensor:
    """The pondering embedding (N, D) where this rank has n rows of the vocabulary, which may be none.

    Args:
        rank: its place in what `ranks` gathers.
        part: the same on all ranks, at least n; the blocks are made by it, so that all ranks take as many.
        vocabulary: rows on all ranks.
    """
    out = torch.empty_like(hidden)
    rows = chunk(hidden, max(1, hidden.shape[0]), part)
    top_k = mixing.top_k if mixing.top_k is not None and mixing.top_k < vocabulary else None
    for start in range(0, hidden.shape[0], rows):
        block = slice(start, start + rows)
        z = wide(F.linear(hidden[block], head))  # (r, n)
        if top_k is None:
            out[block] = _whole_part(z, table, mixing, ranks)
        else:
            out[block] = _largest_part(z, table, mixing, ranks, rank, min(top_k, part), top_k)
    return out


def _whole_part(z: Tensor, table: Tensor, mixing: Mixing, ranks: Ranks) -> Tensor:
    z = z / mixing.temperature
    most = z.amax(-1, keepdim=True) if z.shape[1] else z.new_full((z.shape[0], 1), -math.inf)
    most = ranks.gather(most).amax(-1, keepdim=True)  # (r, 1)
    p = (z - most).exp_()
    total = ranks.sum(p.sum(-1, keepdim=True))
    return ranks.sum(p.to(table.dtype) @ table) / total * mixing.scale


def _largest_part(z: Tensor, table: Tensor, mixing: Mixing, ranks: Ranks, rank: int, here: int, top_k: int) -> Tensor:
    """`here` of the scores are sent from each rank, padded with -inf where it has fewer rows."""
    values, index = z.topk(min(here, z.shape[1]), dim=-1)
    missing = here - values.shape[1]
    values, index = F.pad(values, (0, missing), value=-math.inf), F.pad(index, (0, missing))
    every = ranks.gather(values)  # (r, here * ranks)
    best, places = every.topk(top_k, dim=-1)
    p = torch.zeros_like(every).scatter_(-1, places, torch.softmax(best / mixing.temperature, dim=-1))
    mine = p[:, rank * here : (rank + 1) * here]
    if table.shape[0]:
        mixed = F.embedding_bag(index, table, per_sample_weights=mine.to(table.dtype), mode="sum")
    else:
        mixed = table.new_zeros(z.shape[0], table.shape[1])
    return ranks.sum(mixed) * mixing.scale
