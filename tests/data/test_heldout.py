"""Held-out losses are means over the tokens that count, whatever batches and sources they come in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ponder_scale.data.heldout import HeldOut, heldout_losses, mean_over
from ponder_scale.data.sequences import IGNORE_INDEX, MicroBatch


def test_a_token_weighs_the_same_in_any_batch_and_what_does_not_count_weighs_nothing() -> None:
    labels = [torch.tensor([[1, 2], [3, IGNORE_INDEX]]), torch.tensor([[IGNORE_INDEX, 4]])]
    batches = [MicroBatch(torch.zeros(len(some), 3, dtype=torch.int64), some, None) for some in labels]

    def predict(tokens: Any, labels: Any, positions: Any) -> Any:
        losses = [1.0, 2.0] if len(labels) == 2 else [2.0, 4.0]
        return SimpleNamespace(pass_losses=torch.tensor(losses))

    assert heldout_losses(predict, batches) == HeldOut([1.25, 2.5], 4)
    assert heldout_losses(predict, []) is None


def test_sources_are_averaged_by_their_tokens() -> None:
    assert mean_over([HeldOut([1.0, 2.0], 3), HeldOut([2.0, 4.0], 1)]) == HeldOut([1.25, 2.5], 4)
