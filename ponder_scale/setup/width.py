"""One learning rate for all widths: muP (arXiv 2203.03466) for Adam, without multipliers.

You tune a recipe at `optim.mup_base_width`. At m times that width D, with heads of the same width, the initial values
and the learning rate of a weight are those at the base width times these factors:

    weight                                      initial values      learning rate
    matrices of the layers                      m^-1/2 (as always)  1/m
    head                                        1/m                 1/m
    embedding table, times sqrt(D) in forward   m^-1/2 (as always)  m^-1/2
    embedding table, not scaled; positions      1                   1
    norms and biases                            1                   1

So the outputs of the weights, and their changes in a step, have the same size at every width. The pondering embedding
is a mean of rows of the table with the same factor as e_0, so what a pass adds is as large as e_0. Weight decay is
divided by the factor of the learning rate, because AdamW multiplies the two. The forward needs no factors, so the
exported model is the plain one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ponder_scale.errors import ConfigError


def learning_rate_scales(model: Any, base_width: int | None) -> dict[int, float]:
    """The factor on the learning rate of each parameter, by its id. Raises ConfigError as `check_width` does."""
    if base_width is None:
        return {id(parameter): 1.0 for parameter in model.parameters()}
    check_width(model, base_width)
    ratio = model.config.hidden_size / base_width
    scales = {id(weight): 1.0 if weight.ndim < 2 else 1 / ratio for weight in model.parameters()}
    for weight, factor in _tables(model):
        scales[id(weight)] = 1.0 if factor == 1 else ratio**-0.5
    return scales


@torch.no_grad()
def scale_initial_weights(model: Any, base_width: int | None) -> None:
    """Scale the weights of a freshly initialized model, which all have 1/sqrt(D), as the table above says."""
    if base_width is None:
        return
    check_width(model, base_width)
    ratio = model.config.hidden_size / base_width
    model.get_output_embeddings().weight.mul_(ratio**-0.5)
    for weight, factor in _tables(model):
        if factor == 1:
            weight.mul_(ratio**0.5)


def check_width(model: Any, base_width: int) -> None:
    """Raise ConfigError if the model cannot be widened in this way."""
    config = model.config
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        name = config.model_type.removeprefix("ponder_")
        raise ConfigError(
            f"optim.mup_base_width is {base_width}, but the head of this {name} is its embedding table, which needs "
            "one learning rate as a table and another as a head; set model.tie_word_embeddings=false or "
            "optim.mup_base_width=null"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if base_width % head:
        raise ConfigError(
            f"optim.mup_base_width is {base_width}; expected a multiple of the width of a head ({head}), because the "
            "models of a ladder differ in the number of heads; set model.num_attention_heads so that a head is as wide "
            "as in the base model"
        )


def _tables(model: Any) -> list[tuple[Tensor, float]]:
    """The embedding tables, with the factor on their outputs: sqrt(D) or 1."""
    tokens = model.get_input_embeddings()
    scaled = (tokens, getattr(model, "pause_embedding", None))
    own = math.sqrt(model.config.hidden_size) if model.config.scale_embeds else 1.0
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [(table.weight, own if table in scaled else 1.0) for table in tables]
