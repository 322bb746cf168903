"""The key-value caches of S + 1 passes, as one `Cache` of transformers.

Each pass attends to its own keys and values, so layer i of pass s keeps them at index s * L + i of one cache with
(S + 1) * L layers. The backbone counts L layers and sees those of one pass through `PassView`. Beam search, cropping
and offloading act on the whole cache and need not know of passes. Layers grow in place (`GrowingLayer`). `copy_newest`
fills the caches of passes that an early exit left out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 128  # tokens that are appended between two copies of all that is cached


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes new tokens into free room of its buffers, instead of copying everything each time.

    `keys` and `values` are the filled part of longer buffers. If anything else was done with them (beam search, a
    selection of the batch, a crop, a copy), the next token gets new buffers, so that no tensor of others changes.
    """

    _buffers: tuple[Tensor, Tensor] | None = None
    _left: tuple[Tensor, Tensor] | None = None  # `keys` and `values` after the last token

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values with the new ones appended, (B, heads, T, head width) each."""
        differentiated = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        if differentiated or torch.compiler.is_compiling() or self.get_seq_length() == 0:
            return super().update(keys, values, *args, **kwargs)
        begin, new = self.keys.shape[-2], keys.shape[-2]
        if self._buffers is None or not self._is_room_for(begin + new):
            self._buffers = _roomy(self.keys, keys), _roomy(self.values, values)
        for buffer, tensor in zip(self._buffers, (keys, values), strict=True):
            buffer.narrow(-2, begin, new).copy_(tensor)
        # what was cut off later may still be held by somebody as a view of the same buffers
        self._left = self._buffers[0].narrow(-2, 0, begin + new), self._buffers[1].narrow(-2, 0, begin + new)
        self.keys: Tensor = self._left[0]
        self.values: Tensor = self._left[1]
        return self._left

    def _is_room_for(self, tokens: int) -> bool:
        """Whether the buffers have room for `tokens`, and were only appended to since the last token."""
        if self._left is None or self._buffers is None:
            return False
        if self.keys is not self._left[0] or self.values is not self._left[1]:
            return False
        buffer = self._buffers[0]
        return buffer.shape[-2] >= tokens and (torch.is_inference_mode_enabled() or not buffer.is_inference())

    def reset(self) -> None:
        """Empty the layer."""
        self._buffers = self._left = None
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, without the buffers, because both layers would write into the same room."""
        return {**self.__dict__, "_buffers": None, "_left": None}


def _roomy(old: Tensor, new: Tensor) -> Tensor:
    """A buffer that begins with `old`, with room for `new` and more behind it."""
    length = old.shape[-2]
    buffer = new.new_empty(*new.shape[:-2], length + new.shape[-2] + ROOM, new.shape[-1])
    buffer.narrow(-2, 0, length).copy_(old)
    return buffer


class PassView(Cache):
    """The L layers of pass `index` in the cache, numbered from 0.

    It is a `Cache`, because some backbones require one. It has no layers of its own, so it skips `Cache.__init__`.
    """

    def __init__(self, cache: Cache, index: int, layers: int) -> None:
        self._cache, self._first, self._layers = cache, index * layers, layers

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The keys and values of a layer with the new ones appended, (B, heads, T, head width) each."""
        return self._cache.update(keys, values, self._first + layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The number of cached tokens of a layer in this pass."""
        return self._cache.get_seq_length(self._first + layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the next token."""
        return self._cache.get_query_offset(self._first + layer_idx)

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys, for the attention mask."""
        return self._cache.get_mask_sizes(query_length, self._first + layer_idx)

    @property
    def layers(self) -> list[Any]:
        """The layers of this pass."""
        return self._cache.layers[self._first : self._first + self._layers]

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether it keeps only a window."""
        return self._cache.is_sliding[self._first : self._first + self._layers]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cache, name)


def grow(cache: Cache, passes: int, layers: int, heads: int = 0) -> None:
    """Extend a cache for L layers, as `generate` creates it, to `passes` * L layers, and one for each extra head.

    Raises:
        ValueError: the cache was filled with another number of pondering steps, or without the heads.
    """
    _check_heads(cache, passes, layers, heads)
    if not getattr(cache, "offloading", False):  # offloading replaces the tensors at every token
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = GrowingLayer
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = GrowingLayer
    if cache.layer_class_to_replicate is None:
        while len(cache.layers) < passes * layers + heads:
            if cache.get_seq_length() > 0:
                raise ValueError(
                    f"the cache holds {len(cache.layers) // layers} passes, but {passes} are needed; continue with "
                    "the pondering_steps it was filled with, or start an empty cache (prefix tuning, which fills a "
                    "cache for one pass, needs pondering_steps=0)"
                )
            # Any layer will do, because all are empty and alike. A draft that exits early has fewer than L.
            cache.layers.append(copy.deepcopy(cache.layers[0]))
    if torch.compiler.is_compiling():
        return  # compiled code cannot branch on the counts of a static cache, which are tensors; the prompt was checked
    filled = [cache.get_seq_length(index * layers) for index in (0, passes - 1)]
    if filled[0] != filled[1]:
        raise ValueError(
            f"the cache holds {filled[0]} tokens for the first pass and {filled[1]} for pass {passes}; continue with "
            "the pondering_steps it was filled with, or start an empty cache"
        )


def _check_heads(cache: Cache, passes: int, layers: int, heads: int) -> None:
    """Raise ValueError if the keys of extra heads would be taken for those of a pass, or would lack tokens."""
    first = getattr(cache, "passes_before_heads", passes)  # the heads' own layers follow the passes of that forward
    whole = not heads or cache.get_seq_length(passes * layers) == cache.get_seq_length()
    if passes > first or (heads and passes != first) or not whole:
        raise ValueError(
            "the cache was filled without the extra heads, or with them and another number of pondering_steps; "
            "start an empty cache"
        )
    if heads:
        cache.passes_before_heads = passes


def check_growing(cache: Cache | None, option: str) -> None:
    """Raise ValueError unless the cache grows by concatenation."""
    kind = None if cache is None else type(cache.layers[0] if cache.layers else cache.layer_class_to_replicate())
    if kind not in (DynamicLayer, GrowingLayer):
        found = "none" if kind is None else kind.__name__
        raise ValueError(f"{option} needs a cache of DynamicLayer, found {found}; give use_cache=True and no cache")


def copy_newest(cache: Cache, tokens: int, done: int, passes: int, layers: int) -> None:
    """Copy the newest keys and values of pass `done` to all later passes, which did not run."""
    for index in range(done + 1, passes):
        for layer in range(layers):
            source = cache.layers[done * layers + layer]
            keys, values = source.keys[..., -tokens:, :], source.values[..., -tokens:, :]
            cache.update(keys, values, index * layers + layer)
