"""Activation checkpointing across pondering passes: what forward keeps and backward computes again.

    none         every activation of S + 1 passes
    selective    the input and the attention output of each layer in each pass
    layer        the input of each layer in each pass
    pass         the input of each pass: S + 1 tensors of (B, T, D)
    pass+layer   the same, and while a pass is recomputed only its layers' inputs

Only `torch.utils.checkpoint(use_reentrant=False)` is right here. With weights that several passes share, reentrant
checkpointing raises under ZeRO-2 and silently loses all but one pass's gradient under ZeRO-3 once a reduce bucket is
smaller than the gradients; DeepSpeed's own checkpointing functions behave the same or worse.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ponder_scale.errors import ConfigError

_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def apply_recompute(model: Any, policy: str, *, offload: bool = False) -> None:
    """Make `model` recompute by `policy` in backward. Forward without gradient is left as it is.

    The pondering embedding stays outside: it keeps its inputs only and recomputes by itself. Called again, it replaces
    what an earlier call did.

    Args:
        offload: what is kept (the inputs of layers or passes) waits for backward in host memory.
    """
    refuse_foreign_checkpointing(model)
    key, dropout = attention_dropout(model.config)
    if policy == "selective" and dropout:
        # backward does not run the kernel again, so it draws no random numbers, and the masks after it would be others
        raise ConfigError(
            f"train.recompute is selective, but model.extra.{key} is {dropout}: backward would draw other masks than "
            "forward; set it to 0, or use layer"
        )
    if policy == "selective" and model.config._attn_implementation == "eager":
        raise ConfigError("train.recompute is selective, but eager attention has no kernel to keep; use sdpa, or layer")
    for module, name in ((model, "run_pass"), *((layer, "forward") for layer in model.layers)):
        if hasattr(module.__dict__.get(name), "recomputes"):
            del module.__dict__[name]
    contexts = partial(create_selective_checkpoint_contexts, list(_ATTENTION)) if policy == "selective" else None
    outer = "pass" in policy.split("+")
    if outer:
        model.run_pass = _recomputed(model.run_pass, offload=offload)
    if policy in ("layer", "selective", "pass+layer"):
        for layer in model.layers:
            # inside a recomputed pass the layers' inputs live for that pass only, so they stay on the device
            layer.forward = _recomputed(layer.forward, offload=offload and not outer, contexts=contexts)


def attention_dropout(configuration: Any) -> tuple[str, float]:
    """What a transformers configuration calls the dropout of its attention, and how much there is of it."""
    key = "attn_pdrop" if hasattr(configuration, "attn_pdrop") else "attention_dropout"
    return key, getattr(configuration, key, 0.0)


def refuse_foreign_checkpointing(model: Any) -> None:
    """Raise ConfigError where transformers' gradient checkpointing is on: it may be reentrant, see above."""
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            raise ConfigError(
                f"gradient checkpointing of transformers is on in {name or 'the model'}; shared passes lose gradients "
                "with its reentrant form under ZeRO-3. Call gradient_checkpointing_disable() and set train.recompute"
            )


def _recomputed(
    function: Callable[..., Any], *, offload: bool, contexts: Callable[[], Any] | None = None
) -> Callable[..., Any]:
    selective: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
            return checkpoint(function, *args, use_reentrant=False, **selective, **kwargs)

    wrapped.recomputes = True  # type: ignore[attr-defined]
    return wrapped
