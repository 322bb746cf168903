"""Pause tokens and latent thoughts as their papers write them: loops over single positions, in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import DynamicCache


def scaled(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a table as inputs."""
    config = model.config
    return config.initial_scale * (math.sqrt(config.hidden_size) if config.scale_embeds else 1.0) * rows


def one_position_after_the_other(model: Any, tokens: torch.Tensor, steps: int | None = None) -> torch.Tensor:
    """The logits (K + 1, B, T, V) at each position of each token, which the stock backbone reads one by one."""
    steps = model.config.pondering_steps if steps is None else steps
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    texts = []
    for row in tokens:
        cache, said = DynamicCache(), []
        for place, token in enumerate(row):
            given = scaled(model, table[token]).view(1, 1, -1)
            for _ in range(steps + 1):
                hidden = model.base_model.one_pass(given, cache, position_ids=torch.tensor([[place]])).last_hidden_state
                said.append(hidden[0, 0] @ head.t())
                given = (
                    hidden if model.config.feedback == "latent" else scaled(model, model.pause_embedding.weight[None])
                )
        texts.append(torch.stack(said).view(len(row), steps + 1, -1))
    return torch.stack(texts).movedim(2, 0)


def by_jacobi(model: Any, tokens: torch.Tensor, refinements: int) -> torch.Tensor:
    """The logits (K + 1, B, T, V) after K first iterations, some refinements and the last pass, as published."""
    steps, length = model.config.pondering_steps, tokens.shape[1]
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    inputs = [[scaled(model, table[tokens[:, place]])] for place in range(length)]  # [place][position] is (B, D)
    for iteration in range(steps + refinements + 1):
        count = len(inputs[0])
        sequence = torch.stack([given for places in inputs for given in places], 1)
        causal = torch.ones(count * length, count * length, dtype=torch.bool).tril().expand(len(tokens), 1, -1, -1)
        places = torch.tensor([[index // count for index in range(count * length)]])
        hidden = model.base_model.one_pass(sequence, attention_mask=causal, position_ids=places).last_hidden_state
        states = [[hidden[:, place * count + position] for position in range(count)] for place in range(length)]
        if iteration < steps + refinements:
            inputs = [[given[0], *after[:steps]] for given, after in zip(inputs, states, strict=True)]
    return torch.stack([torch.stack(places) for places in states], 2) @ head.t()
