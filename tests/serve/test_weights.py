"""A folder that lacks a tensor, or has one too many, is noticed by the tensor's name, whatever vLLM fuses it into."""

from __future__ import annotations

from typing import Any

import pytest

from ponder_scale.serve.weights import Tensors
from tests.serve.folders import ARCHITECTURES, make_model

STOCK = {"llama": "LlamaConfig", "gpt_neox": "GPTNeoXConfig", "gpt2": "GPT2Config", "olmo2": "Olmo2Config"}


def stock(config: Any) -> Any:
    """The configuration of transformers that a pondering one extends."""
    (of_transformers,) = [each for each in type(config).__mro__ if each.__name__ in STOCK.values()]
    return of_transformers(**{key: value for key, value in config.to_dict().items() if key != "model_type"})


def passes(tensors: Tensors, weights: dict[str, Any]) -> None:
    for _ in tensors.noted(weights.items()):
        pass
    tensors.check_complete()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_tensor_is_missed_by_name_and_none_is_added(architecture: str, tied: bool) -> None:
    model = make_model(architecture, pondering_steps=1, tie_word_embeddings=tied)
    weights, config = dict(model.named_parameters()), stock(model.config)
    passes(Tensors(config), weights)
    for name in weights:
        with pytest.raises(ValueError, match="the folder's weights have no") as said:
            passes(Tensors(config), {other: weights[other] for other in weights if other != name})
        assert name.endswith(str(said.value).split()[5].rstrip(";")), (name, said.value)
    with pytest.raises(ValueError, match=r"gate\.weight is among the folder's weights but is not a tensor of"):
        passes(Tensors(config), {**weights, f"{model.base_model_prefix}.gate.weight": weights[name]})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_that_is_written_beside_its_tied_table_is_no_other_tensor(architecture: str) -> None:
    model = make_model(architecture, pondering_steps=1, tie_word_embeddings=True)
    passes(Tensors(stock(model.config)), dict(model.state_dict()))


def test_extra_heads_are_left_out_where_the_model_has_them_and_else_are_tensors_too_many() -> None:
    model = make_model("llama", pondering_steps=1, extra_heads=2)
    weights, config = dict(model.named_parameters()), stock(model.config)
    tensors = Tensors(config, ("extra_heads.",))
    taken = [name for name, _ in tensors.noted(weights.items())]
    tensors.check_complete()
    assert taken == [name for name in weights if "extra_heads" not in name] and len(taken) < len(weights)
    with pytest.raises(ValueError, match=r"extra_heads\.0\.\S+ is among the folder's weights but is not a tensor of"):
        passes(Tensors(config), weights)
