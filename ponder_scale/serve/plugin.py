"""The plugin that vLLM calls in each of its processes. It registers names only, and vLLM imports a model when it serves
it.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from vllm import ModelRegistry

from ponder_scale.model import configuration

# For each pondering class: the name of the stock one in vLLM's registry, and the configuration class of a folder.
STOCK: dict[str, tuple[str, Any]] = {
    "PonderLlamaForCausalLM": ("LlamaForCausalLM", configuration.PonderLlamaConfig),
    "PonderGPTNeoXForCausalLM": ("GPTNeoXForCausalLM", configuration.PonderGPTNeoXConfig),
    "PonderGPT2LMHeadModel": ("GPT2LMHeadModel", configuration.PonderGPT2Config),
    "PonderOlmo2ForCausalLM": ("Olmo2ForCausalLM", configuration.PonderOlmo2Config),
}


def register() -> None:
    """Register the pondering architectures with vLLM. Imports no model, and you may call it again."""
    for name, (_, config) in STOCK.items():
        ModelRegistry.register_model(name, f"ponder_scale.serve.model:{name}")
        AutoConfig.register(config.model_type, config, exist_ok=True)
