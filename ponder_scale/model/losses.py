"""The loss of one forward, and what the output says of its passes.

B batch, T tokens, D hidden size, S pondering steps, N = B T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backends import IGNORE_INDEX
from .halting import Halting, expected_loss, smallest_gates
from .passes import Watch


def next_tokens(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """The next token of each token, (B, T), -100 where there is none. Only `labels` are shifted here."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def losses(
    watch: Watch,
    hidden: Tensor,
    z_loss: float,
    halting_loss: tuple[float, float] | None,
    num_items: Tensor | int | None,
) -> dict[str, Any]:
    """The loss of hidden states (B, T, D), summed and divided by `num_items`, and more fields of the output."""
    targets = watch.targets
    assert targets is not None
    if hasattr(watch.causal, "_loss_function"):  # set by transformers' setter
        raise ValueError(
            "loss_function was set on this model, which never calls it, because its loss is one op with the head; "
            "compute your loss from the logits, or give Trainer a compute_loss_func"
        )
    weights = watch.weights
    if weights is not None:
        z_loss = z_loss / weights[-1]  # because the whole last loss is multiplied by it
    if watch.exits:
        last = watch.readout.token_losses(hidden, targets)
        total = last.loss.sum()
    else:
        total, last = watch.readout.cross_entropy(hidden, targets, z_loss)
    passes: list[Any] = [*watch.statistics, last]
    counted = (targets != IGNORE_INDEX).reshape(-1)
    count = counted.sum().clamp(min=1)
    with torch.no_grad():
        by_pass = torch.stack([seen.loss.sum() for seen in passes]) / count
        entropies = torch.stack([(seen.entropy * counted).sum() for seen in passes]) / count
        z_term = (total - last.loss.sum()) / count if z_loss else None
    if weights is not None:
        total = sum(watch.learned, weights[-1] * total)
        z_term = None if z_term is None else weights[-1] * z_term
    found: dict[str, Any] = {"pass_losses": by_pass, "pass_entropies": entropies, "z_loss": z_term}
    if watch.halting is not None:
        found["pass_shares"] = _shares(watch.halting, counted) / count
        if halting_loss is not None:
            before, total = total, _with_gates(watch, watch.halting, total, last.loss, counted, halting_loss)
            found["halting_loss"] = (total - before).detach() / count
    return {"loss": total / (count if num_items is None else num_items), **found}


@torch.no_grad()
def _shares(halting: Halting, counted: Tensor) -> Tensor:
    """The number of tokens that count and are active in each pass, (S + 1,). Where none halts, the mean number."""
    shares = halting.active if halting.halts else [torch.ones_like(halting.remaining[0]), *halting.remaining]
    return torch.stack([(share.flatten() * counted).sum() for share in shares])


def _with_gates(
    watch: Watch, halting: Halting, total: Tensor, last: Tensor, counted: Tensor, halting_loss: tuple[float, float]
) -> Tensor:
    """The summed loss by which the gates learn.

    Args:
        total: the summed loss without the gates.
        last: loss of each token in the last pass, (N,).
        counted: (N,), which tokens have a label that counts.
    """
    weight, share = halting_loss
    remaining = [each.flatten() for each in halting.remaining]
    if halting.by_exit:
        return expected_loss([*watch.token_losses, last], remaining, counted, weight)
    return total + counted.sum().clamp(min=1) * (weight * smallest_gates(remaining, counted, share))
