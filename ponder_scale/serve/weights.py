"""Check that a folder has exactly the tensors of its model.

vLLM checks less. If the tensor of a linear layer is missing, it serves whatever was in memory. It also counts a fused
projection as loaded when one of its parts is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

# Buffers in old files. Every class that uses them computes them again.
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


class Tensors:
    """Records the names of tensors as they are loaded, and compares them with those of the stock model.

    Args:
        stock: the stock configuration of transformers.
        dropped: beginnings of the names of tensors that are not served, and not loaded.
    """

    def __init__(self, stock: Any, dropped: tuple[str, ...] = ()) -> None:
        self._dropped = dropped
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(stock)
        self._prefix = f"{model.base_model_prefix}."
        self._expected = {name.removeprefix(self._prefix) for name, _ in model.named_parameters()}
        self._tied = {name.removeprefix(self._prefix) for name in model.state_dict()} - self._expected
        self._seen: set[str] = set()

    def noted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same weights, but for the dropped ones, and record their names.

        Raises:
            ValueError: the model has no tensor of that name.
        """
        for name, tensor in weights:
            if name.startswith(self._dropped):
                continue
            bare = name.removeprefix(self._prefix)
            if bare not in self._expected | self._tied and not name.endswith(BUFFERS):
                raise ValueError(
                    f"{name} is among the folder's weights but is not a tensor of {self._prefix.rstrip('.')}, so this "
                    "kind of model is not served"
                )
            self._seen.add(bare)
            yield name, tensor

    def check_complete(self) -> None:
        """Raise ValueError if tensors of the model were not loaded."""
        missing = sorted(self._expected - self._seen)
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise ValueError(
                f"the folder's weights have no {', '.join(missing[:4])}{more}; export the checkpoint again"
            )
