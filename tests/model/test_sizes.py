"""The recipes of the paper's sizes have the parameters of the models they are named after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ponder_scale
from ponder_scale.config import ModelConfig, RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.setup.build import model_class, model_configuration

RECIPES = Path(ponder_scale.__path__[0]) / "recipes"
PUBLISHED = {  # of the checkpoints on the hub without pondering, which adds none
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "gpt2-124m": 124_439_808,
}


def llama_parameters(width: int, layers: int, vocabulary: int = 50304) -> int:
    """Counted by hand: two tables, four square and three MLP matrices and two norms a layer, one norm at the end."""
    inner = width * 43 // 16
    return 2 * vocabulary * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width


LLAMA = {"125m": (768, 12), "410m": (1024, 24), "834m": (1536, 24), "1.4b": (2048, 24), "2.8b": (2560, 32)}
EXPECTED = PUBLISHED | {f"llama-{name}": llama_parameters(*shape) for name, shape in LLAMA.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_has_the_parameters_of_its_size(name: str) -> None:
    config = load(RunConfig, RECIPES / f"{name}.yaml")
    configuration = model_configuration(config.model, vocab_size=50257, seq_len=config.data.seq_len, eod_id=0)
    with torch.device("meta"):
        model = model_class(configuration)(configuration)
    assert sum(parameter.numel() for parameter in model.parameters()) == EXPECTED[name]
    assert configuration.pondering_steps == 3 and configuration.scale_embeds


def configuration(**model: Any) -> Any:
    return model_configuration(ModelConfig(**model), vocab_size=300, seq_len=64, eod_id=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "gpt2", "rope_theta": 5e5}, r"model.rope_theta is 500000.0, which gpt2 does not have"),
        ({"architecture": "gpt2", "num_key_value_heads": 2}, "model.num_key_value_heads is 2, which gpt2 does not"),
        ({"architecture": "gpt_neox", "num_key_value_heads": 2}, "which gpt_neox does not have; leave it null"),
        ({"architecture": "gpt2", "extra": {"n_embd": 4}}, "model.extra.n_embd: set it as model.hidden_size"),
        ({"architecture": "llama", "extra": {"rms_norm_eps": 1e-6}}, "set it as model.norm_eps"),
        ({"architecture": "gpt_neox", "extra": {"mlp_bias": True}}, "mlp_bias: PonderGPTNeoXConfig has no such field"),
    ],
)
def test_a_key_that_an_architecture_does_not_have_is_answered(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(**model)


def test_the_recipe_s_keys_reach_each_architecture_under_its_own_names() -> None:
    gpt2 = configuration(architecture="gpt2", hidden_size=64, num_hidden_layers=3, norm_eps=1e-6, intermediate_size=96)
    assert (gpt2.n_embd, gpt2.n_layer, gpt2.layer_norm_epsilon, gpt2.n_inner) == (64, 3, 1e-6, 96)
    assert (gpt2.resid_pdrop, gpt2.tie_word_embeddings) == (0.0, True)
    assert configuration(architecture="gpt2", extra={"resid_pdrop": 0.1}).resid_pdrop == 0.1
    assert configuration(architecture="gpt2", tie_word_embeddings=False).tie_word_embeddings is False
    neox = configuration(architecture="gpt_neox", rope_theta=5e5, norm_eps=1e-6)
    assert (neox.rope_parameters["rope_theta"], neox.rope_parameters["partial_rotary_factor"]) == (5e5, 0.25)
    assert (neox.layer_norm_eps, neox.init_by_passes) == (1e-6, True)
    llama = configuration(architecture="llama")
    assert (llama.rope_parameters["rope_theta"], llama.init_by_passes, llama.tie_word_embeddings) == (1e4, False, False)
