"""Turn the recipe's data section into the order of a run: which streams are mixed, when, how often, in what shares."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ponder_scale.config import DataConfig
from ponder_scale.data.order import Order, Phase
from ponder_scale.errors import ConfigError
from ponder_scale.shards.format import Shard, ShardSet


class Stream(NamedTuple):
    """Shards that are shuffled together: a folder of shards, or one source of a build that gave its sources weights."""

    name: str  # the name of the source, or source/part
    source: str  # its name in the run's recipe
    shards: list[Shard]
    weight: float
    max_epochs: float | None


def mixture(data: DataConfig, sources: Mapping[str, ShardSet]) -> list[Stream]:
    """The streams of all sources, by name. The weights of a build divide the weight of its folder."""
    streams = []
    for name in sorted(sources):
        config, manifest, shards = data.sources[name], sources[name].manifest, sources[name].split("train")
        if not manifest.weights:
            streams.append(Stream(name, name, shards, config.weight, config.max_epochs))
        total = math.fsum(manifest.weights.values())
        for part, weight in sorted(manifest.weights.items()):
            of_part = [shard for shard in shards if shard.info.source == part]
            streams.append(Stream(f"{name}/{part}", name, of_part, config.weight * weight / total, config.max_epochs))
    return streams


def run_order(data: DataConfig, streams: Sequence[Stream], counts: Sequence[int], seed: int) -> Order:
    """The order of the run over streams that have `counts` sequences.

    Raises ConfigError for a stream without a whole sequence, and for a phase that names an unknown stream.
    """
    for stream, count in zip(streams, counts, strict=True):
        if not count:
            raise ConfigError(
                f"data.sources.{stream.source}.path ({data.sources[stream.source].path}): no train shard of "
                f"{stream.name} has the {data.seq_len + 1:,} tokens of one sequence; lower data.seq_len or remove the "
                f"source"
            )
    limits = [
        None if stream.max_epochs is None else max(1, math.floor(stream.max_epochs * count))
        for stream, count in zip(streams, counts, strict=True)
    ]
    phases = [_phase(data, number, streams) for number in range(len(data.phases))]
    weights = [stream.weight for stream in streams]
    return Order([stream.name for stream in streams], counts, weights, seed, limits, phases)


def describe(data: DataConfig, streams: Sequence[Stream]) -> list[Any]:
    """The settings that decide the order, besides the shards and the seed, as plain values."""
    total = math.fsum(stream.weight for stream in streams)
    shares = [[stream.name, stream.weight / total, stream.max_epochs] for stream in streams]
    return [shares, [[phase.tokens, sorted(phase.weights.items())] for phase in data.phases]]


def not_skipped(first: int, count: int, skip: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    """The next `count` sequences from `first` on that are in no range of `skip`, which is sorted.

    Returns them as windows (first, count), and the number of the sequence after the last one.
    """
    windows = []
    while count:
        before = bisect_right(skip, (first, math.inf))
        inside = max((end for begin, end in skip[:before] if end > first), default=None)
        if inside is not None:
            first = inside
            continue
        some = min(count, skip[before][0] - first) if before < len(skip) else count
        windows.append((first, some))
        first, count = first + some, count - some
    return windows, first


def _phase(data: DataConfig, number: int, streams: Sequence[Stream]) -> Phase:
    phase, names = data.phases[number], [stream.name for stream in streams]
    for name in phase.weights:
        if name not in names:
            raise ConfigError(
                f"data.phases.{number}.weights.{name}: no such source; expected some of {', '.join(names)}"
            )
    weights = [phase.weights.get(stream.name, 0.0) if phase.weights else stream.weight for stream in streams]
    if min(weights) < 0 or not any(weights):
        raise ConfigError(f"data.phases.{number}.weights: {phase.weights}; expected shares of at least 0, not all 0")
    return Phase(None if phase.tokens is None else math.ceil(phase.tokens / data.seq_len), weights)
