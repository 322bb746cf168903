"""The micro-batches of one rank, read from memory-mapped shards in the order of `order.py`.

`sequences.py` says what a sequence holds. A step takes the next `global_batch` sequences of the run, or another number
if it asks for one, and distributes them: micro-batch m of rank r gets the sequences from number
m * world_size * micro_batch + r * micro_batch on. So the data of a step does not depend on ranks or micro-batches, and
the whole state of the loader is the number of sequences that were consumed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ponder_scale.config import DataConfig
from ponder_scale.data.mixture import describe, mixture, not_skipped, run_order
from ponder_scale.data.order import Order, Places
from ponder_scale.data.sequences import IGNORE_INDEX, MicroBatch, Reader, sequences_of
from ponder_scale.errors import ConfigError, ShardError
from ponder_scale.shards.format import ShardSet, open_all
from ponder_scale.shards.manifest import Manifest
from ponder_scale.shards.packing import Packing, open_packing

_HISTORIES = 10_000  # most histories of appends that are tried to explain a difference
_Ahead = tuple[int, Future[tuple[list[MicroBatch], int]]]  # the sequences of a step, and its data when it has been read


def open_sources(data: DataConfig, key: str = "data.sources.{}.path", *, check: bool = True) -> dict[str, ShardSet]:
    """The shards of each source of the mixture, by name, in alphabetical order.

    `key` names the setting that gave the paths, for messages. `check` is that of `open_shards`.

    Raises ShardError for damaged or unfinished shards, and TokenizerError for sources of different tokenizers.
    """
    return open_all({name: source.path for name, source in data.sources.items()}, key, check=check)


def damaged_shard(sources: Mapping[str, ShardSet], rank: int, world_size: int) -> str | None:
    """What is wrong with the first shard of this rank's share that differs from its manifest, or None."""
    shards = [(name, shard) for name in sorted(sources) for shard in sources[name].every()]
    for name, shard in shards[rank::world_size]:
        try:
            shard.check()
        except (ShardError, OSError) as error:
            return f"data.sources.{name}.path: {error}"
    return None


