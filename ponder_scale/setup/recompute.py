"""Activation checkpointing across pondering passes. Forward keeps the following, and backward computes the rest again:

    none         every activation of S + 1 passes
    selective    the input and the attention output of each layer in each pass
    layer        the input of each layer in each pass
    pass         the input of each pass: S + 1 tensors of (B, T, D)
    pass+layer   the same; while a pass is recomputed, only the inputs of its layers

Only `torch.utils.checkpoint(use_reentrant=False)` is correct here. If several passes share weights, reentrant
checkpointing raises under ZeRO-2. Under ZeRO-3 it silently loses the gradients of all but one pass as soon as a reduce
bucket is smaller than the gradients. DeepSpeed's own checkpointing functions behave the same or worse.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ponder_scale.errors import ConfigError

ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def apply_recompute(model: Any, policy: str, *, offload: bool = False) -> None:
    """Make `model` recompute by `policy` in backward. A forward without gradients does not change.

    The pondering embedding is not wrapped, because it keeps only its inputs and recomputes by itself. A second call
    replaces the policy of the first.

    Args:
        offload: keep the saved inputs of layers or passes in host memory until backward.
    """
    refuse_foreign_checkpointing(model)
    key, dropout = attention_dropout(model.config)
    if policy == "selective" and dropout:
        # Backward does not run the kernel again, so it draws no random numbers, and later masks would differ.
        raise ConfigError(
            f"train.recompute is selective, but model.extra.{key} is {dropout}, so backward would draw other dropout "
            "masks than forward; set it to 0, or train.recompute to layer"
        )
    if policy == "selective" and model.config._attn_implementation == "eager":
        raise ConfigError(
            "train.recompute is selective, but eager attention has no kernel whose output could be kept; set "
            "train.attention to sdpa, or train.recompute to layer"
        )
    model.wrappers = tuple(wrapper for wrapper in model.wrappers if not hasattr(wrapper, "recomputes"))
    layers = (*model.layers, *getattr(model, "extra_heads", ()))
    for layer in layers:
        if hasattr(layer.__dict__.get("forward"), "recomputes"):
            del layer.__dict__["forward"]
    outer = "pass" in policy.split("+")
    if outer:
        model.wrappers = (*model.wrappers, _recompute(offload=offload))
    if policy in ("layer", "selective", "pass+layer"):
        for layer in layers:
            # In a recomputed pass, the inputs of the layers live only during that pass, so they stay on the device.
            wrapper = _recompute(offload=offload and not outer, keep_attention=policy == "selective")
            layer.forward = update_wrapper(partial(wrapper, layer.forward), layer.forward)
            layer.forward.recomputes = True


def attention_dropout(configuration: Any) -> tuple[str, float]:
    """The key and the value of the attention dropout in a transformers configuration."""
    key = "attn_pdrop" if hasattr(configuration, "attn_pdrop") else "attention_dropout"
    return key, getattr(configuration, key, 0.0)


def refuse_foreign_checkpointing(model: Any) -> None:
    """Raise ConfigError if transformers' gradient checkpointing is on, because it may be reentrant (see above)."""
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            raise ConfigError(
                f"gradient checkpointing of transformers is on in {name or 'the model'}; its reentrant form loses "
                "gradients of passes that share weights under ZeRO-3; call gradient_checkpointing_disable() and set "
                "train.recompute"
            )


def _recompute(*, offload: bool, keep_attention: bool = False) -> Callable[..., Any]:
    """A function that calls another one with its arguments so that backward computes it again."""
    selective: dict[str, Any] = {"context_fn": keeping} if keep_attention else {}

    def wrapper(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
            return checkpoint(function, *args, use_reentrant=False, **selective, **kwargs)

    wrapper.recomputes = True  # type: ignore[attr-defined]
    return wrapper


def keeping(operations: tuple[Any, ...] = ATTENTION) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Two contexts: in the first, a forward keeps the outputs of some operations, and in the second, its recomputation
    takes them.

    torch's own selective contexts count every operation and expect each of them again. But under ZeRO-3 the engine may
    gather weights inside a layer in a forward and not in its recomputation, or the reverse. These contexts count only
    `operations`, and the engine does none of these.
    """
    forward = _Keep(operations)
    return forward, _Take(operations, forward)


class _Keep(TorchDispatchMode):
    def __init__(self, operations: tuple[Any, ...]) -> None:
        super().__init__()
        self._operations = operations
        self.kept: list[tuple[Any, Tensor]] = []  # each output, and the state of the generator after it

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = operation(*args, **(kwargs or {}))
        if operation in self._operations:
            # .data, because the output itself would hold the graph, which holds this list
            values = tuple(value.data if isinstance(value, Tensor) else value for value in outputs)
            self.kept.append((values, _generator(args[0]).get_state()))
        return outputs


class _Take(TorchDispatchMode):
    def __init__(self, operations: tuple[Any, ...], forward: _Keep) -> None:
        super().__init__()
        self._operations, self._forward = operations, forward

    def __enter__(self) -> Any:
        self._left = iter(self._forward.kept)
        return super().__enter__()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation not in self._operations:
            return operation(*args, **(kwargs or {}))
        outputs, state = next(self._left)
        _generator(args[0]).set_state(state)  # so that later operations draw the same dropout as in forward
        return outputs


def _generator(tensor: Tensor) -> torch.Generator:
    """The generator that an operation on this tensor draws from."""
    return torch.cuda.default_generators[tensor.device.index] if tensor.is_cuda else torch.default_generator
