"""Read the shape of a model, which its cost depends on, from its configuration."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch

from ponder_scale.config import RunConfig
from ponder_scale.planning.cost import Shape
from ponder_scale.setup.build import configuration_from_dict, new_model


def run_shape(config: RunConfig, configuration: Any) -> Shape:
    """The shape of the model of a run, as the run trains it."""
    return model_shape(configuration, config.data.seq_len, config.train.pondering.backward_passes)


def model_shape(configuration: Any, seq_len: int, backward_passes: int | None = None) -> Shape:
    """The shape of the model of a transformers configuration, for `cost`.

    Args:
        backward_passes: number of the last passes that gradients flow through. None means all.
    """
    # A planner that compares hundreds of choices asks for the same shape each time.
    return _shape(json.dumps(configuration.to_dict(), sort_keys=True), seq_len, backward_passes)


@lru_cache(maxsize=64)
def _shape(values: str, seq_len: int, backward_passes: int | None) -> Shape:
    configuration = configuration_from_dict(json.loads(values))
    with torch.device("meta"):
        model = new_model(configuration)
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    head = model.get_output_embeddings().weight
    tables = {id(weight): weight for weight in (*embeddings, head)}
    top_k, layer, heads = configuration.pondering_top_k, model.layers[0], getattr(model, "extra_heads", ())
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        table_parameters=sum(weight.numel() for weight in tables.values()),
        vocabulary=configuration.vocab_size,
        hidden=configuration.hidden_size,
        layers=configuration.num_hidden_layers,
        sequence=seq_len,
        pondering_steps=configuration.pondering_steps,
        feedback=configuration.feedback,
        top_k=None if top_k is None or top_k >= configuration.vocab_size else top_k,
        tied=head is model.get_input_embeddings().weight,
        backward_passes=backward_passes,
        refinements=configuration.published_refinements if configuration.feedback == "latent" else (0, 0),
        layer_matrices=sum(weight.ndim > 1 for weight in layer.parameters()),
        layer_modules=sum(1 for _ in layer.modules()),
        extra_heads=configuration.extra_heads,
        head_parameters=sum(weight.numel() for head in heads for weight in head.parameters()),
    )
