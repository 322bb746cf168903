"""The learned gate of the feedback "both", which also feeds back the hidden states of a pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HiddenGate(nn.Module):
    """T_s = c * sum_v p_s[v] E[v] + g * h_s, where g has a learned number for each of the D dimensions.

    g is 0 at first, so training starts as the method without a gate. The same holds for weights without a gate.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        """T, (B, T, D), from the pondering embedding and the hidden states of the same pass, (B, T, D) each."""
        return mixed + self.weight.to(hidden.dtype) * hidden

    def start(self) -> None:
        """Set g to 0, unless its value was loaded."""
        fill_unless_loaded(self.weight, 0.0)


@torch.no_grad()
def fill_unless_loaded(parameter: Tensor, value: float) -> None:
    """Set all of a parameter to its first value, unless it was loaded from a folder."""
    if not getattr(parameter, "_is_hf_initialized", False):  # transformers' mark on a weight that was loaded
        parameter.fill_(value)
