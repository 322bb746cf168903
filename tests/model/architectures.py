"""A tiny model of each architecture, and the stock class it has to equal without pondering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ponder_scale.model import configuration as configurations
from ponder_scale.model import modeling

VOCABULARY, WIDTH, LAYERS = 61, 32, 2


@dataclass(frozen=True)
class Tiny:
    """An architecture under test.

    Args:
        shape: of the configuration, in its own names.
        projections: ends of the names of the weights that write into the residual stream.
    """

    configuration: Any
    model: Any
    stock_configuration: Any
    stock_model: Any
    shape: dict[str, Any]
    projections: tuple[str, ...]


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
TINY = {
    "llama": Tiny(
        configurations.PonderLlamaConfig,
        modeling.PonderLlamaForCausalLM,
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        GROUPED,
        ("o_proj.weight", "down_proj.weight"),
    ),
    "gpt_neox": Tiny(
        configurations.PonderGPTNeoXConfig,
        modeling.PonderGPTNeoXForCausalLM,
        transformers.GPTNeoXConfig,
        transformers.GPTNeoXForCausalLM,
        DECODER,
        ("attention.dense.weight", "dense_4h_to_h.weight"),
    ),
    "gpt2": Tiny(
        configurations.PonderGPT2Config,
        modeling.PonderGPT2LMHeadModel,
        transformers.GPT2Config,
        transformers.GPT2LMHeadModel,
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_inner": 48,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        ("c_proj.weight",),
    ),
    "olmo2": Tiny(
        configurations.PonderOlmo2Config,
        modeling.PonderOlmo2ForCausalLM,
        transformers.Olmo2Config,
        transformers.Olmo2ForCausalLM,
        GROUPED,
        ("o_proj.weight", "down_proj.weight"),
    ),
}


def make(architecture: str = "llama", seed: int = 0, **fields: Any) -> Any:
    """A freshly initialized pondering model; `fields` are of its configuration."""
    tiny = TINY[architecture]
    torch.manual_seed(seed)
    return tiny.model(tiny.configuration(**{**tiny.shape, **fields}))


def make_confident(architecture: str, **fields: Any) -> Any:
    """As `make`, away from the near-uniform predictions of a fresh model."""
    model = make(architecture, **fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0 if "layers" in name or ".h." in name else 4.0)
    return model
