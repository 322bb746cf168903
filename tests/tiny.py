"""Tiny data for the whole suite, all deterministic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ponder_scale.shards.format import ShardSet, ShardWriter, dtype_for, open_shards
from ponder_scale.shards.manifest import Manifest, seal

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def square(number):\n    return number * number\n\n\nassert square(3) == 9\n",
    "Größe, naïveté, 数学 and \U0001f600: every byte has a token, whatever the text.",
]
TinyShards = Callable[..., ShardSet]


def make_shards(
    folder: Path,
    *,
    train: tuple[int, ...] = (900, 700),
    heldout: tuple[int, ...] = (200,),
    vocab_size: int = 100,
    seed: int = 0,
    tokenizer: str = "a" * 64,
    masked: bool = False,
) -> ShardSet:
    """Shards with `train` and `heldout` tokens each, in documents of 1 to 40 tokens that end with token 0.

    With `masked`, a third of the tokens count in the loss: none of the first half of a shard, two of three behind it.
    """
    generator, chance = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    splits = {}
    for split, sizes in (("train", train), ("heldout", heldout)):
        splits[split] = []
        for number, size in enumerate(sizes):
            writer = ShardWriter(folder, f"{split}-{number:05d}", vocab_size, masked)
            left = size
            while left:
                length = min(left, int(generator.integers(1, 41)))
                document = generator.integers(1, vocab_size, length)
                document[-1] = 0
                counts = chance.random(length) < 2 / 3 if left <= size // 2 else np.zeros(length, dtype=bool)
                writer.add(document, np.array([length]), counts if masked else None)
                left -= length
            splits[split].append(writer.close())
    seal(folder, Manifest(dtype_for(vocab_size).name, vocab_size, 0, None, tokenizer, splits))
    return open_shards(folder)
