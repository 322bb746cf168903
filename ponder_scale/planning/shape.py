"""What a model costs depends on its shape, and a configuration has one."""

from __future__ import annotations

from typing import Any

import torch

from ponder_scale.planning.cost import Shape
from ponder_scale.setup.build import new_model


def model_shape(configuration: Any, seq_len: int) -> Shape:
    """The costs' view of a transformers configuration."""
    with torch.device("meta"):
        model = new_model(configuration)
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    tables = {id(weight): weight for weight in (*embeddings, model.get_output_embeddings().weight)}
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        table_parameters=sum(weight.numel() for weight in tables.values()),
        vocabulary=configuration.vocab_size,
        hidden=configuration.hidden_size,
        layers=configuration.num_hidden_layers,
        sequence=seq_len,
        pondering_steps=configuration.pondering_steps,
        feedback=configuration.feedback,
    )
