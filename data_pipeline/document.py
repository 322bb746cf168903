"""The values that flow through a build: where records lie, and what each of them turned out to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

EMPTY = "empty"  # nothing but white space: dropped and counted, but not the input's fault
BEHIND = "behind the cap"  # of its source: neither is this
NO_LABEL = "nothing in it counts in the loss"  # neither is this
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
LONG_LINE = "line with more beside its text than is read"  # 1 MiB and 4 times max_document_bytes in all
DAMAGED = "compressed data is damaged or cut off"

BAD = (  # the input is at fault
    *(NOT_UTF8, NOT_PLAIN, NOT_JSON, NOT_A_NUMBER, SURROGATE, DEEP, NOT_AN_OBJECT, NO_FIELD, NOT_TEXT),
    *(BAD_SPANS, BAD_MESSAGES, TOO_LONG, LONG_LINE, DAMAGED),
)

Spans = tuple[tuple[int, int], ...]  # (begin, end) of characters of a text, ascending and apart from each other


class Record(NamedTuple):
    """One record of an input: a document, or the reason why it is none."""

    offset: int  # of its first byte in the file, decompressed; of a parquet file or data set, its row
    size: int  # bytes of input that it took
    text: str | None
    reason: str  # "" where there is a text
    counts: Spans | None = None  # the characters that count in the loss; None: all
    url: str | None = None  # of the document, where a filter asks for it


class Hasher(Protocol):
    """What is fed the stored bytes of a piece, such as xxhash.xxh3_128."""

    def update(self, content: bytes | memoryview, /) -> None:
        """Take the next bytes."""


class Meter:
    """A hasher that only counts the bytes that a reader takes; of compressed files those are not the records'."""

    def __init__(self) -> None:
        self.bytes = 0

    def update(self, content: bytes | memoryview, /) -> None:
        """Take the next bytes."""
        self.bytes += len(content)


@dataclass(frozen=True)
class Piece:
    """A part of one input that is read on its own."""

    source: str
    path: str
    name: str  # in reports
    begin: int  # bytes of a plain file, row groups of a parquet file, rows or shards of a data set; 0 of others
    end: int
    size: int  # bytes of input, for balance and progress
    file_size: int  # of the whole file, as planned; -1 where it is no file
    modified: int  # nanoseconds; of a data set, its fingerprint


@dataclass(frozen=True)
class Unit:
    """The pieces, of one source, that one worker turns into one shard of each split."""

    source: str
    pieces: list[Piece]
    number: int  # in the plan

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)
