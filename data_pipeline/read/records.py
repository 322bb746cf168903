"""Read the records of a whole unit, piece after piece, and track how far the reading is."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from data_pipeline.config import SourceConfig
from data_pipeline.document import Meter, Piece, Record, Unit
from data_pipeline.read.compressed import suffix_of
from data_pipeline.read.readers import read
from data_pipeline.read.units import check_unchanged


class Records:
    """Iterates once over the (piece, record) pairs of a unit.

    Raises ConfigError for a file that cannot be read or has changed since it was planned.
    """

    def __init__(self, unit: Unit, source: SourceConfig, max_document_bytes: int) -> None:
        self._unit, self._source, self._max_bytes = unit, source, max_document_bytes
        self._consumed, self._ended = 0, False
        self.inputs: list[tuple[Piece, str]] = []  # pieces read to their end, with the xxh3-128 of their bytes

    @property
    def consumed(self) -> int:
        """Bytes of input that the records so far took. After the last record this is the size of the unit."""
        return self._unit.size if self._ended else min(self._consumed, self._unit.size)

    def __iter__(self) -> Iterator[tuple[Piece, Record]]:
        done = 0
        for piece in self._unit.pieces:
            stored, compressed = _Stored(), bool(suffix_of(piece.path))
            for record in read(piece, self._source, self._max_bytes, stored):
                # In a compressed file, a record is larger than the bytes that it takes there.
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
        """Add the next bytes."""
        super().update(content)
        self._hash.update(content)

    def hexdigest(self) -> str:
        """The hash of all bytes."""
        return self._hash.hexdigest()
