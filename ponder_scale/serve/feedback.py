"""The pondering embedding of served tokens. One device holds the whole vocabulary, or each device holds a part.

N tokens, D hidden size, V vocabulary, n vocabulary rows on this rank. hidden (N, D), head and table (n, D). Tokens are
processed in blocks, so that no (N, V) matrix exists. Ranks combine their parts of the vocabulary with one gather and
two sums for each block:

    m = max over ranks of max_v z_v        Z = sum over ranks of sum_v exp(z_v - m)
    T = c / Z * sum over ranks of sum_v exp(z_v - m) E[v]

With top-K each rank sends its K largest scores instead. Then each rank adds up those of its own rows that are among the
K largest of all ranks.
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
    """The collectives among the ranks that share a vocabulary."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors (N, k) of all ranks in rank order to (N, k * ranks)."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the tensors of all ranks."""


@dataclass(frozen=True)
class Mixing:
    """The settings of the pondering softmax: the temperature tau, the factor c, and K or None."""

    temperature: float
    scale: float
    top_k: int | None


def mix(hidden: Tensor, head: Tensor, table: Tensor, mixing: Mixing) -> Tensor:
    """The pondering embedding (N, D), if this device holds the whole vocabulary."""
    mixed, _ = pondering_embedding(
        hidden, head, table, temperature=mixing.temperature, scale=mixing.scale, top_k=mixing.top_k
    )
    return mixed


def mix_parts(
    hidden: Tensor, head: Tensor, table: Tensor, mixing: Mixing, *, ranks: Ranks, rank: int, part: int, vocabulary: int
) -> Tensor:
    """The pondering embedding (N, D), if this rank holds n rows of the vocabulary. n may be 0.

    Args:
        rank: the place of this rank in what `ranks` gathers.
        part: at least n, and equal on all ranks. It sets the block size, so that all ranks process as many blocks.
        vocabulary: the number of rows on all ranks together.
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
    """Each rank sends its `here` largest scores, padded with -inf if it has fewer rows."""
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
