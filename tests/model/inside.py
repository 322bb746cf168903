"""A look at every operation, also at those inside our operators, which torch shows as one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ponder_scale.model import operators

OPERATORS = (
    operators.mixture,
    operators.mixture_gradients,
    operators.top_k,
    operators.top_k_gradients,
    operators.loss,
    operators.times,
)


class Inside(TorchDispatchMode):
    """Remembers the elements of each tensor that an operation made, and how often each was called, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.calls: Counter[str] = Counter()
        self._opened = {operator._opoverload: operator._init_fn for operator in OPERATORS}

    @property
    def called(self) -> set[str]:
        """The names of the operations."""
        return set(self.calls)

    @property
    def largest(self) -> int:
        """The most elements of a tensor."""
        return max(self.made, default=0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self._opened:
            with self:
                return self._opened[function](*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        result = function(*args, **(kwargs or {}))
        self.made += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result
