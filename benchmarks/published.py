"""The published way to compute the method, as a baseline. It does what LUMIA-Group/PonderingLM does, in new code.

- Every pass creates the softmax over the vocabulary as a tensor, which autograd keeps for backward.
- The loss uses the complete logits of the last pass.
- Nothing is recomputed.
- Each new token of a text runs all passes over the whole prefix.

Attention and layers are those of transformers, as in the code that is compared with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pondering_embedding(hidden: Tensor, head: Tensor, table: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(h W^T / tau) E as three operations, with (N, V) tensors kept for backward."""
    probabilities = torch.softmax(F.linear(hidden, head) / temperature, dim=-1)
    return torch.matmul(probabilities, table)


def last_hidden(model: Any, tokens: Tensor, pondering_steps: int) -> Tensor:
    """The hidden states of the last pass, (B, T, D), for tokens (B, T)."""
    config, table = model.config, model.get_input_embeddings().weight
    scale = math.sqrt(table.shape[1]) if config.scale_embeds else 1.0
    first = F.embedding(tokens, table) * (scale * config.initial_scale)
    embeds = first
    for _ in range(pondering_steps):
        hidden = model.base_model.one_pass(embeds).last_hidden_state
        mixed = pondering_embedding(hidden, model.get_output_embeddings().weight, table, config.pondering_temperature)
        embeds = (embeds if config.residual == "accumulate" else first) + mixed * scale
    return model.base_model.one_pass(embeds).last_hidden_state


def loss(model: Any, tokens: Tensor, labels: Tensor, pondering_steps: int) -> Tensor:
    """The mean cross-entropy of the last pass, in fp32 on complete logits, as transformers computes it."""
    logits = model.get_output_embeddings()(last_hidden(model, tokens, pondering_steps)).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def next_logits(model: Any, tokens: Tensor, pondering_steps: int) -> Tensor:
    """The logits (B, V) after a prefix (B, T). The last pass computes only those of the last position."""
    return model.get_output_embeddings()(last_hidden(model, tokens, pondering_steps)[:, -1])
