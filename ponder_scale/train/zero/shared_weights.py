"""What ZeRO-3's hooks need if S + 1 passes share their weights: tables for all passes, and a release after each."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor


def keep_tables_gathered(model: Any) -> None:
    """Tell ZeRO-3 that the root module itself reads the embedding table and the head.

    The pondering embedding uses both outside of their own modules, in every pass. The root gathers them once for all
    passes. Without this, a tied table would be an empty tensor there.
    """
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        deepspeed.zero.register_external_parameter(model, module.weight)


def release_in_backward(engine: Any) -> None:
    """Release each module's weights after its backward in every pass.

    DeepSpeed keeps one number per module, which counts the inputs that still await their gradient, and resets it at
    each forward. With S + 1 forwards before the first backward, the count is right for the last pass only, and the
    weights of all other passes stay gathered. Here each forward call has its own count.
    """
    offload = engine.optimizer.parameter_offload
    for module in engine.module.modules():
        if "post_bwd_fn" in module.__dict__:
            module.post_bwd_fn = _post_backward_function(module, offload)


def _post_backward_function(module: Any, offload: Any) -> type[torch.autograd.Function]:
    class PostBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            if value.requires_grad:
                # DeepSpeed's pre-forward hook sets ds_grads_remaining to 0, so a 0 marks the first input of a call.
                if module.ds_grads_remaining == 0:
                    module.inputs_awaited = [0]
                module.ds_grads_remaining += 1
                ctx.awaited = module.inputs_awaited
                ctx.awaited[0] += 1
            return value.detach()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            ctx.awaited[0] -= 1
            if ctx.awaited[0] == 0:
                offload.post_sub_module_backward_function(module)
            return grads

    return PostBackward
