"""The pondering model as the paper writes it, in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch


def by_the_equations(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The logits as the paper writes them, with the stock backbone and plain torch. `inputs` go to every pass."""
    config = model.config
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    scale = math.sqrt(table.shape[1]) if config.scale_embeds else 1.0
    first = config.initial_scale * scale * model.get_input_embeddings()(tokens)
    e = first
    for _ in range(config.pondering_steps):
        hidden = model.base_model.one_pass(e, **inputs).last_hidden_state
        logits = hidden @ head.t() / config.pondering_temperature
        if config.pondering_top_k is not None:
            smallest = logits.topk(config.pondering_top_k).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -math.inf)
        fed_back = hidden if config.feedback == "hidden" else scale * torch.softmax(logits, -1) @ table
        if config.feedback == "both":
            fed_back = fed_back + model.hidden_gate.weight * hidden
        e = {"accumulate": e, "restart": first, "replace": 0.0 * first}[config.residual] + fed_back
    return model.base_model.one_pass(e, **inputs).last_hidden_state @ head.t()
