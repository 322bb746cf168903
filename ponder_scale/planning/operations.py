"""Count the operations of a micro-batch while the model's code runs, on fake or on real tensors.

product      matrix product of (m, k) and (k, n), recorded by its shape, because its speed depends on the shape
attention    counted by the FLOPs of its kernel
all others   counted by the bytes that they read and write, the numbers that need a costly function such as an
             exponential, and the calls
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FORWARD, BACKWARD, AGAIN = "forward", "backward", "again"  # "again" is forward work that backward repeats
PHASES = (FORWARD, BACKWARD, AGAIN)
BACKWARD_PRODUCTS = 2.5  # attention's backward has five products with the square of the sequence, its forward two

aten = torch.ops.aten
PRODUCTS = {
    aten.mm: 0,
    aten.addmm: 1,
    aten.bmm: 0,
    aten.baddbmm: 1,
}  # index of the first of their two factors among the arguments
COSTLY = {
    *(aten.silu, aten.silu_backward, aten.gelu, aten.gelu_backward, aten.tanh, aten.tanh_backward, aten.sigmoid),
    *(aten.exp, aten._softmax, aten._softmax_backward_data, aten.cos, aten.sin, aten.native_dropout),
}
FREE = {
    aten._unsafe_view,
    aten.detach,
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.lift_fresh,
}
LOOKUPS = {aten.embedding}  # read only the rows that they write, not the whole table


class Product(NamedTuple):
    """A matrix product of (m, k) and (k, n) that runs `times` times."""

    phase: str
    m: float
    n: float
    k: float
    times: float = 1.0

    @property
    def flops(self) -> float:
        """The floating-point operations of all `times` products."""
        return 2.0 * self.m * self.n * self.k * self.times


class Rest(NamedTuple):
    """The operations of one phase that are not products."""

    attention_flops: float = 0.0
    bytes: float = 0.0
    costly: float = 0.0  # numbers that need an exponential or another costly function
    calls: float = 0.0  # of all operations, including products and attention


@dataclass(frozen=True)
class Operations:
    """The operations of a micro-batch, forward and backward, without the pondering embedding and the loss."""

    products: tuple[Product, ...] = ()  # in the order in which they run
    rest: Mapping[str, Rest] = field(default_factory=lambda: {phase: Rest() for phase in PHASES})

    def scaled(self, larger: Operations, times: float) -> Operations:
        """The operations at another micro-batch: these, plus `times` the difference between `larger` and these.

        All dimensions and bytes are linear in the batch.

        Args:
            larger: operations of the same model with another micro-batch.
        """
        assert len(self.products) == len(larger.products), "another model"
        products = (
            Product(one.phase, *(a + times * (b - a) for a, b in zip(one[1:], two[1:], strict=True)))
            for one, two in zip(self.products, larger.products, strict=True)
        )
        return Operations(tuple(products), _mixed(self.rest, larger.rest, times))

    def deeper(self, more: Operations, layers: float) -> Operations:
        """The operations with `layers` more layers, where `more` has one layer more than these.

        Both lists of products are kept and weighted. So the operations of two micro-batches stay comparable product by
        product.
        """
        products = (
            product._replace(times=weight * product.times)
            for operations, weight in ((self, 1.0 - layers), (more, layers))
            for product in operations.products
        )
        return Operations(tuple(products), _mixed(self.rest, more.rest, layers))


def _mixed(one: Mapping[str, Rest], two: Mapping[str, Rest], share: float) -> dict[str, Rest]:
    return {
        phase: Rest(*(a + share * (b - a) for a, b in zip(one[phase], two[phase], strict=True))) for phase in PHASES
    }


class Counting(TorchDispatchMode):
    """Counts the operations that run inside of its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self._products: list[Product] = []
        self._rest = {phase: [0.0] * len(Rest._fields) for phase in PHASES}

    @property
    def operations(self) -> Operations:
        """The operations counted until now."""
        return Operations(tuple(self._products), {phase: Rest(*values) for phase, values in self._rest.items()})

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        packet = operation.overloadpacket
        if packet in FREE or operation.namespace == "prim" or _is_view(operation):
            return result
        rest = self._rest[_phase()]
        rest[3] += 1
        if packet in PRODUCTS:
            self._products.append(_product(packet, args))
        elif "_scaled_dot_product" in packet.__name__:
            rest[0] += _attention_flops(packet.__name__, args)
        else:
            written = list(_tensors((result,)))
            read = written if packet in LOOKUPS else list(_tensors(args))
            rest[1] += sum(map(_bytes, written)) + sum(map(_bytes, read))
            if packet in COSTLY:
                rest[2] += sum(tensor.numel() for tensor in written)
        return result


def _phase() -> str:
    if torch._C._current_graph_task_id() == -1:
        return FORWARD
    return AGAIN if torch.is_grad_enabled() else BACKWARD  # recomputation runs with gradients enabled


def _product(packet: Any, args: Any) -> Product:
    left, right = args[PRODUCTS[packet] : PRODUCTS[packet] + 2]
    times = left.shape[0] if left.ndim == 3 else 1
    return Product(_phase(), float(left.shape[-2]), float(right.shape[-1]), float(left.shape[-1]), float(times))


def _attention_flops(name: str, args: Any) -> float:
    """The FLOPs of the half of the square that a causal kernel computes."""
    backward = "backward" in name
    query, key = args[1:3] if backward else args[:2]
    batch, heads, queries, width = query.shape
    forward = 4.0 * batch * heads * width * queries * (key.shape[2] + 1) / 2
    return BACKWARD_PRODUCTS * forward if backward else forward


def _is_view(operation: Any) -> bool:
    returns = operation._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    """The bytes that are read of a tensor. An expanded tensor has fewer in memory than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
