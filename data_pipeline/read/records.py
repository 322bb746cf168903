"""The records of a whole unit, piece after piece, and how far the reading is."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from data_pipeline.config import SourceConfig
from data_pipeline.document import Meter, Piece, Record, Unit
from data_pipeline.read.compressed import suffix_of
from data_pipeline.read.readers import read
from data_pipeline.read.units import check_unchanged


class Records:
    """Iterates over (piece, record) of a unit, once.

    Raises ConfigError for a file that cannot be read, and for one that is not any more the one that was planned.
    """

    def __init__(self, unit: Unit, source: SourceConfig, max_document_bytes: int) -> None:
        self._unit, self._source, self._max_bytes = unit, source, max_document_bytes
        self._consumed, self._ended = 0, False
        self.inputs: list[tuple[Piece, str]] = []  # what was read to its end, with the xxh3-128 of its bytes

    @property
    def consumed(self) -> int:
        """Bytes of input that the records so far took; behind the last one, all of the unit's."""
        return self._unit.size if self._ended else min(self._consumed, self._unit.size)

    def __iter__(self) -> Iterator[tuple[Piece, Record]]:
        done = 0
        for piece in self._unit.pieces:
            stored, compressed = _Stored(), bool(suffix_of(piece.path))
            for record in read(piece, self._source, self._max_bytes, stored):
                # of compressed files, records are larger than what they take there
                self._consumed = done + stored.bytes if compressed else self._consumed + record.size
                yield piece, record
            check_unchanged(piece)
            self.inputs.append((piece, stored.hexdigest()))
            done += piece.size
        self._ended = True


class _Stored(Meter):
    """The hash and the number of the stored bytes that were read."""

    def __init__(self) -> None:
        super().__init__()
        self._hash = xxhash.xxh3_128()

    def update(self, content: bytes | memoryview, /) -> None:
        """Take the next bytes."""
        super().update(content)
        self._hash.update(content)

    def hexdigest(self) -> str:
        """The hash of all."""
        return self._hash.hexdigest()
