"""Adapters on a head or a table, as those of PEFT are built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """An adapter over a linear layer or a table, as those of PEFT are built: a module around the old one."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(1)
        rows, columns = base.weight.shape
        base.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, columns, generator=generator).to(base.weight) * 0.3)
        self.up = nn.Parameter(torch.randn(rows, 2, generator=generator).to(base.weight) * 0.3)

    def merged(self) -> Tensor:
        return self.base.weight + self.up @ self.down

    def forward(self, given: Tensor) -> Tensor:
        if isinstance(self.base, nn.Embedding):
            return self.base(given) + nn.functional.embedding(given, self.up) @ self.down
        return self.base(given) + given @ self.down.t() @ self.up.t()


def adapt(model: Any, which: str) -> list[LowRank]:
    """Put adapters on the head, the table, or both."""
    adapters = []
    if which in ("head", "both"):
        adapters.append(LowRank(model.get_output_embeddings()))
        model.lm_head = adapters[-1]
    if which in ("table", "both"):
        adapters.append(LowRank(model.get_input_embeddings()))
        model.set_input_embeddings(adapters[-1])
    return adapters
