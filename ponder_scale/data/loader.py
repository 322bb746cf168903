"""The micro-batches of one rank, read from memory-mapped shards in the order of `order.py`.

What a sequence holds is said in `sequences.py`. A step takes the next `global_batch` sequences of the run, or as many
as it is asked for, and deals them out: micro-batch m of rank r gets numbers m * world_size * micro_batch +
r * micro_batch and following. So what a step trains on does not depend on ranks or micro-batches, and the loader's
whole state is the number of sequences consumed.
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

_HISTORIES = 10_000  # of sets that were appended to, tried to explain a difference
_Ahead = tuple[int, Future[tuple[list[MicroBatch], int]]]  # the sequences of a step, and what will be read of it


def open_sources(data: DataConfig, key: str = "data.sources.{}.path", *, check: bool = True) -> dict[str, ShardSet]:
    """The shards of each source of the mixture, by name, in alphabetical order; `key` names what gave their paths,
    `check` is that of `open_shards`.

    Raises ShardError for damaged or unfinished shards, TokenizerError for sources of different tokenizers.
    """
    return open_all({name: source.path for name, source in data.sources.items()}, key, check=check)


def damaged_shard(sources: Mapping[str, ShardSet], rank: int, world_size: int) -> str | None:
    """What is wrong with the first of this rank's share of the shards that is not as its manifest says, or None."""
    shards = [(name, shard) for name in sorted(sources) for shard in sources[name].every()]
    for name, shard in shards[rank::world_size]:
        try:
            shard.check()
        except (ShardError, OSError) as error:
            return f"data.sources.{name}.path: {error}"
    return None


