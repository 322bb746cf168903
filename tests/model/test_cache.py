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
