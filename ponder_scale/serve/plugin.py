"""What vLLM calls in each of its processes: names only. The models are imported when one is served."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from vllm import ModelRegistry

from ponder_scale.model import configuration

# the pondering class: what vLLM's registry calls the stock one, and the configuration of a folder
STOCK: dict[str, tuple[str, Any]] = {
    "PonderLlamaForCausalLM": ("LlamaForCausalLM", configuration.PonderLlamaConfig),
    "PonderGPTNeoXForCausalLM": ("GPTNeoXForCausalLM", configuration.PonderGPTNeoXConfig),
    "PonderGPT2LMHeadModel": ("GPT2LMHeadModel", configuration.PonderGPT2Config),
    "PonderOlmo2ForCausalLM": ("Olmo2ForCausalLM", configuration.PonderOlmo2Config),
}


def register() -> None:
    """Make the pondering architectures known. It may be called again, and imports no model."""
    for name, (_, config) in STOCK.items():
        ModelRegistry.register_model(name, f"ponder_scale.serve.model:{name}")
        AutoConfig.register(config.model_type, config, exist_ok=True)
