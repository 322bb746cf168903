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
    model.wrappers = tuple(wrapper for wrapper in model.wrappers if not hasattr(wrapper, "recomputes"))
    for layer in model.layers:
        if hasattr(layer.__dict__.get("forward"), "recomputes"):
            del layer.__dict__["forward"]
    outer = "pass" in policy.split("+")
    if outer:
        model.wrappers = (*model.wrappers, _recompute(offload=offload))
    if policy in ("layer", "selective", "pass+layer"):
        for layer in model.layers:
            # inside a recomputed pass the layers' inputs live for that pass only, so they stay on the device
            wrapper = _recompute(offload=offload and not outer, keep_attention=policy == "selective")
            layer.forward = update_wrapper(partial(wrapper, layer.forward), layer.forward)
            layer.forward.recomputes = True


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


def _recompute(*, offload: bool, keep_attention: bool = False) -> Callable[..., Any]:
    """Takes a function and its arguments, and calls it so that backward computes it again."""
    selective: dict[str, Any] = {"context_fn": keeping} if keep_attention else {}

    def wrapper(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
            return checkpoint(function, *args, use_reentrant=False, **selective, **kwargs)

    wrapper.recomputes = True  # type: ignore[attr-defined]
    return wrapper


def keeping(operations: tuple[Any, ...] = ATTENTION) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts for a forward that keeps the outputs of some operations, and for its recomputation, which takes them.

    torch's own selective contexts count every operation and expect each of them again. Under ZeRO-3 the engine gathers
    weights inside a layer, or finds them gathered: in a forward and not in its recomputation, or the reverse. Here
    nothing but `operations` is counted, and the engine does none of these.
    """
    forward = _Keep(operations)
    return forward, _Take(operations, forward)


class _Keep(TorchDispatchMode):
    def __init__(self, operations: tuple[Any, ...]) -> None:
        super().__init__()
        self._operations = operations
        self.kept: list[tuple[Any, Tensor]] = []  # outputs, and the state of the generator after them

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = operation(*args, **(kwargs or {}))
        if operation in self._operations:
            # .data, because the output itself will hold the graph, which holds this list
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
        _generator(args[0]).set_state(state)  # what comes after draws the same dropout as in forward
        return outputs


def _generator(tensor: Tensor) -> torch.Generator:
    """The one that an operation on this tensor draws from."""
    return torch.cuda.default_generators[tensor.device.index] if tensor.is_cuda else torch.default_generator