class Loader:
    """Micro-batches of the training split, step after step. One background thread reads the next step."""

    def __init__(
        self,
        data: DataConfig,
        sources: Mapping[str, ShardSet],
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`sources` are those of `open_sources(data)`.

        Raises ConfigError if the batch does not divide evenly, or if a source has no whole sequence. Raises ShardError
        if data.packing is best-fit and a source is not packed.
        """
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        self._global_batch = global_batch
        self._mine(global_batch)
        streams = mixture(data, sources)
        packings = open_packings(data, sources)
        sequences = [
            sequences_of(stream.shards, data.seq_len, packings[stream.source] if packings else None)
            for stream in streams
        ]
        self._order = run_order(data, streams, [len(some) for some in sequences], seed)
        self._reader = Reader(sequences, data, _filler(sources), pinned=torch.cuda.is_available())
        self._skip = sorted((first, end) for first, end in data.skip)
        self._consumed = 0
        self._identity = {
            "seq_len": data.seq_len,
            "seed": seed,
            "shards": _hash_of_shards({name: shards.manifest.identity for name, shards in sources.items()}),
            "weights": _hash(describe(data, streams)),
            "packing": _hash([[name, packings[name].identity] for name in sorted(packings)]) if packings else "concat",
        }
        self._folders = {name: source.path for name, source in data.sources.items()}
        self._histories = {name: _histories(shards.manifest) for name, shards in sorted(sources.items())}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: _Ahead | None = None
        self.wait_seconds = 0.0  # how long `next_batches` has waited for data in all

    def next_batches(self, sequences: int | None = None, ahead: int | None = None) -> list[MicroBatch]:
        """The micro-batches of the next step.

        Args:
            sequences: number of sequences that the step takes over all ranks. The default is the global batch.
            ahead: number that the next step will take. They are read meanwhile. The default is that of this step.

        Raises ConfigError if every source has reached its max_epochs.
        """
        sequences = sequences or self._global_batch
        ahead = ahead or sequences
        begin = time.perf_counter()
        if self._ahead is None or self._ahead[0] != sequences:
            self._ahead = self._read_ahead(sequences)
        batches, self._consumed = self._ahead[1].result()
        self.wait_seconds += time.perf_counter() - begin
        self._ahead = self._read_ahead(ahead)
        return batches

    @property
    def consumed(self) -> int:
        """The number of sequences of the run's order that `next_batches` has passed, including those left out."""
        return self._consumed

    @property
    def taken(self) -> int:
        """The number of consumed sequences that were read, if always those were left out that are left out now."""
        position = left_out = 0
        for first, end in self._skip:
            first, end = max(first, position), min(end, self._consumed)
            left_out, position = left_out + max(0, end - first), max(position, end)
        return self._consumed - left_out

    def leave_out(self, first: int, end: int) -> None:
        """From the next step on, leave out the sequences [first, end) of the run's order, as data.skip does."""
        self._skip = sorted([*self._skip, (first, end)])
        self._ahead = None

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs to continue: the data and its order, and how far `next_batches` has come.

        `consumed` counts sequences of the run's order, including those that were left out.
        """
        return {**self._identity, "consumed": self._consumed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where the loader of `state` was. Ranks, micro-batch, global batch and data.skip may differ.

        Raises ConfigError if the order of the sequences would differ.
        """
        keys = {"seq_len": "data.seq_len", "seed": "seed", "shards": "data.sources", "weights": "data.sources"}
        keys["packing"] = "data.packing"
        for name, key in keys.items():
            saved = state.get(name, "concat")  # older states name no packing, because this was the only one
            own = self._identity[name]
            if saved != own:
                if name == "shards" and (grown := self._grown_since(saved)):
                    raise ConfigError(grown)
                raise ConfigError(
                    f"{key}: {_difference(name, saved, own)}, so the data would come in another order; "
                    f"use what the checkpoint used, or start a new run"
                )
        self._consumed = state["consumed"]
        self._ahead = None

    def _grown_since(self, saved: str) -> str:
        """What to do if the sources are those of the checkpoint but have grown since. Empty if they are not."""
        for some in islice(product(*(range(len(history)) for history in self._histories.values())), _HISTORIES):
            appends = dict(zip(self._histories, some, strict=True))
            if _hash_of_shards({name: self._histories[name][count] for name, count in appends.items()}) == saved:
                name, count = next((name, count) for name, count in appends.items() if count)
                path = self._folders[name]
                return (
                    f"data.sources.{name}.path is {path}, which has grown since the checkpoint ({count} x ponder-data "
                    f"append), so the data would come in another order; make the earlier folder by ponder-data merge "
                    f"NEW {path} --without-last {count} and give data.sources.{name}.path=NEW, or start a new run"
                )
        return ""

    def close(self) -> None:
        """End the background thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read_ahead(self, sequences: int) -> _Ahead:
        return sequences, self._thread.submit(self._read_step, self._consumed, sequences)

    def _mine(self, sequences: int) -> NDArray[np.int64]:
        """The offsets of this rank's sequences from the first sequence of a step, (micro-batches, micro_batch)."""
        if sequences % (self._micro_batch * self._world_size):
            raise ConfigError(
                f"train.global_batch is {sequences}; expected a multiple of train.micro_batch ({self._micro_batch}) "
                f"times the number of ranks ({self._world_size})"
            )
        return np.arange(sequences).reshape(-1, self._world_size, self._micro_batch)[:, self._rank]

    def _read_step(self, first: int, sequences: int) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of the step that begins at sequence `first`, and where the next step begins."""
        mine = self._mine(sequences)
        windows, after = not_skipped(first, sequences, self._skip)
        if after > self._order.end:
            raise ConfigError(
                f"data: max_epochs and phases allow {self._order.end:,} sequences; the step that begins at sequence "
                f"{first:,} needs {after - self._order.end:,} more; lower train.steps or raise max_epochs"
            )
        parts = [self._order.locate(begin, count) for begin, count in windows]
        places = Places(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        rows = self._reader.read(places, mine.ravel())
        return rows.split(self._micro_batch), after


def heldout_batches(
    data: DataConfig,
    sources: Mapping[str, ShardSet],
    *,
    sequences: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MicroBatch]:
    """Yield the held-out batches of this rank. Every call reads the same sequences, at most `sequences` over all ranks.

    Every rank gets the same number of batches of the same shape, because collective operations need that. In rows that
    fill up a batch, no label counts. The sequences are a sample over all sources in proportion to their held-out size,
    and `data` says how they are packed and masked. Yields nothing if nothing is held out.
    """
    packings = open_packings(data, sources)
    held_out = {
        name: sequences_of(sources[name].split("heldout"), data.seq_len, packings[name] if packings else None)
        for name in sorted(sources)
    }
    held_out = {name: some for name, some in held_out.items() if len(some)}
    if not held_out:
        return
    counts = [len(some) for some in held_out.values()]
    # keyed by the content of the shards, so that the sample does not depend on their names in a recipe
    order = Order([sources[name].manifest.identity for name in held_out], counts, counts, seed=0)
    reader = Reader(list(held_out.values()), data, _filler(sources))
    total, width = min(sequences, sum(counts)), world_size * micro_batch
    mine = np.arange(rank * micro_batch, (rank + 1) * micro_batch)
    for first in range(0, total, width):
        batch = reader.read(order.locate(first, width), mine)
        real = torch.from_numpy(first + mine < total).unsqueeze(1)
        yield batch._replace(labels=torch.where(real, batch.labels, IGNORE_INDEX))


def _difference(name: str, saved: Any, own: Any) -> str:
    """A value of the loader's state that differs, in words. The hashes in the state would tell a reader nothing."""
    if name in ("shards", "weights"):
        return f"this run has other {name} than the checkpoint"
    if name == "packing":
        saved, own = ("concat" if value == "concat" else "best-fit" for value in (saved, own))
        if saved == own:
            return "this run has the bins of another `ponder-data pack` than the checkpoint"
    return f"the checkpoint has {name} {saved}, but this run has {own}"


def open_packings(data: DataConfig, sources: Mapping[str, ShardSet]) -> dict[str, Packing]:
    """The packing of each source. Empty for concat. Raises ShardError if a source is not packed."""
    if data.packing == "concat":
        return {}
    return {name: open_packing(sources[name], data.seq_len) for name in sorted(sources)}


def _filler(sources: Mapping[str, ShardSet]) -> int:
    """The token that fills the end of a sequence after its last document. No label counts there."""
    return next(iter(sources.values())).manifest.eod_id or 0


def _histories(manifest: Manifest) -> list[str]:
    """The identity of a set, and its identity before each append, newest first."""
    return [manifest.identity, *(was["identity"] for was in reversed(manifest.provenance.get("grown", [])))]


def _hash_of_shards(identities: Mapping[str, str]) -> str:
    return _hash([[name, identities[name]] for name in sorted(identities)])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
