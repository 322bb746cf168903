"""Compute how often a run will read each of its sources."""

from __future__ import annotations

from collections.abc import Mapping

from ponder_scale.config import RunConfig
from ponder_scale.data.loader import open_packings
from ponder_scale.data.mixture import mixture, run_order
from ponder_scale.data.sequences import sequences_of
from ponder_scale.figures import count, times
from ponder_scale.shards.format import ShardSet


def epoch_lines(config: RunConfig, sources: Mapping[str, ShardSet]) -> list[str]:
    """A line for each source, with its tokens, its share of the run and its epochs. Only headers are read.

    Raises:
        ConfigError, ShardError: the loader of the run would raise them, too.
    """
    data = config.data
    streams, packings = mixture(data, sources), open_packings(data, sources)
    counts = [len(sequences_of(stream.shards, data.seq_len, packings.get(stream.source))) for stream in streams]
    order = run_order(data, streams, counts, config.seed)
    wanted = config.train.sequences_until(config.train.steps)
    served = order.served(wanted)
    lines = []
    for stream, own, taken in zip(streams, counts, served, strict=True):
        tokens = sum(shard.info.tokens for shard in stream.shards)
        lines.append(
            f"source         {stream.name}: {count(tokens)} tokens in {own:,} sequences, {taken / sum(served):.1%} of "
            f"the run, {times(taken / own)} epochs"
        )
    if wanted > order.end:
        lines.append(
            f"warning: data.sources end after {order.end:,} of the run's {wanted:,} sequences (max_epochs, phases); "
            "lower train.steps or raise max_epochs"
        )
    return lines
