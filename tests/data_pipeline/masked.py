"""Builds of sources in which not everything counts in the loss."""

import json

import numpy as np

from data_pipeline.cli import main
from ponder_scale.shards.format import open_shards


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def build(path, tokenizer, out, *more, kind="jsonl"):
    source = [f"sources.chat.kind={kind}", f"sources.chat.path={path}"]
    return main(["build", f"out={out}", f"tokenizer={tokenizer}", *source, "heldout_fraction=0", "workers=1", *more])


def documents(folder, split="train"):
    """(tokens, which count) of each document."""
    for shard in open_shards(folder).split(split):
        ends = np.cumsum(shard.lengths, dtype=np.int64)
        for end, length in zip(ends.tolist(), shard.lengths.tolist(), strict=True):
            counts = None if shard.mask is None else shard.mask.read(end - length, length).tolist()
            yield shard.tokens[end - length : end].tolist(), counts
