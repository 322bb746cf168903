"""Pieces of input to records. Every reader is one pass in bounded memory, however long a line or a file is.

A record that yields no document is a counted reason, never silence; a file that cannot be read at all ends the
build.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from data_pipeline import hub
from data_pipeline.config import SourceConfig
from data_pipeline.document import (
    DAMAGED,
    EMPTY,
    NO_FIELD,
    NOT_AN_OBJECT,
    NOT_JSON,
    NOT_TEXT,
    NOT_UTF8,
    TOO_LONG,
    Hasher,
    Piece,
    Record,
)
from ponder_scale.errors import ConfigError

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**17  # read at once; larger ones cost more, as each is new memory from the kernel
_JSON_BYTES, _OTHER_FIELDS = 4, 2**20  # a line may be so many times max_document_bytes, for escapes and other fields


class _Damaged(Exception):
    """Compressed data that ends too early or makes no sense."""


def read(piece: Piece, config: SourceConfig, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    """The records of one piece; `hasher` is fed every byte of it that decides them.

    Documents of more than `max_bytes` bytes in UTF-8 become bad records without being held in memory.
    Raises ConfigError when the file cannot be read.
    """
    try:
        if config.kind == "dataset":
            yield from hub.read(piece, config, max_bytes, hasher)
        elif config.kind == "parquet":
            yield from _read_parquet(piece, config.field, max_bytes, hasher)
        elif config.kind == "jsonl":
            yield from _read_jsonl(piece, config.field, max_bytes, hasher)
        elif config.kind == "text" and config.document == "paragraph":
            yield from _read_paragraphs(piece, max_bytes, hasher)
        else:
            yield from _read_whole(piece, max_bytes, hasher)
    except OSError as error:
        raise ConfigError(f"sources.{piece.source}: {piece.path} cannot be read: {error.strerror or error}") from error


def _read_jsonl(piece: Piece, field: str, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    limit = _JSON_BYTES * max_bytes + _OTHER_FIELDS
    with _open(piece, hasher) as stream:
        for offset, line, size in _lines(stream, piece.begin, limit):
            if line is None:
                yield Record(offset, size, None, DAMAGED if size < 0 else TOO_LONG)
                continue
            try:
                text = orjson.loads(line)[field]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                yield _unusual_line(offset, line, size, field, max_bytes)
                continue
            yield _record(offset, size, text, max_bytes)


def _unusual_line(offset: int, line: bytes, size: int, field: str, max_bytes: int) -> Record:
    """What a line is that does not simply hold the field: blank, begun by a byte order mark, or bad."""
    if not line or line.isspace():
        return Record(offset, size, None, EMPTY)
    try:
        value = orjson.loads(line.removeprefix(_BOM))
    except orjson.JSONDecodeError:
        return Record(offset, size, None, NOT_JSON if _decode(line) is not None else NOT_UTF8)
    if not isinstance(value, dict):
        return Record(offset, size, None, NOT_AN_OBJECT)
    return _record(offset, size, value[field], max_bytes) if field in value else Record(offset, size, None, NO_FIELD)


def _read_paragraphs(piece: Piece, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    """Blocks of lines with something on them; the blank lines between belong to none."""
    begin, block, size, long = piece.begin, bytearray(), 0, False
    with _open(piece, hasher) as stream:
        for offset, line, line_size in _lines(stream, piece.begin, max_bytes):
            if line_size < 0:
                yield Record(offset, 0, None, DAMAGED)
                return  # nothing follows, and of the block that was begun the rest is lost
            if line is not None and not line.strip():
                if size:
                    yield Record(begin, size, None, TOO_LONG) if long else _text(begin, bytes(block), max_bytes)
                begin, size, long = offset + line_size, 0, False
                block.clear()
                continue
            size += line_size
            long = long or line is None or size > max_bytes
            if long or line is None:
                block.clear()
            else:
                block += line if len(line) == line_size else line + b"\n"
        if size:
            yield Record(begin, size, None, TOO_LONG) if long else _text(begin, bytes(block), max_bytes)


def _read_whole(piece: Piece, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    with _open(piece, hasher) as stream:
        content, size = bytearray(), 0
        try:
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                content += chunk[: max(0, max_bytes + len(_BOM) + 1 - len(content))]
        except _Damaged:
            yield Record(0, 0, None, DAMAGED)
            return
    yield _text(0, bytes(content), max_bytes, size)


def _read_parquet(piece: Piece, field: str, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(piece.path, pre_buffer=False, buffer_size=_CHUNK) as file:
            number = sum(file.metadata.row_group(i).num_rows for i in range(piece.begin))
            groups = list(range(piece.begin, piece.end))
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=[field], use_threads=False):
                for value in batch.column(0):
                    yield hub.record(number, value, max_bytes)
                    number += 1
            _hash_column(piece, file.metadata, field, hasher)  # last: who wants some rows pays for no more
    except ArrowException as error:
        raise ConfigError(
            f"sources.{piece.source}: {piece.path} cannot be read: {str(error).splitlines()[0]}"
        ) from error


def _hash_column(piece: Piece, metadata: Any, field: str, hasher: Hasher) -> None:
    """Feed `hasher` the stored bytes of one column in the row groups of a piece."""
    with Path(piece.path).open("rb") as stream:
        for group in (metadata.row_group(i) for i in range(piece.begin, piece.end)):
            for column in (group.column(i) for i in range(group.num_columns)):
                if column.path_in_schema.partition(".")[0] == field:
                    begin = column.dictionary_page_offset or column.data_page_offset
                    stream.seek(begin)
                    left = column.total_compressed_size
                    while left and (chunk := stream.read(min(left, _CHUNK))):
                        hasher.update(chunk)
                        left -= len(chunk)


def _lines(stream: IO[bytes], offset: int, limit: int) -> Iterator[tuple[int, bytes | None, int]]:
    """(offset, line without its end, bytes it took): (offset, None, bytes) for a line of more than `limit` bytes,
    (offset, None, -1) where compressed data is damaged."""
    tail, begin, skipped = b"", offset, 0  # of the line that is not complete yet
    while True:
        try:
            chunk = stream.read(_CHUNK)
        except _Damaged:
            yield begin, None, -1
            return
        if not chunk:
            break
        first, newline, rest = chunk.partition(b"\n")
        if not newline:
            tail, skipped = (tail + chunk, skipped) if not skipped else (b"", skipped + len(chunk))
            if len(tail) > limit:
                tail, skipped = b"", len(tail)
            continue
        size = skipped + len(tail) + len(first) + 1
        yield begin, (None if skipped or size > limit + 1 else tail + first), size
        begin, skipped = begin + size, 0
        *lines, tail = rest.split(b"\n")
        for line in lines:
            size = len(line) + 1
            yield begin, (line if size <= limit + 1 else None), size
            begin += size
    if tail or skipped:
        size = skipped + len(tail)
        yield begin, (tail if size <= limit else None), size


def _record(offset: int, size: int, text: Any, max_bytes: int) -> Record:
    if type(text) is not str:
        return Record(offset, size, None, NOT_TEXT)
    # No character takes more than four bytes, so short texts need no count.
    if len(text) * 4 > max_bytes and len(text.encode()) > max_bytes:
        return Record(offset, size, None, TOO_LONG)
    return Record(offset, size, None, EMPTY) if not text or text.isspace() else Record(offset, size, text, "")


def _text(offset: int, content: bytes, max_bytes: int, size: int | None = None) -> Record:
    size = len(content) if size is None else size
    if size > max_bytes + len(_BOM) or len(content.removeprefix(_BOM)) > max_bytes:
        return Record(offset, size, None, TOO_LONG)
    text = _decode(content)
    return Record(offset, size, None, NOT_UTF8) if text is None else _record(offset, size, text, max_bytes)


def _decode(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _open(piece: Piece, hasher: Hasher) -> IO[bytes]:
    """The bytes of a piece, decompressed; `hasher` is fed them as they are stored."""
    stored = _Hashed(piece, hasher)
    if piece.path.endswith(".gz"):
        from isal import igzip

        return _Guarded(igzip.IGzipFile(fileobj=stored, mode="rb"), stored)  # type: ignore[return-value]
    if piece.path.endswith(".zst"):
        import pyarrow

        return _Guarded(pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, "r"), "zstd"), stored)  # type: ignore[return-value]
    return stored  # type: ignore[return-value]


class _Hashed(io.RawIOBase):
    """Bytes [begin, end) of a file, hashed as they are read."""

    def __init__(self, piece: Piece, hasher: Hasher) -> None:
        self._stream = Path(piece.path).open("rb", buffering=0)  # noqa: SIM115 - closed by close
        self._stream.seek(piece.begin)
        self._left = piece.end - piece.begin
        self._hasher = hasher

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the file; the bytes read."""
        view = memoryview(buffer)[: self._left]
        count = self._stream.readinto(view) or 0
        self._hasher.update(view[:count])
        self._left -= count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Guarded:
    """A decompressing stream whose many kinds of errors are one."""

    def __init__(self, stream: Any, stored: _Hashed) -> None:
        self._stream, self._stored = stream, stored

    def __enter__(self) -> _Guarded:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        while kind is None and self._stored.read(_CHUNK):
            pass  # what is left behind damage is part of the hash too
        self._stored.close()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        try:
            content: bytes = self._stream.read(size)
            return content
        except (OSError, EOFError, zlib.error) as error:
            if getattr(error, "errno", None) is not None:  # the disk's error, not the decompressor's
                raise
            raise _Damaged from error
