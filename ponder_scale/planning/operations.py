"""What a micro-batch computes, operation by operation: counted while the model's code runs on stand-ins for tensors.

A product of (m, k) and (k, n) is known by its shape, as its speed depends on that. Attention is known by what its
kernel computes. Anything else reads and writes memory: its bytes count, how many numbers of it need an exponential or
another function that costs more than an addition, and that it is one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FORWARD, BACKWARD, AGAIN = "forward", "backward", "again"  # "again": of a forward, computed once more in backward
PHASES = (FORWARD, BACKWARD, AGAIN)
BACKWARD_PRODUCTS = 2.5  # of attention over its forward's: five products with the square of the sequence, not two

aten = torch.ops.aten
PRODUCTS = {
    aten.mm: 0,
    aten.addmm: 1,
    aten.bmm: 0,
    aten.baddbmm: 1,
}  # where their two factors begin among the arguments
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
LOOKUPS = {aten.embedding}  # read as many rows as they write, whatever the table holds


class Product(NamedTuple):
    """(m, k) times (k, n), `times` times."""

    phase: str
    m: float
    n: float
    k: float
    times: float = 1.0

    @property
    def flops(self) -> float:
        """Floating-point operations of all of them."""
        return 2.0 * self.m * self.n * self.k * self.times


class Rest(NamedTuple):
    """What is no product: of one phase."""

    attention_flops: float = 0.0
    bytes: float = 0.0
    costly: float = 0.0  # numbers that need an exponential or the like
    calls: float = 0.0  # products and attention among them


@dataclass(frozen=True)
class Operations:
    """Of forward and backward of a micro-batch, but for the pondering embedding and the loss."""

    products: tuple[Product, ...] = ()  # in the order in which they run
    rest: Mapping[str, Rest] = field(default_factory=lambda: {phase: Rest() for phase in PHASES})

    def scaled(self, larger: Operations, times: float) -> Operations:
        """These with `times` as large a step on the way to `larger`: all dimensions and bytes are linear in the batch.

        Args:
            larger: of the same model with another micro-batch.
        """
        assert len(self.products) == len(larger.products), "another model"
        products = (
            Product(one.phase, *(a + times * (b - a) for a, b in zip(one[1:], two[1:], strict=True)))
            for one, two in zip(self.products, larger.products, strict=True)
        )
        return Operations(tuple(products), _mixed(self.rest, larger.rest, times))

    def deeper(self, more: Operations, layers: float) -> Operations:
        """These with as many more layers, where `more` are those of one layer more.

        Both lists stay as they are, with weights, so that those of another micro-batch are of the same products.
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
    """Counts what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self._products: list[Product] = []
        self._rest = {phase: [0.0] * len(Rest._fields) for phase in PHASES}

    @property
    def operations(self) -> Operations:
        """Until now."""
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
    return AGAIN if torch.is_grad_enabled() else BACKWARD  # checkpoints record what they run again


def _product(packet: Any, args: Any) -> Product:
    left, right = args[PRODUCTS[packet] : PRODUCTS[packet] + 2]
    times = left.shape[0] if left.ndim == 3 else 1
    return Product(_phase(), float(left.shape[-2]), float(right.shape[-1]), float(left.shape[-1]), float(times))


def _attention_flops(name: str, args: Any) -> float:
    """Of the half of the square that a causal kernel computes."""
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
    """What is read of it: an expanded tensor has fewer bytes than numbers."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
