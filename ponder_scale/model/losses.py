"""The loss of one forward, and what the output says of its passes.

B batch, T tokens, D hidden size, S pondering steps, N = B T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backends import IGNORE_INDEX
from .halting import Halting, check_halting_loss, expected_loss, smallest_gates
from .multi_token import check_multi_token, targets_ahead
from .passes import Watch


def next_tokens(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """The next token of each token, (B, T), -100 where there is none. Only `labels` are shifted here."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


class Wanted(NamedTuple):
    """What the loss of a forward is made of.

    Args:
        num_items: divides the summed loss. The default is the number of labels that count.
        z_loss: factor of the mean squared log-sum-exp of the last pass's logits, which is added to the loss.
        pass_weights: w_0 to w_S. The loss is sum_s w_s CE_s over the passes. The default is that of the last pass.
        halting_loss: (weight, share). With halting "gate" it adds weight times the mean of the smallest share of the
            gates to the loss, so that about this share of the pondering is saved, see `halting.smallest_gates`. With
            "exit" the loss becomes the expected one over the exits, minus weight times their entropy, see
            `halting.expected_loss`.
        multi_token_weight: adds this times the sum of the losses of the extra heads, see `multi_token.py`.
    """

    num_items: Tensor | int | None
    z_loss: float
    pass_weights: Sequence[float] | None
    halting_loss: tuple[float, float] | None
    multi_token_weight: float | None

    def tell(self, watch: Watch, extra_logits: bool, exit_kl: float | None) -> None:
        """Tell the passes what they have to leave for the loss, or for `extra_logits`.

        Raises:
            ValueError: parts of the loss exclude each other, or the model lacks what they need.
        """
        config, has_labels = watch.causal.config, watch.targets is not None
        check_halting_loss(self.halting_loss, config.halting, self.z_loss, self.pass_weights)
        check_multi_token(watch.causal, self.multi_token_weight, extra_logits, exit_kl)
        watch.exits = self.halting_loss is not None and has_labels and config.halting == "exit"
        watch.heads = extra_logits or (self.multi_token_weight is not None and has_labels)


def losses(watch: Watch, hidden: Tensor, wanted: Wanted, position_ids: Tensor | None) -> dict[str, Any]:
    """The loss of hidden states (B, T, D), and more fields of the output. Positions tell documents apart."""
    targets, z_loss, halting_loss = watch.targets, wanted.z_loss, wanted.halting_loss
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
    if wanted.multi_token_weight is not None:
        ahead, found["multi_token_losses"] = _ahead(watch, position_ids)
        total = total + wanted.multi_token_weight * ahead
    return {"loss": total / (count if wanted.num_items is None else wanted.num_items), **found}


def _ahead(watch: Watch, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of the losses of the extra heads, and the mean loss of each, (n,).

    One call of the op has the logits of all heads, a block of tokens after another. So no (B, T, V) is alive, and there
    is one gradient of the unembedding for all of them.
    """
    assert watch.ahead is not None and watch.targets is not None
    labels = targets_ahead(watch.targets, position_ids, len(watch.ahead))
    total, seen = watch.readout.cross_entropy(watch.ahead, labels)
    counted = (labels != IGNORE_INDEX).flatten(1).sum(1).clamp(min=1)
    return total, seen.loss.view(len(labels), -1).sum(1) / counted


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
