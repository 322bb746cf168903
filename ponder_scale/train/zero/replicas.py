"""Check that all data-parallel ranks hold the same weights.

Stages 0 to 2 keep whole weights on every rank. They are equal by construction until a device, a driver or a bug makes
one rank differ. Nothing fails then, and the run silently trains on.

Each rank adds up the bits of each tensor as integers, on the device of the tensor. This takes one pass over the weights
and is exact in any order. It finds every single flipped bit, but not changes that cancel each other.

    stage 0       also has whole moments on every rank
    stages 1, 2   make the weights equal again after each update, so they must be compared before it
    stage 3       has no replicas except the persistent parameters
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator: odd, so that no sum is lost modulo 2**64


@dataclass(frozen=True)
class Divergence:
    """The ranks whose weights differ from those of most ranks, and the tensors that differ there."""

    ranks: list[int]
    tensors: list[str]
    majority: bool  # whether most ranks agree; if not, rank 0 is taken to be right


def replicated(engine: Any, zero_stage: int) -> dict[str, Tensor]:
    """The tensors that every rank holds whole, by name.

    Args:
        engine: DeepSpeed's engine.
    """
    parameters = dict(engine.module.named_parameters())
    if zero_stage == 3:
        return {name: p.data for name, p in parameters.items() if p.ds_persist and p.data.numel() == p.ds_numel}
    if zero_stage:
        return {name: p.data for name, p in parameters.items()}
    tensors = {name: p.data for name, p in parameters.items()}
    for number, entry in enumerate(engine.basic_optimizer.state.values()):
        tensors |= {f"moment {key} {number}": value for key, value in entry.items() if torch.is_tensor(value)}
    return tensors


def bit_sums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of each tensor's bits as integers, modulo 2**64: (tensors,) int64 on `device`."""
    sums = [tensor.detach().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack([value.to(device) for value in sums]) if sums else torch.zeros(0, dtype=torch.int64).to(device)


def divergence(
    tensors: dict[str, Tensor], rank: int, world_size: int, total: Callable[[Tensor], Tensor], device: torch.device
) -> Divergence | None:
    """Compare `tensors` over the ranks. None if all are equal. Collective: sends one number a rank unless they differ.

    Args:
        total: function that returns the sum of a tensor over the ranks.
    """
    own = bit_sums(list(tensors.values()), device)
    # The products wrap around modulo 2**64, which is intended.
    powers = torch.cumprod(torch.full_like(own, MULTIPLIER), dim=0)
    digests = torch.zeros(world_size, dtype=torch.int64, device=device)
    digests[rank] = (own * powers).sum()
    found = total(digests).tolist()
    if len(set(found)) == 1:
        return None
    table = torch.zeros(world_size, len(own), dtype=torch.int64, device=device)
    table[rank] = own
    rows = total(table)
    digest, votes = Counter(found).most_common(1)[0]
    majority = votes > world_size / 2
    right = found.index(digest) if majority else 0
    ranks = [other for other in range(world_size) if found[other] != found[right]]
    differing = (rows[ranks] != rows[right]).any(dim=0).tolist()
    return Divergence(ranks, [name for name, differs in zip(tensors, differing, strict=True) if differs], majority)
