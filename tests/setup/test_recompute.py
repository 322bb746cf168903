"""What selective recomputation keeps, and what it leaves to the engine: nothing but attention is counted."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ponder_scale.evaluate.generate import counted
from ponder_scale.setup.recompute import ATTENTION, apply_recompute, keeping
from tests.model.architectures import make

WIDTH = 8


def gathers() -> None:
    """As a hook of ZeRO-3 does inside a layer, or does not."""
    with torch.no_grad():
        torch.ones(3).mul_(2).view(3, 1).clone()


def attention(x: Tensor) -> Tensor:
    return scaled_dot_product_attention(x.sin(), x.cos(), x, is_causal=True).tanh() * x


def gradient(function: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 5, WIDTH, requires_grad=True)
    out = checkpoint(function, x, use_reentrant=False, **options) if options else function(x)
    out.square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("gathering", [(True, False), (False, True)], ids=["in forward only", "in recomputation only"])
def test_what_the_engine_does_inside_a_layer_is_not_counted(gathering: tuple[bool, bool]) -> None:
    runs = iter(gathering)

    def layer(x: Tensor) -> Tensor:
        if next(runs):
            gathers()
        return attention(x)

    assert torch.equal(gradient(layer, context_fn=keeping), gradient(attention))
    assert next(runs, None) is None  # it was recomputed


class Ran(TorchDispatchMode):
    """Counts the kernels of attention that ran."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation in ATTENTION
        return operation(*args, **(kwargs or {}))


def test_attention_is_computed_once() -> None:
    for options, times in (({}, 1), ({"context_fn": keeping}, 1), ({"preserve_rng_state": True}, 2)):
        with Ran() as ran:
            gradient(attention, **options)
        assert ran.count == times, options


def test_dropout_after_what_is_kept_is_that_of_the_forward() -> None:
    """Attention on a GPU draws its dropout itself; what is not run again must not shift what is drawn after it."""

    def layer(x: Tensor) -> Tensor:
        return dropout(torch.native_dropout(x, 0.5, True)[0].tanh(), 0.5).exp()

    kept = gradient(layer, context_fn=lambda: keeping((torch.ops.aten.native_dropout.default,)))
    assert torch.equal(kept, gradient(layer))


def test_a_forward_that_is_dropped_is_freed_at_once() -> None:
    leaf = torch.randn(2, 1, 5, WIDTH, requires_grad=True)
    gc.disable()
    try:
        x = leaf * 2
        out, kept = checkpoint(attention, x, use_reentrant=False, context_fn=keeping), weakref.ref(x)
        del x
        assert kept() is not None
        del out
        assert kept() is None
    finally:
        gc.enable()


def test_recomputation_and_counts_stand_in_one_list_and_leave_it_again() -> None:
    model, tokens = make("llama", pondering_steps=2), torch.arange(10).view(2, 5)
    apply_recompute(model, "pass")
    with counted(model) as counts, counted(model) as again:
        assert len(model.wrappers) == 3
        model(tokens, labels=tokens).loss.backward()
    assert (counts.passes, again.passes) == (3, 3)  # what backward computes again is inside
    assert len(model.wrappers) == 1
    apply_recompute(model, "none")
    assert model.wrappers == ()


def test_passes_of_an_older_folder_s_code_are_counted_too() -> None:
    class Older:
        def run_pass(self, embeds: Tensor, index: int) -> Tensor:
            return embeds + index

    model = Older()
    with counted(model) as counts:
        assert model.run_pass(torch.zeros(1), 0) == 0 and model.run_pass(torch.zeros(1), 1) == 1
    assert counts.passes == 2 and "run_pass" not in vars(model)
