"""Multi-token prediction (arXiv 2404.19737): further heads, which predict the tokens 2, 3, ... ahead.

    u_S = the input of the last layer in the last pass                      the trunk
    logits_1 = W norm(layer_L(u_S))                                         the model's own, which stays as it is
    logits_{1+i} = W norm(head_i(u_S))                                      i = 1..n
    loss = CE(logits_1, x_{t+1}) + weight * sum_i CE(logits_{1+i}, x_{t+1+i})

Each head is one more layer of the backbone's own kind, beside the last one. All share the unembedding W, as in the
paper, and the last norm. The paper takes the layers of the heads from the trunk, so that the number of parameters stays
the same. Here they come on top, so that the model without them is the plain one. We know the published code from its
description only, so the place of the norm is ours.

B batch, T tokens, D hidden size, V vocabulary, L layers, S pondering steps, n extra heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .backends import IGNORE_INDEX


class ExtraHeads(nn.ModuleList):
    """The n heads. In the last pass they have the cache's slots after its L layers."""

    def __init__(self, config: Any, layer: Callable[..., nn.Module]) -> None:
        layers = config.num_hidden_layers
        super().__init__(layer(config, layers + index) for index in range(config.extra_heads))

    def beside(self, last: nn.Module, norm: nn.Module, run_pass: Callable[[], Any]) -> tuple[Any, Tensor]:
        """The output of the last pass, and the hidden states of the heads after the norm, (n, B, T, D).

        Each head gets exactly what the last layer gets: trunk, mask, positions and cache, in whichever form this
        version of transformers has for them.
        """
        calls: list[tuple[Any, Any]] = []

        def saw(_: nn.Module, arguments: Any, options: Any) -> None:
            calls.append((arguments, options))

        # before the hooks of others, which may put their own functions around the trunk
        hook = last.register_forward_pre_hook(saw, prepend=True, with_kwargs=True)
        try:
            output = run_pass()
        finally:
            hook.remove()
        ((arguments, options),) = calls
        found = (head(*arguments, **options) for head in self)
        states = [norm(each[0] if isinstance(each, tuple) else each) for each in found]
        return output, torch.stack(states)


def targets_ahead(targets: Tensor, position_ids: Tensor | None, heads: int) -> Tensor:
    """The labels of the heads, (n, B, T), from the next tokens (B, T): for head i the token 1 + i ahead.

    A label counts only if all tokens up to it count and are of one document. So no head predicts across a -100, nor
    into another document.

    Args:
        position_ids: (B, T) or (1, T), from 0 in each document. If given, the token after the row counts for no head,
            because no position says whose it is.
    """
    follows = targets != IGNORE_INDEX
    if position_ids is not None:
        follows = follows & nn.functional.pad(position_ids.diff(dim=-1) == 1, (0, 1))
    found, reached = [], follows
    for ahead in range(1, heads + 1):
        reached = reached & nn.functional.pad(follows, (0, ahead))[..., ahead:]
        label = nn.functional.pad(targets, (0, ahead), value=IGNORE_INDEX)[..., ahead:]
        found.append(torch.where(reached, label, IGNORE_INDEX))
    return torch.stack(found)


def check_multi_token(model: Any, weight: float | None, extra_logits: bool, exit_kl: float | None) -> None:
    """Raise ValueError if the model has no heads for what is asked, or if it does not go together."""
    if weight is None and not extra_logits:
        return
    name = "extra_logits" if weight is None else "multi_token_weight"
    wanted, present = model.config.extra_heads, len(getattr(model, "extra_heads", ()))
    if not wanted:
        raise ValueError(f"{name} needs a model with extra_heads; this one has none")
    if wanted != present:
        raise ValueError(
            f"extra_heads is {wanted}, but this model was made with {present}; set it when you make or load the model"
        )
    if exit_kl is not None:
        raise ValueError(f"{name} with exit_kl: the heads read the last pass, which an early exit leaves out; give one")
    if weight is not None and not 0 < weight < float("inf"):
        raise ValueError(f"multi_token_weight is {weight!r}; expected a finite number above 0, or None to leave it out")
