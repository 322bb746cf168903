"""The layer that grows in place holds what transformers' own does, whatever is done with it in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ponder_scale.model.cache import ROOM, GrowingLayer, grow


def fill(layer: Any, tokens: int, seed: int, batch: int = 2) -> Any:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 3, tokens, 4, generator=generator)
    return layer.update(keys, values)


def cut(layer: Any) -> None:
    layer.keys, layer.values = layer.keys[..., :-3, :], layer.values[..., :-3, :]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda layer: None,
    "cropped": cut,
    "beams reordered": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "rows selected": lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
    "rows repeated": lambda layer: layer.batch_repeat_interleave(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_the_stock_layer_holds(change: str) -> None:
    layers = [GrowingLayer(), DynamicLayer()]
    for layer in layers:
        for seed, tokens in enumerate((5, 1, 4, 1)):
            fill(layer, tokens, seed)
        CHANGES[change](layer)
    copies = [copy.deepcopy(layer) for layer in layers]
    for seed in range(ROOM + 10):
        batch = layers[1].keys.shape[0]
        (keys, values), (expected_keys, expected_values) = (fill(layer, 1, seed, batch) for layer in layers)
        assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)
    grown, stock = (fill(layer, 2, 99, batch)[0] for layer in copies)
    assert torch.equal(grown, stock)


def test_a_token_is_written_where_there_is_room_and_everything_is_copied_once_for_many() -> None:
    layer = GrowingLayer()
    fill(layer, 5, 0)
    places = [fill(layer, 1, seed)[0].data_ptr() for seed in range(2 * ROOM)]
    assert len(set(places)) == 2 and layer.get_seq_length() == 5 + 2 * ROOM


def test_gradients_go_through_it_and_a_cache_of_inference_mode_can_go_on_outside() -> None:
    layer = GrowingLayer()
    with torch.inference_mode():
        fill(layer, 5, 0)
        fill(layer, 1, 1)
    fill(layer, 1, 2)
    assert layer.get_seq_length() == 7
    keys = torch.randn(2, 3, 1, 4, requires_grad=True)
    for _ in range(2):
        layer.update(keys, keys)
    layer.keys.sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2.0))


def test_an_offloaded_cache_keeps_the_stock_layers() -> None:
    stock, plain = DynamicCache(), DynamicCache()
    stock.offloading = True
    for cache in (stock, plain):
        grow(cache, passes=2, layers=2)
    assert (stock.layer_class_to_replicate, plain.layer_class_to_replicate) == (DynamicLayer, GrowingLayer)


def test_what_somebody_holds_is_not_written_over() -> None:
    """As with the stock layer: tensors taken before a crop stay as they are, and so do shallow copies of a layer."""
    for kind in (DynamicLayer, GrowingLayer):
        layer = kind()
        for seed, tokens in enumerate((5, 1, 4)):
            fill(layer, tokens, seed)
        held, before = layer.keys, layer.keys.clone()
        layer.crop(-6)
        for seed in range(5, 12):
            fill(layer, 1, seed)
        assert torch.equal(held, before), kind

        other = copy.copy(layer)
        kept = (layer.keys.clone(), other.keys.clone())
        mine, theirs = fill(layer, 1, 20)[0].clone(), fill(other, 1, 21)[0].clone()
        fill(layer, 1, 22)
        assert torch.equal(layer.keys[..., :-1, :], mine) and torch.equal(other.keys, theirs), kind
        assert torch.equal(mine[..., :-1, :], kept[0]) and torch.equal(theirs[..., :-1, :], kept[1]), kind


def test_a_shallow_copy_of_a_cache_goes_on_by_itself() -> None:
    cache = DynamicCache()
    grow(cache, passes=1, layers=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        cache.update(*torch.randn(2, 2, 3, 1, 4, generator=generator), 0)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    ours = cache.update(*torch.randn(2, 2, 3, 1, 4, generator=generator), 0)[0].clone()
    other.update(*torch.randn(2, 2, 3, 1, 4, generator=generator), 0)
    assert torch.equal(cache.layers[0].keys, ours) and not torch.equal(other.layers[0].keys, ours)
