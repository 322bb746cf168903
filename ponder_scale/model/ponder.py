"""The recurrence of arXiv 2505.20674:

    e_0 = initial_scale * c * E[x]                      c = sqrt(D) if scale_embeds, else 1
    h_s = f(e_{s-1})                                    s = 1..S
    T_s = c * sum_v p_s[v] E[v]                         p_s = softmax(head(h_s) / tau); feedback "hidden": T_s = h_s,
                                                        "both": T_s = c * sum_v p_s[v] E[v] + g * h_s
    e_s = e_{s-1} + T_s                                 residual "accumulate"; "restart": e_0 + T_s, "replace": T_s
    logits = head(f(e_S))                               S + 1 passes of the backbone f

B batch, T tokens, D hidden size, V vocabulary, S pondering steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RunPass = Callable[[Tensor, int], Tensor]
Feedback = Callable[[Tensor, int], Tensor]


def ponder(
    run_pass: RunPass,
    feedback: Feedback,
    embeds: Tensor,
    pondering_steps: int,
    residual: str,
    settled: Callable[[Tensor, int], bool] | None = None,
    sequence_steps: Tensor | None = None,
) -> Tensor:
    """The hidden states of the last pass, (B, T, D).

    Args:
        run_pass: f. Takes e_s (B, T, D) and the number of the pass, and returns hidden states (B, T, D).
        feedback: takes hidden states (B, T, D) and the number of their pass, and returns T_s, (B, T, D).
        embeds: e_0, (B, T, D).
        settled: takes the same as `feedback`. If it returns True, that pass is the last.
        sequence_steps: (B,) integers. After its number of steps, a sequence keeps its e, so that every later pass gives
            it the hidden states of its own last pass again.
    """
    e = embeds
    for index in range(pondering_steps):
        hidden = run_pass(e, index)  # (B, T, D)
        if settled is not None and settled(hidden, index):
            return hidden
        fed_back = feedback(hidden, index)
        if residual == "replace":
            moved = fed_back
        else:
            moved = (e if residual == "accumulate" else embeds) + fed_back
        e = moved if sequence_steps is None else torch.where((sequence_steps > index).view(-1, 1, 1), moved, e)
    return run_pass(e, pondering_steps)
