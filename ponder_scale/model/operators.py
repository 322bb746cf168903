"""The pondering embedding and the loss as operators of torch, as its compiler needs them.

Each is one node of a graph. The compiler does not unroll its blocks or look into its kernels. Each operator comes with
the shapes of its results and with its gradient, which is an operator, too. Operands are contiguous and of one dtype.

    mixture, mixture_gradients      over the whole vocabulary, by the named backend
    top_k, top_k_gradients          over the K most probable tokens
    loss, times                     the loss with its gradients, which backward only scales

An operator can only return tensors, so an empty tensor stands for None. With `learn`, the losses of the tokens are
differentiable, too. Without it, no call of an operator names the arguments that only `learn` needs.

N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention, backends
from . import top_k as most_probable
from .backends import IGNORE_INDEX, Kept, is_fake, width
from .learned import Learned, learned_of

Found = tuple[Tensor, ...]


def _free_namespace() -> str:
    """A free namespace for this copy of the code.

    A process may load several copies, from the package and from exported folders. A copy that is loaded again under
    the same name gets a number, so that the operators of the first do not change.
    """
    name = re.sub(r"\W", "_", __name__)
    names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
    return next(free for free in names if not hasattr(getattr(torch.ops, free), "mixture"))


NAMESPACE = _free_namespace()


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=(), schema=schema)


@contextlib.contextmanager
def _plainly(tensor: Tensor) -> Iterator[None]:
    """A context on the device of the operands and in their own dtype, without autocast."""
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


def _given(found: Sequence[Tensor | None], like: Tensor) -> Found:
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in found)


def _needed(found: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(tensor if asked else None for tensor, asked in zip(found, needed, strict=True))


def _by(backend: str) -> Any:
    if backend == "triton":
        from . import kernels  # needs triton, which not every machine has

        return kernels
    return {"chunked": backends, "sdpa": attention}[backend]


def check_labels(labels: Tensor | None, vocabulary: int) -> None:
    """Raise ValueError for a label that is neither -100 nor a token. GPUs and compiled code assert this later."""
    if labels is None or is_fake(labels):
        return
    outside = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocabulary))
    expected = f"a token of the vocabulary (0 to {vocabulary - 1})"
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"a label is not {expected}")
    elif outside.any():
        raise ValueError(
            f"label {labels[outside].flatten()[0].item()} is not {expected}; set labels to {IGNORE_INDEX} where "
            "nothing is to be predicted"
        )


@_operator(
    "mixture",
    "(Tensor hidden, Tensor head, Tensor table, Tensor? labels, float temperature, float scale, str backend, "
    "bool tied, bool keep, bool learn=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def mixture(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    labels: Tensor | None,
    temperature: float,
    scale: float,
    backend: str,
    tied: bool,
    keep: bool,
    learn: bool = False,
) -> Found:
    """`backends.Mixture` by a backend. `tied`: `table` is `head`. `keep`: also return what backward needs."""
    check_labels(labels, head.shape[0])
    with _plainly(hidden):
        table = head if tied else table
        return _given(_by(backend).mix(hidden, head, table, labels, temperature, scale, keep), hidden)


@mixture.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    labels: Tensor | None,
    temperature: float,
    scale: float,
    backend: str,
    tied: bool,
    keep: bool,
    learn: bool = False,
) -> Found:
    (tokens, columns), sums, narrow = hidden.shape, width(hidden), table.dtype != width(table)
    loss, entropy, largest, peak = (hidden.new_empty(tokens, dtype=sums) for _ in range(4))
    mean = table.new_empty(tokens, columns) if keep and (narrow or backend != "chunked") else None
    centre = table.new_empty(columns, dtype=sums) if keep and (narrow or backend == "triton") else None
    if backend == "sdpa":
        centre = None
    return _given((table.new_empty(tokens, columns), loss, entropy, mean, centre, largest, peak), hidden)


@_operator(
    "mixture_gradients",
    "(Tensor grad, Tensor hidden, Tensor head, Tensor table, Tensor mean, Tensor centre, Tensor largest, Tensor peak, "
    "float temperature, float scale, str backend, bool tied, bool[] needed, "
    "Tensor? labels=None, Tensor? loss=None, Tensor? slopes=None) -> (Tensor, Tensor, Tensor)",
)
def mixture_gradients(
    grad: Tensor,
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    mean: Tensor,
    centre: Tensor,
    largest: Tensor,
    peak: Tensor,
    temperature: float,
    scale: float,
    backend: str,
    tied: bool,
    needed: list[bool],
    labels: Tensor | None = None,
    loss: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Found:
    """dh, dW and dE from g (N, D) and `Kept`, and from the gradients of the losses (N,), the `slopes`, if given."""
    kept = Kept(hidden, head, head if tied else table, mean, centre if centre.numel() else None, largest, peak)
    with _plainly(hidden):
        learned = _learned(hidden, head, labels, loss, slopes)
        found = _by(backend).gradients(kept, grad, needed, temperature, scale, learned)
        return _given(_needed(found, needed), hidden)


def _learned(
    hidden: Tensor, head: Tensor, labels: Tensor | None, loss: Tensor | None, slopes: Tensor | None
) -> Learned | None:
    if labels is None or loss is None or slopes is None:
        return None
    return learned_of(hidden, head, labels, loss, slopes)


def _fake_gradients(needed: Sequence[bool], *operands: Tensor) -> Found:
    return _given(_needed([torch.empty_like(operand) for operand in operands], needed), operands[0])


@mixture_gradients.register_fake
def _(grad: Tensor, hidden: Tensor, head: Tensor, table: Tensor, *rest: Any) -> Found:
    needed = next(argument for argument in rest if isinstance(argument, (list, tuple)))
    return _fake_gradients(needed, hidden, head, table)


def _keep_of_mixture(ctx: Any, inputs: Any, output: Found) -> None:
    hidden, head, table, labels, ctx.temperature, ctx.scale, ctx.backend, ctx.tied, _, learn = inputs
    mixed, loss, _, mean, *kept = output
    mean = mean if mean.numel() else mixed
    _keep(ctx, learn, output, (hidden, head, table, mean, *kept), labels, loss)


def _keep(ctx: Any, learn: bool, output: Found, tensors: Found, labels: Tensor, loss: Tensor) -> None:
    """Save tensors for backward. The loss is the second of the outputs."""
    ctx.kept = len(tensors)
    ctx.save_for_backward(*tensors, *((labels, loss) if learn else ()))
    ctx.mark_non_differentiable(*output[2 if learn else 1 :])


def _kept(ctx: Any, slopes: Any) -> tuple[Found, Found]:
    """The tensors kept for backward, and those that it needs of learned losses."""
    tensors = ctx.saved_tensors
    learned = tensors[ctx.kept :]
    return tensors[: ctx.kept], (*learned, slopes) if learned else ()


def _backward_of_mixture(ctx: Any, grad: Tensor, slopes: Any, *_: Any) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:3])
    tensors, learned = _kept(ctx, slopes)
    options = ctx.temperature, ctx.scale, ctx.backend, ctx.tied, needed
    found = mixture_gradients(grad, *tensors, *options, *learned)
    return (*_needed(found, needed), *[None] * 7)


mixture.register_autograd(_backward_of_mixture, setup_context=_keep_of_mixture)


@_operator(
    "top_k",
    "(Tensor hidden, Tensor head, Tensor table, Tensor? labels, float temperature, float scale, int top_k, "
    "bool learn=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def top_k(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    labels: Tensor | None,
    temperature: float,
    scale: float,
    top_k: int,
    learn: bool = False,
) -> Found:
    """`top_k.Mixture`."""
    check_labels(labels, head.shape[0])
    with _plainly(hidden):
        return tuple(most_probable.mix(hidden, head, table, labels, temperature, scale, top_k))


@top_k.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    labels: Tensor | None,
    temperature: float,
    scale: float,
    top_k: int,
    learn: bool = False,
) -> Found:
    tokens, sums = hidden.shape[0], width(hidden)
    loss, entropy = (hidden.new_empty(tokens, dtype=sums) for _ in range(2))
    index, p = hidden.new_empty(tokens, top_k, dtype=torch.int64), hidden.new_empty(tokens, top_k, dtype=sums)
    return table.new_empty(tokens, table.shape[1]), loss, entropy, index, p


@_operator(
    "top_k_gradients",
    "(Tensor grad, Tensor hidden, Tensor head, Tensor table, Tensor index, Tensor p, float temperature, float scale, "
    "bool[] needed, Tensor? labels=None, Tensor? loss=None, Tensor? slopes=None) -> (Tensor, Tensor, Tensor)",
)
def top_k_gradients(
    grad: Tensor,
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    index: Tensor,
    p: Tensor,
    temperature: float,
    scale: float,
    needed: list[bool],
    labels: Tensor | None = None,
    loss: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Found:
    """dh, dW and dE from g (N, D), the K tokens and their probabilities, and from losses as in `mixture_gradients`."""
    with _plainly(hidden):
        learned = _learned(hidden, head, labels, loss, slopes)
        found = most_probable.gradients(hidden, head, table, index, p, grad, needed, temperature, scale, learned)
        return _given(found, hidden)


@top_k_gradients.register_fake
def _(grad: Tensor, hidden: Tensor, head: Tensor, table: Tensor, *rest: Any) -> Found:
    needed = next(argument for argument in rest if isinstance(argument, (list, tuple)))
    return _fake_gradients(needed, hidden, head, table)


def _keep_of_top_k(ctx: Any, inputs: Any, output: Found) -> None:
    hidden, head, table, labels, ctx.temperature, ctx.scale, _, learn = inputs
    _keep(ctx, learn, output, (hidden, head, table, *output[3:]), labels, output[1])


def _backward_of_top_k(ctx: Any, grad: Tensor, slopes: Any, *_: Any) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:3])
    tensors, learned = _kept(ctx, slopes)
    found = top_k_gradients(grad, *tensors, ctx.temperature, ctx.scale, needed, *learned)
    return (*_needed(found, needed), *[None] * 5)


top_k.register_autograd(_backward_of_top_k, setup_context=_keep_of_top_k)


@_operator(
    "loss",
    "(Tensor hidden, Tensor head, Tensor labels, float z_loss, str backend, bool need_hidden, bool need_head) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def loss(
    hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float, backend: str, need_hidden: bool, need_head: bool
) -> Found:
    """`backends.Loss` by a backend."""
    check_labels(labels, head.shape[0])
    with _plainly(hidden):
        return _given(_by(backend).loss(hidden, head, labels, z_loss, need_hidden, need_head), hidden)


@loss.register_fake
def _(
    hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float, backend: str, need_hidden: bool, need_head: bool
) -> Found:
    losses, entropy = (hidden.new_empty(hidden.shape[0], dtype=width(hidden)) for _ in range(2))
    gradients = _fake_gradients([need_hidden, need_head], hidden, head)
    return hidden.new_empty((), dtype=width(hidden)), losses, entropy, *gradients


@_operator("times", "(Tensor gradient, Tensor factor) -> Tensor")
def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """See `backends.times`."""
    return backends.times(gradient, factor)


@times.register_fake
def _(gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _keep_of_loss(ctx: Any, inputs: Any, output: Found) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_of_loss(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    pairs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    return (*(times(gradient, grad) if needed else None for gradient, needed in pairs), *[None] * 5)


loss.register_autograd(_backward_of_loss, setup_context=_keep_of_loss)