class Loader:
    """Micro-batches of the training split, step after step; the next step is read on one background thread."""

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

        Raises ConfigError when the batch cannot be dealt out evenly and when a source has no whole sequence,
        ShardError when data.packing is best-fit and a source is not packed.
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
        self.wait_seconds = 0.0  # that `next_batches` has waited for data in all

    def next_batches(self, sequences: int | None = None, ahead: int | None = None) -> list[MicroBatch]:
        """The micro-batches of the next step.

        Args:
            sequences: that the step takes, over all ranks; default: the global batch.
            ahead: that the step after it will take, which is read meanwhile; default: as many as this one.

        Raises ConfigError when every source has reached its max_epochs.
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
        """Sequences of the run's order that are behind `next_batches`, those left out included."""
        return self._consumed

    @property
    def taken(self) -> int:
        """Those of them that were read, going by what is left out now."""
        position = left_out = 0
        for first, end in self._skip:
            first, end = max(first, position), min(end, self._consumed)
            left_out, position = left_out + max(0, end - first), max(position, end)
        return self._consumed - left_out

    def leave_out(self, first: int, end: int) -> None:
        """From the next step on, pass over the sequences [first, end) of the run's order, as those of data.skip."""
        self._skip = sorted([*self._skip, (first, end)])
        self._ahead = None

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs to go on: what is read in what order, and how far `next_batches` has come.

        `consumed` counts sequences of the run's order, those that were skipped included.
        """
        return {**self._identity, "consumed": self._consumed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the loader of `state` stood; ranks, micro-batch, global batch and data.skip may be others.

        Raises ConfigError when the order of sequences would be another one.
        """
        keys = {"seq_len": "data.seq_len", "seed": "seed", "shards": "data.sources", "weights": "data.sources"}
        keys["packing"] = "data.packing"
        for name, key in keys.items():
            saved = state.get(name, "concat")  # the only packing there was when states did not name it
            own = self._identity[name]
            if saved != own:
                if name == "shards" and (grown := self._grown_since(saved)):
                    raise ConfigError(grown)
                raise ConfigError(
                    f"{key}: {name} of the checkpoint: {', of this run: '.join(_in_words(name, saved, own))}; "
                    f"the data would come in another order; use what the checkpoint used, or start a new run"
                )
        self._consumed = state["consumed"]
        self._ahead = None

    def _grown_since(self, saved: str) -> str:
        """What to do where the sources are those of a checkpoint, and were appended to since; else nothing."""
        for some in islice(product(*(range(len(history)) for history in self._histories.values())), _HISTORIES):
            appends = dict(zip(self._histories, some, strict=True))
            if _hash_of_shards({name: self._histories[name][count] for name, count in appends.items()}) == saved:
                name, count = next((name, count) for name, count in appends.items() if count)
                path = self._folders[name]
                return (
                    f"data.sources.{name}.path is {path}, which has grown since the checkpoint ({count} x ponder-data "
                    f"append), so the data would come in another order; make the set as it was: ponder-data merge NEW "
                    f"{path} --without-last {count}, and give data.sources.{name}.path=NEW; or start a new run"
                )
        return ""

    def close(self) -> None:
        """End the background thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read_ahead(self, sequences: int) -> _Ahead:
        return sequences, self._thread.submit(self._read_step, self._consumed, sequences)

    def _mine(self, sequences: int) -> NDArray[np.int64]:
        """(micro-batches, micro_batch) offsets from the first sequence of a step to those of this rank."""
        if sequences % (self._micro_batch * self._world_size):
            raise ConfigError(
                f"train.global_batch is {sequences}; expected a multiple of train.micro_batch ({self._micro_batch}) "
                f"times the number of ranks ({self._world_size})"
            )
        return np.arange(sequences).reshape(-1, self._world_size, self._micro_batch)[:, self._rank]

    def _read_step(self, first: int, sequences: int) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of the step that begins at sequence `first`, and where the next one begins."""
        mine = self._mine(sequences)
        windows, after = not_skipped(first, sequences, self._skip)
        if after > self._order.end:
            raise ConfigError(
                f"data: {self._order.end:,} sequences are all there are under max_epochs and phases; the step at "
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
    """The same at most `sequences` held-out sequences each time, shared out over the ranks.

    Every rank gets as many batches of the same shape, as collective operations need; rows that fill them up have no
    label that counts. The sequences are a sample spread over all sources by their held-out size, packed and masked
    as `data` says. Yields nothing where there are none.
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
    # keyed by what the shards hold, so that the sample does not depend on what a recipe calls them
    order = Order([sources[name].manifest.identity for name in held_out], counts, counts, seed=0)
    reader = Reader(list(held_out.values()), data, _filler(sources))
    total, width = min(sequences, sum(counts)), world_size * micro_batch
    mine = np.arange(rank * micro_batch, (rank + 1) * micro_batch)
    for first in range(0, total, width):
        batch = reader.read(order.locate(first, width), mine)
        real = torch.from_numpy(first + mine < total).unsqueeze(1)
        yield batch._replace(labels=torch.where(real, batch.labels, IGNORE_INDEX))


def _in_words(name: str, saved: Any, own: Any) -> tuple[str, str]:
    """Two different values of the loader's state, of the checkpoint and of this run; nobody can look at a hash."""
    if name == "packing":
        first, second = ("concat" if value == "concat" else "best-fit" for value in (saved, own))
        return first, second if first != second else f"{second} by other bins, of another `ponder-data pack`"
    return ("those it began with", "others") if name in ("shards", "weights") else (str(saved), str(own))


def open_packings(data: DataConfig, sources: Mapping[str, ShardSet]) -> dict[str, Packing]:
    """By source; none for concat. Raises ShardError where a source is not packed."""
    if data.packing == "concat":
        return {}
    return {name: open_packing(sources[name], data.seq_len) for name in sorted(sources)}


def _filler(sources: Mapping[str, ShardSet]) -> int:
    """The token that fills up what no document reaches; no label counts there."""
    return next(iter(sources.values())).manifest.eod_id or 0


def _histories(manifest: Manifest) -> list[str]:
    """The identity of a set, and those it had before each append, the last one first."""
    return [manifest.identity, *(was["identity"] for was in reversed(manifest.provenance.get("grown", [])))]


def _hash_of_shards(identities: Mapping[str, str]) -> str:
    return _hash([[name, identities[name]] for name in sorted(identities)])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
