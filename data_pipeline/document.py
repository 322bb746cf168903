"""The values that flow through a build: places of records in the input, and the result of reading each record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

EMPTY = "empty"  # only white space: dropped and counted, but not an error in the input
BEHIND = "behind the cap"  # after the cap of its source, not an error in the input
NO_LABEL = "nothing in it counts in the loss"  # not an error in the input
NOT_UTF8 = "not UTF-8"
NOT_PLAIN = "compressed or packed under a name that does not say so"
NOT_JSON = "malformed JSON"
NOT_A_NUMBER = "NaN or an infinite number, which JSON has not"
SURROGATE = "lone surrogate in a string"
DEEP = "JSON nested too deeply"
NOT_AN_OBJECT = "not a JSON object"
NO_FIELD = "field missing"
NOT_TEXT = "field is not a string"
BAD_SPANS = "spans are not pairs of places in the text"
BAD_MESSAGES = "messages are no conversation that the chat template takes"
TOO_LONG = "longer than max_document_bytes"
LONG_LINE = "line with more beside its text than is read"  # limit: 1 MiB plus 4 times max_document_bytes in all
DAMAGED = "compressed data is damaged or cut off"

BAD = (  # reasons that mean an error in the input
    *(NOT_UTF8, NOT_PLAIN, NOT_JSON, NOT_A_NUMBER, SURROGATE, DEEP, NOT_AN_OBJECT, NO_FIELD, NOT_TEXT),
    *(BAD_SPANS, BAD_MESSAGES, TOO_LONG, LONG_LINE, DAMAGED),
)

Spans = tuple[tuple[int, int], ...]  # (begin, end) of characters of a text, ascending and without overlaps


class Record(NamedTuple):
    """One record of an input: a document, or the reason why it is not one."""

    offset: int  # of its first byte in the decompressed file; for a parquet file or data set, its row
    size: int  # bytes of input that the record took
    text: str | None
    reason: str  # "" if there is a text
    counts: Spans | None = None  # the characters that count in the loss; None if all do
    url: str | None = None  # of the document, if a filter needs it


class Hasher(Protocol):
    """Receives the stored bytes of a piece, as xxhash.xxh3_128 does."""

    def update(self, content: bytes | memoryview, /) -> None:
        """Add the next bytes."""


class Meter:
    """A hasher that only counts the bytes that a reader takes. For compressed files these are compressed bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def update(self, content: bytes | memoryview, /) -> None:
        """Add the next bytes."""
        self.bytes += len(content)


@dataclass(frozen=True)
class Piece:
    """A part of one input that is read on its own."""

    source: str
    path: str
    name: str  # name in reports
    begin: int  # in bytes of a plain file, row groups of a parquet file, rows or shards of a data set; 0 for others
    end: int
    size: int  # bytes of input, to balance work and show progress
    file_size: int  # of the whole file when it was planned; -1 if it is not a file
    modified: int  # time in nanoseconds; for a data set, its fingerprint


@dataclass(frozen=True)
class Unit:
    """Pieces of one source that one worker turns into one shard of each split."""

    source: str
    pieces: list[Piece]
    number: int  # number in the plan

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)
