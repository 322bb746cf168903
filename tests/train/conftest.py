"""Shards that whole tiny runs train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def shards(tiny_shards: Callable[..., Any]) -> Any:
    """Two training shards and a held-out one of 50 tokens' vocabulary, with a tokenizer folder."""
    made = tiny_shards(train=(900, 700), heldout=(200,), vocab_size=50)
    tokenizer = made.folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    return made
