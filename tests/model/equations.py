"""The pondering model as the paper writes it, in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import DynamicCache


def by_the_equations(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The logits as the paper writes them, with the stock backbone and plain torch. `inputs` go to every pass."""
    e = last_input(model, tokens, **inputs)
    return model.base_model.one_pass(e, **inputs).last_hidden_state @ model.get_output_embeddings().weight.t()


def last_input(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """e_S, the input of the last pass, (B, T, D)."""
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
    return e


def ahead_by_the_equations(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The logits of the extra heads, (n, B, T, V): those of a last pass whose last layer is the head."""
    e, own, found = last_input(model, tokens, **inputs), model.layers[-1], []
    for head in model.extra_heads:
        model.layers[-1] = head
        found.append(
            model.base_model.one_pass(e, **inputs).last_hidden_state @ model.get_output_embeddings().weight.t()
        )
    model.layers[-1] = own
    return torch.stack(found)


def halting_by_the_equations(
    model: Any, tokens: torch.Tensor, steps: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (B, T, V), m_{s-1} g_s (S, B, T) and m (S + 1, B, T) of learned halting, a token after the other.

    Each pass has a cache of its own. A halted token runs nothing: it leaves its hidden states, keys and values again.
    """
    steps = model.config.pondering_steps if steps is None else steps
    rows = [_halting_row(model, row, steps) for row in tokens]
    logits, gates, active = (
        torch.stack(parts, dim) for parts, dim in zip(zip(*rows, strict=True), (0, 1, 1), strict=True)
    )
    return logits, gates, active


def _halting_row(model: Any, row: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config, table, head = model.config, model.get_input_embeddings().weight, model.get_output_embeddings().weight
    scale = math.sqrt(table.shape[1]) if config.scale_embeds else 1.0
    caches = [DynamicCache() for _ in range(steps + 1)]
    said, gates, active = [], [], []
    for token in row:
        first = e = config.initial_scale * scale * table[token].view(1, 1, -1)
        hidden, running = model.base_model.one_pass(e, caches[0]).last_hidden_state, True
        own_gates, own_active = [], [True]
        left, by_exit = torch.ones((), dtype=hidden.dtype), config.halting == "exit"
        for step in range(1, steps + 1):
            gate = torch.zeros((), dtype=hidden.dtype)
            if running:
                module = model.halting_gates[min(step, len(model.halting_gates)) - 1]
                pre = hidden[0, 0] @ module.up.weight.t()
                gate = 1 / (1 + torch.exp(-(pre / (1 + torch.exp(-pre)) @ module.down.weight[0] + module.down.bias[0])))
                left = left * gate if by_exit else gate
                running = bool(left >= config.halting_threshold)
            own_gates.append(gate)
            own_active.append(running)
            if not running:
                for index, layer in enumerate(caches[step - 1].layers):
                    caches[step].update(layer.keys[..., -1:, :], layer.values[..., -1:, :], index)
                continue
            logits = hidden @ head.t() / config.pondering_temperature
            if config.pondering_top_k is not None:
                smallest = logits.topk(config.pondering_top_k).values[..., -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            fed_back = hidden if config.feedback == "hidden" else scale * torch.softmax(logits, -1) @ table
            e = {"accumulate": e, "restart": first, "replace": 0.0 * first}[config.residual]
            e = e + (fed_back if by_exit else gate * fed_back)
            hidden = model.base_model.one_pass(e, caches[step]).last_hidden_state
        said.append(hidden[0, 0] @ head.t())
        gates.append(torch.stack(own_gates))
        active.append(torch.tensor(own_active))
    return torch.stack(said), torch.stack(gates, 1), torch.stack(active, 1)


def exits_by_the_equations(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of each pass (S + 1, B, T, V) and the probability that it is the last one (S + 1, B, T), densely."""
    steps, left, logits, p = model.config.pondering_steps, 1.0, [], []
    for step in range(steps + 1):
        hidden = model.base_model(tokens, pondering_steps=step).last_hidden_state
        logits.append(hidden @ model.get_output_embeddings().weight.t())
        gate = torch.zeros(tokens.shape, dtype=hidden.dtype)
        if step < steps:
            module = model.halting_gates[step]
            pre = hidden @ module.up.weight.t()
            gate = torch.sigmoid(pre * torch.sigmoid(pre) @ module.down.weight[0] + module.down.bias[0])
        p.append(left * (1 - gate))
        left = left * gate
    return torch.stack(logits), torch.stack(p)
