"""Hugging Face data sets as sources: on disk, downloaded from the hub, or streamed from it.

A stored data set is cut into ranges of rows, a streamed one into the shards it is published in.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.config import SourceConfig
from data_pipeline.document import EMPTY, NOT_TEXT, NOT_UTF8, TOO_LONG, Hasher, Piece, Record
from ponder_scale.errors import ConfigError

_ROWS_READ_TOGETHER = 64


def pieces(source: str, config: SourceConfig) -> list[Piece]:
    """The data set as one piece of all its rows, or a piece for each shard of a stream.

    Raises ConfigError when it cannot be loaded and when it has no such column.
    """
    content = _load(source, config)
    columns = content.column_names or []  # a stream may not know them before it is read
    if columns and config.field not in columns:
        raise ConfigError(
            f"sources.{source}.field is {config.field!r}; the columns of {config.path} are: {', '.join(columns)}"
        )
    if config.streaming:
        return [_piece(source, config, i, i + 1, 0) for i in range(content.num_shards)]
    return [_piece(source, config, 0, len(content), max(len(content), content.data.nbytes))]


def split(whole: Piece, size: int) -> Iterator[Piece]:
    """Ranges of rows of about `size` bytes; a shard of a stream stays whole."""
    rows = whole.end - whole.begin
    count = max(1, min(rows, whole.size // size))
    for i in range(count):
        begin, end = whole.begin + rows * i // count, whole.begin + rows * (i + 1) // count
        yield Piece(whole.source, whole.path, whole.name, begin, end, whole.size // count, -1, 0)


def read(piece: Piece, config: SourceConfig, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    """The rows of a piece as records; their size is that of the text in UTF-8. `hasher` is fed all texts."""
    content = _load(piece.source, config)
    if config.streaming:
        content, first = content.shard(num_shards=content.num_shards, index=piece.begin), 0
    else:
        content, first = content.select(range(piece.begin, piece.end)), piece.begin
    number = first
    rows = content.select_columns([config.field]).with_format("arrow")
    for table in rows.iter(batch_size=_ROWS_READ_TOGETHER):
        for value in table.column(config.field):
            if hasattr(value, "as_buffer") and value.is_valid:  # text, and not a number or a list
                hasher.update(memoryview(value.as_buffer()))
            yield record(number, value, max_bytes)
            number += 1


def record(number: int, value: Any, max_bytes: int) -> Record:
    """Row `number` as a record, from the Arrow scalar of its column."""
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return Record(number, 0, None, NOT_UTF8)
    if not isinstance(text, str):
        return Record(number, 0, None, NOT_TEXT)
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size > max_bytes:
        return Record(number, size, None, TOO_LONG)
    return Record(number, size, None, EMPTY) if not text or text.isspace() else Record(number, size, text, "")


def _piece(source: str, config: SourceConfig, begin: int, end: int, size: int) -> Piece:
    name = "/".join(filter(None, [config.path, config.name, config.split, config.revision]))
    return Piece(source, config.path, name, begin, end, size, -1, 0)


@lru_cache(maxsize=8)
def _open(path: str, name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if Path(path, "state.json").is_file():
        return datasets.load_from_disk(path)
    if Path(path, "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)[split]
    return datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming)


def _load(source: str, config: SourceConfig) -> Any:
    try:
        return _open(config.path, config.name, config.split, config.revision, config.streaming)
    except Exception as error:  # the library raises whatever its loaders do
        raise ConfigError(
            f"sources.{source}: data set {config.path}, split {config.split}, cannot be loaded: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
