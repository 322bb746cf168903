"""Operands of the pondering embedding, the options and backends to try, and its equation in loops."""

from __future__ import annotations

import torch

TOKENS, WIDTH, VOCABULARY = 13, 6, 17
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"scale": 2.5},
    {"top_k": 4},
    {"top_k": 4, "temperature": 1.3, "scale": 0.5},
    {"top_k": VOCABULARY},
]
# every option with every backend that can do it
CASES = [
    *((options, backend) for options in OPTIONS for backend in ("auto", "chunked", "eager")),
    *((options, "sdpa") for options in OPTIONS if "top_k" not in options),
    *((options, "top_k") for options in OPTIONS if "top_k" in options),
]


def operands(dtype: torch.dtype, tied: bool = False, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=dtype)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    table = head if tied else torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (hidden, head, table)]


def by_loops(
    hidden: torch.Tensor,
    head: torch.Tensor,
    table: torch.Tensor,
    temperature: float = 1.0,
    scale: float = 1.0,
    top_k: int | None = None,
) -> torch.Tensor:
    """The equation, one token and one vocabulary entry at a time."""
    rows = []
    for h in hidden:
        z = torch.stack([(h * w).sum() for w in head]) / temperature
        kept = z.argsort(descending=True)[: top_k or len(z)].tolist()
        weights = {v: torch.exp(z[v] - z.max()) for v in kept}
        total = sum(weights.values())
        rows.append(scale * sum(weights[v] / total * table[v] for v in kept))
    return torch.stack(rows)
