"""Options that make the transformer itself faster: attention kernels, Liger's kernels, torch.compile.

If an option cannot work, it is refused by name. A run that asks for an option never continues silently without it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from ponder_scale.config import INTERLEAVED, TrainConfig
from ponder_scale.errors import ConfigError

FLASH = "flash_attention_2"


def apply_speed(model: Any, train: TrainConfig) -> None:
    """Set attention, kernels and compilation of a model as the recipe says. Call it before `apply_recompute`.

    Raises:
        ConfigError: an option of the recipe cannot work here.
    """
    model.set_attn_implementation(_attention(train, model.config.feedback))
    if train.kernels == "liger":
        _apply_liger(model)
    if train.compile:
        _compile_layers(model, train)


def document_arguments(model: Any, position_ids: Tensor) -> dict[str, Any]:
    """The arguments besides position ids (B, T), on the CPU, that keep attention within documents.

    Documents begin at position 0. For SDPA, transformers makes a mask from the position ids. Flash attention takes the
    beginning of each document in the flattened batch, and skips the blocks between documents. transformers finds these
    by itself only for a batch of one.
    """
    if model.config._attn_implementation != FLASH:
        return {}
    flat = position_ids.flatten()
    end = torch.tensor([flat.numel()])
    starts = torch.cat([(flat == 0).nonzero().flatten(), end]).to(torch.int32)
    longest = int(starts.diff().max())
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _attention(train: TrainConfig, feedback: str) -> str:
    selective = train.recompute == "selective"
    missing = _flash_is_missing(train)
    if train.attention == "auto":
        return "sdpa" if missing or selective or feedback in INTERLEAVED else FLASH
    if train.attention == FLASH and missing:
        raise ConfigError(f"train.attention is {FLASH}, which needs {missing}; use sdpa")
    if train.attention == FLASH and selective:
        raise ConfigError(
            f"train.recompute is selective, which keeps the outputs of sdpa but not of {FLASH}; set train.attention to "
            "sdpa, or train.recompute to layer"
        )
    return train.attention


def _flash_is_missing(train: TrainConfig) -> str | None:
    if not torch.cuda.is_available():
        return "CUDA"
    if train.precision != "bf16":
        return "train.precision bf16"
    return None if importlib.util.find_spec("flash_attn") else "the package flash-attn"


def _apply_liger(model: Any) -> None:
    """Use fused RMSNorm, rotary embedding and SwiGLU. The loss stays ours, which is already fused with the head."""
    if not torch.cuda.is_available():
        raise ConfigError("train.kernels is liger, whose kernels need CUDA; use torch")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("train.kernels is liger, which is not installed; run: pip install liger-kernel, or use torch")
    from liger_kernel import transformers as liger  # optional

    appliers = {
        "PonderLlamaForCausalLM": "apply_liger_kernel_to_llama",
        "PonderOlmo2ForCausalLM": "apply_liger_kernel_to_olmo2",
    }
    name = type(model).__name__
    if name not in appliers:
        raise ConfigError(f"train.kernels is liger, which has no kernels for the layers of {name}; use torch")
    getattr(liger, appliers[name])(cross_entropy=False, fused_linear_cross_entropy=False, model=model)


def check_compiler(asked: str) -> None:
    """Raise ConfigError if torch.compile needs a C++ compiler and there is none. `asked` names the setting."""
    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise ConfigError(f"{asked}, but there is no C++ compiler ({compiler}); install one, or set CXX")


def _compile_layers(model: Any, train: TrainConfig) -> None:
    """Compile the layers. One graph serves all of them, in every pass and for any number of passes.

    Under ZeRO-3 the graph breaks where DeepSpeed gathers weights.
    """
    if train.recompute == "selective":
        raise ConfigError(
            "train.compile is true, but train.recompute selective chooses among operations that compilation fuses; "
            "set train.recompute to none, layer or pass"
        )
    check_compiler("train.compile is true")
    for layer in (*model.layers, *getattr(model, "extra_heads", ())):
        layer.forward = torch.compile(layer.forward)
