"""Read pieces of input as records. Each reader makes one pass in bounded memory, however long a line or a file is.

A record that is not a document is counted with its reason. A file that cannot be read at all ends the build.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

import orjson

from data_pipeline.config import SourceConfig
from data_pipeline.document import (
    DAMAGED,
    EMPTY,
    LONG_LINE,
    NO_FIELD,
    NOT_AN_OBJECT,
    NOT_PLAIN,
    NOT_TEXT,
    NOT_UTF8,
    TOO_LONG,
    Hasher,
    Piece,
    Record,
)
from data_pipeline.read import hub
from data_pipeline.read.badjson import REPAIRABLE, is_cut_at, is_packed, repaired, why_not
from data_pipeline.read.columns import values
from data_pipeline.read.compressed import CHUNK, Damaged, open_piece
from data_pipeline.read.counted import all_fields, fields_of, record_of
from data_pipeline.read.remote import open_file
from ponder_scale.errors import ConfigError

_BOM = b"\xef\xbb\xbf"
# a line may have this many times max_document_bytes for escapes, and this much for other fields
_JSON_BYTES, _OTHER_FIELDS = 4, 2**20


def read(piece: Piece, config: SourceConfig, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    """The records of one piece. `hasher` receives every byte that affects them.

    A document of more than `max_bytes` bytes in UTF-8 becomes a bad record and is not held in memory.
    Raises ConfigError if the file cannot be read.
    """
    try:
        if config.kind == "dataset":
            yield from hub.read(piece, config, max_bytes, hasher)
        elif config.kind == "parquet":
            yield from _read_parquet(piece, config, max_bytes, hasher)
        elif config.kind == "jsonl":
            yield from _read_jsonl(piece, config, max_bytes, hasher)
        elif config.kind == "text" and config.document == "paragraph":
            yield from _read_paragraphs(piece, max_bytes, hasher)
        else:
            yield from _read_whole(piece, max_bytes, hasher)
    except OSError as error:
        raise ConfigError(f"sources.{piece.source}: {piece.path} cannot be read: {error.strerror or error}") from error


def _read_jsonl(piece: Piece, config: SourceConfig, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    field, plain, simple = config.field, "." not in config.field, config.loss is None
    limit = _JSON_BYTES * max_bytes + _OTHER_FIELDS
    with open_piece(piece, hasher) as stream:
        for offset, line, size, cut in _lines(stream, piece.begin, limit):
            if size < 0:
                yield Record(offset, 0, None, DAMAGED)
                continue
            if cut:
                too_long = any(is_cut_at(line, name) for name in fields_of(config))
                yield Record(offset, size, None, TOO_LONG if too_long else LONG_LINE)
                continue
            if not simple:
                yield _any_line(offset, line, size, config, max_bytes)
                continue
            try:
                value = orjson.loads(line)
                text = value[field] if plain else _at(value, field)
            except (orjson.JSONDecodeError, KeyError, TypeError):
                yield _any_line(offset, line, size, config, max_bytes)
                continue
            record = _record(offset, size, text, max_bytes)
            yield record if config.url_field is None else record._replace(url=_url(value, config.url_field))


def _any_line(offset: int, line: bytes, size: int, config: SourceConfig, max_bytes: int) -> Record:
    """Parse any line, also one that is blank, bad or nested, has several fields, or begins with a byte order mark."""
    if not line or line.isspace():
        return Record(offset, size, None, EMPTY)
    try:
        value = orjson.loads(line.removeprefix(_BOM))
    except orjson.JSONDecodeError:
        reason = why_not(line)
        if not config.repair or reason not in REPAIRABLE:
            return Record(offset, size, None, reason)
        value = repaired(line)
    if not isinstance(value, dict):
        return Record(offset, size, None, NOT_AN_OBJECT)
    if config.loss is not None:
        record = record_of(offset, size, lambda field: _at(value, field), config, max_bytes)
    else:
        try:
            record = _record(offset, size, _at(value, config.field), max_bytes)
        except KeyError:
            return Record(offset, size, None, NO_FIELD)
    return record if config.url_field is None else record._replace(url=_url(value, config.url_field))


def _at(value: Any, field: str) -> Any:
    """The value of a field, by its own key or, as in `data.text`, by the keys of nested objects. Raises KeyError."""
    if isinstance(value, dict):
        if field in value:
            return value[field]
        for end in (i for i, character in enumerate(field) if character == "."):
            with suppress(KeyError):
                return _at(value.get(field[:end]), field[end + 1 :])
    raise KeyError(field)


def _url(value: Any, field: str) -> str | None:
    try:
        found = _at(value, field)
    except KeyError:
        return None
    return found if isinstance(found, str) and found.strip() else None


def _read_paragraphs(piece: Piece, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    """Blocks of lines that are not blank. The blank lines between blocks belong to none."""
    begin, block, size, long = piece.begin, bytearray(), 0, False

    def record() -> Record:
        return Record(begin, size, None, TOO_LONG) if long else _text(begin, bytes(block), max_bytes)

    with open_piece(piece, hasher) as stream:
        for offset, line, line_size, cut in _lines(stream, piece.begin, max_bytes):
            if line_size < 0:
                if size and not cut:
                    yield record()
                yield Record(offset, 0, None, DAMAGED)
                return
            if not cut and not line.strip():
                if size:
                    yield record()
                begin, size, long = offset + line_size, 0, False
                block.clear()
                continue
            size += line_size
            long = long or cut or size > max_bytes
            if long:
                block.clear()
            else:
                block += line if len(line) == line_size else line + b"\n"
        if size:
            yield record()


def _read_whole(piece: Piece, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    with open_piece(piece, hasher) as stream:
        content, size = bytearray(), 0
        try:
            while chunk := stream.read(CHUNK):
                size += len(chunk)
                content += chunk[: max(0, max_bytes + len(_BOM) + 1 - len(content))]
        except Damaged as error:
            if error.whole:
                yield _text(0, bytes(content), max_bytes, size)
            yield Record(0, 0, None, DAMAGED)
            return
    yield _text(0, bytes(content), max_bytes, size)


def _read_parquet(piece: Piece, config: SourceConfig, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    from pyarrow import ArrowException

    fields = all_fields(config)
    try:
        with open_file(piece.path) as stream, _parquet(stream) as file:
            number = sum(file.metadata.row_group(i).num_rows for i in range(piece.begin))
            groups = list(range(piece.begin, piece.end))
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=fields, use_threads=False):
                columns = {field: values(batch, field) for field in fields}
                for record in hub.records(number, columns, config, max_bytes):
                    yield record
                    number += 1
            for field in fields:  # last, so that reading only some rows does not pay for it
                _hash_column(piece, file.metadata, field, hasher)
    except ArrowException as error:
        raise ConfigError(
            f"sources.{piece.source}: {piece.path} cannot be read: {str(error).splitlines()[0]}"
        ) from error


def _parquet(stream: IO[bytes]) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK, page_checksum_verification=True)


def _hash_column(piece: Piece, metadata: Any, field: str, hasher: Hasher) -> None:
    """Give `hasher` the stored bytes of one column in the row groups of a piece."""
    with open_file(piece.path) as stream:
        for group in (metadata.row_group(i) for i in range(piece.begin, piece.end)):
            for column in (group.column(i) for i in range(group.num_columns)):
                if f"{column.path_in_schema}.".startswith(f"{field}."):
                    begin = column.dictionary_page_offset or column.data_page_offset
                    stream.seek(begin)
                    left = column.total_compressed_size
                    while left and (chunk := stream.read(min(left, CHUNK))):
                        hasher.update(chunk)
                        left -= len(chunk)


def _lines(stream: IO[bytes], offset: int, limit: int) -> Iterator[tuple[int, bytes, int, bool]]:
    """Yield (offset, line without its end, bytes that it took, whether it was cut) for each line.

    A line longer than `limit` bytes is cut to that. If compressed data is damaged, the last item after all whole lines
    is (offset, b"", -1, whether a line was lost).
    """
    tail, begin, skipped = b"", offset, 0  # of the line that is not complete yet
    damage: Damaged | None = None
    while True:
        try:
            chunk = stream.read(CHUNK)
        except Damaged as error:
            chunk, damage = b"", error
        if not chunk:
            break
        first, newline, rest = chunk.partition(b"\n")
        tail, skipped = _begun(tail, first, skipped, limit)
        if not newline:
            continue
        size = len(tail) + skipped + 1
        yield begin, tail, size, skipped > 0
        begin += size
        *lines, rest = rest.split(b"\n")
        for line in lines:
            size = len(line) + 1
            yield begin, line[:limit], size, size > limit + 1
            begin += size
        tail, skipped = _begun(b"", rest, 0, limit)
    size = len(tail) + skipped
    if size and (damage is None or damage.whole):
        yield begin, tail, size, skipped > 0
        begin += size
    if damage is not None:
        yield begin, b"", -1, not damage.whole


def _begun(tail: bytes, more: bytes, skipped: int, limit: int) -> tuple[bytes, int]:
    """Extend the beginning of a line. Returns at most `limit` bytes of it, and the number of bytes dropped."""
    kept = tail + more if len(tail) + len(more) <= limit else tail + more[: limit - len(tail)]
    return kept, skipped + len(tail) + len(more) - len(kept)


def _record(offset: int, size: int, text: Any, max_bytes: int) -> Record:
    if type(text) is not str:
        return Record(offset, size, None, NOT_TEXT)
    # A character takes at most four bytes, so short texts need no count.
    if len(text) * 4 > max_bytes and len(text.encode()) > max_bytes:
        return Record(offset, size, None, TOO_LONG)
    return Record(offset, size, None, EMPTY) if not text or text.isspace() else Record(offset, size, text, "")


def _text(offset: int, content: bytes, max_bytes: int, size: int | None = None) -> Record:
    size = len(content) if size is None else size
    if size > max_bytes + len(_BOM) or len(content.removeprefix(_BOM)) > max_bytes:
        return Record(offset, size, None, TOO_LONG)
    text = _decode(content)
    if text is None:
        return Record(offset, size, None, NOT_PLAIN if is_packed(content) else NOT_UTF8)
    return _record(offset, size, text, max_bytes)


def _decode(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
