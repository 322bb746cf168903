"""The plan: units of work that depend on the inputs alone, not on the number of workers.

`plan.jsonl` has a line of settings and a line for each unit. It is either whole or missing. It is the first file that a
build writes, and a build decides what to resume by comparing plans.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import xxhash

from data_pipeline.config import SourceConfig
from data_pipeline.document import Piece, Unit
from data_pipeline.read.remote import stat
from data_pipeline.read.sources import LeftOut, files, split
from ponder_scale.errors import ConfigError
from ponder_scale.files.write import writing
from ponder_scale.shards.manifest import unsealed

PLAN = "plan.jsonl"
SHARDS = 32  # approximate number of shards of a corpus, within these limits for the input of one
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 2**24, 2**30
MAX_UNIT_PIECES = 20_000


def units(
    sources: Mapping[str, SourceConfig],
    shard_bytes: int | None,
    left_out: LeftOut | None = None,
    apart: Iterable[Path] = (),
) -> Iterator[Unit]:
    """All units in reading order. A unit is consecutive pieces of one source, of about `shard_bytes` together.

    `left_out` and `apart` are passed to `sources.files`. Raises ConfigError for a source that names no file.
    """
    found = files(sources, left_out, apart)
    if shard_bytes is None:
        total = sum(file.size for file in found)
        shard_bytes = min(max(total // SHARDS, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    pieces: list[Piece] = []
    number = filled = 0
    for piece in (piece for file in found for piece in split(file, sources[file.source], shard_bytes)):
        # The size of a shard of a stream is unknown before it is read, so each is a unit.
        full = filled >= shard_bytes or len(pieces) == MAX_UNIT_PIECES or sources[piece.source].streaming
        if pieces and (full or pieces[0].source != piece.source):
            yield Unit(pieces[0].source, pieces, number)
            pieces, filled, number = [], 0, number + 1
        pieces.append(piece)
        filled += piece.size
    if pieces:
        yield Unit(pieces[0].source, pieces, number)


def write_plan(path: Path, planned: Iterable[Unit], header: Mapping[str, Any]) -> str:
    """Write the plan. Returns the hash of its units."""
    whole = xxhash.xxh3_128()
    with writing(path, temporary=unsealed(path)) as stream:
        stream.write(orjson.dumps(header) + b"\n")
        for unit in planned:
            line = orjson.dumps([_stored(piece) for piece in unit.pieces]) + b"\n"
            whole.update(line)
            stream.write(line)
    return whole.hexdigest()


class Plan:
    """A written plan. It keeps only the positions and sizes of the units in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets, self.sizes = array("q"), array("q")
        with path.open("rb") as stream:
            self.header: dict[str, Any] = orjson.loads(stream.readline())
            self._offsets.append(stream.tell())
            for line in stream:
                self._offsets.append(self._offsets[-1] + len(line))
                self.sizes.append(sum(piece.size for piece in _pieces(line)))

    def __len__(self) -> int:
        return len(self.sizes)

    def unit(self, number: int) -> Unit:
        """Read one unit."""
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[number])
            pieces = _pieces(stream.read(self._offsets[number + 1] - self._offsets[number]))
        return Unit(pieces[0].source, pieces, number)


def check_unchanged(piece: Piece) -> None:
    """Raise ConfigError if the file of a piece has changed since it was planned."""
    if piece.file_size < 0:
        return
    try:
        size, modified = stat(piece.path)
    except OSError as error:
        raise ConfigError(f"sources.{piece.source}: {piece.path} cannot be read: {error.strerror}") from error
    if (size, modified) != (piece.file_size, piece.modified):
        raise ConfigError(
            f"sources.{piece.source}: {piece.path} was changed while it was read; when it no longer changes, run the "
            f"same command again"
        )


def share(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """The tasks of each worker, balanced by size. The largest goes first, each to the worker with the least work."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [(0, worker) for worker in range(workers)]
    for task in sorted(range(len(sizes)), key=lambda task: (-sizes[task], task)):
        load, worker = heapq.heappop(loads)
        shares[worker].append(task)
        heapq.heappush(loads, (load + max(1, sizes[task]), worker))
    return [sorted(tasks) for tasks in shares]


def _stored(piece: Piece) -> tuple[Any, ...]:
    """The values of a piece. A path that is not UTF-8 becomes a list of its bytes."""
    path: Any = piece.path
    try:
        path.encode()
    except UnicodeEncodeError:
        path = list(os.fsencode(path))
    return dataclasses.astuple(dataclasses.replace(piece, path=path))


def _pieces(line: bytes) -> list[Piece]:
    pieces = [Piece(*values) for values in orjson.loads(line)]
    for i, piece in enumerate(pieces):
        if isinstance(piece.path, list):
            pieces[i] = dataclasses.replace(piece, path=os.fsdecode(bytes(piece.path)))
    return pieces
