"""Read Hugging Face data sets that are on disk, downloaded from the hub, or streamed from it.

A stored data set is cut into ranges of rows. A streamed one is cut into the shards in which it was published.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.config import SourceConfig
from data_pipeline.document import EMPTY, NOT_TEXT, NOT_UTF8, TOO_LONG, Hasher, Piece, Record
from data_pipeline.read.columns import names_of, place_of, values
from data_pipeline.read.counted import all_fields, check_fields, record_of
from ponder_scale.errors import ConfigError

_ROWS_READ_TOGETHER = 64


def pieces(source: str, path: str, config: SourceConfig) -> list[Piece]:
    """The data set `path` as one piece with all its rows, or as one piece for each shard of a stream.

    Raises ConfigError if it cannot be loaded or lacks a column.
    """
    _open.cache_clear()  # the data set may have changed since
    _files_of_stream.cache_clear()
    if config.streaming and _saved(path, config):
        raise ConfigError(f"sources.{source}.streaming is true, but {path} is stored already; set it to false")
    content = _load(source, path, config)
    columns = content.column_names or []  # a stream may not know its columns before it is read
    if content.features is not None:
        columns = names_of(content.features.arrow_schema)
    if columns:
        check_fields(source, config, columns, path)
    seal = _fingerprint(source, path, config, content)
    if config.streaming:
        return [_piece(source, path, config, i, i + 1, 0, seal) for i in range(content.num_shards)]
    return [_piece(source, path, config, 0, len(content), max(len(content), content.data.nbytes), seal)]


def split(whole: Piece, size: int) -> Iterator[Piece]:
    """Ranges of rows of about `size` bytes. A shard of a stream stays whole."""
    rows = whole.end - whole.begin
    count = max(1, min(rows, whole.size // size))
    for i in range(count):
        begin, end = whole.begin + rows * i // count, whole.begin + rows * (i + 1) // count
        yield Piece(whole.source, whole.path, whole.name, begin, end, whole.size // count, -1, whole.modified)


def read(piece: Piece, config: SourceConfig, max_bytes: int, hasher: Hasher) -> Iterator[Record]:
    """The rows of a piece as records, whose size is that of the text in UTF-8. `hasher` receives all texts.

    Raises ConfigError if the data set has changed since it was planned.
    """
    whole = _load(piece.source, piece.path, config)
    _check_unchanged(piece, config, whole)
    if config.streaming:
        content, first = whole.shard(num_shards=whole.num_shards, index=piece.begin), 0
    else:
        content, first = whole.select(range(piece.begin, piece.end)), piece.begin
    number = first
    fields = all_fields(config)
    for table in _of_fields(content, fields).with_format("arrow").iter(batch_size=_ROWS_READ_TOGETHER):
        check_fields(piece.source, config, names_of(table.schema), piece.path)
        columns = {field: values(table, field) for field in fields}
        for place, found in enumerate(records(number, columns, config, max_bytes)):
            for value in (column[place] for column in columns.values()):
                if hasattr(value, "as_buffer") and value.is_valid:  # text, not a number or a list
                    hasher.update(memoryview(value.as_buffer()))
                elif config.loss is not None:
                    hasher.update(repr(value.as_py()).encode("utf-8", "surrogatepass"))
            yield found
            number += 1
    _check_unchanged(piece, config, whole)


def _of_fields(content: Any, fields: list[str]) -> Any:
    """The rows with only the requested columns, if the columns are known before rows are read."""
    if content.features is None:
        return content
    places = [place_of(content.features.arrow_schema, field) for field in fields]
    names = dict.fromkeys(place[0] for place in places if place)
    return content.select_columns(list(names)) if all(places) else content


def records(number: int, columns: Mapping[str, Any], config: SourceConfig, max_bytes: int) -> Iterator[Record]:
    """Yield the rows from number `number` on as records, from the Arrow columns of their fields."""
    urls = None if config.url_field is None else columns[config.url_field]
    for place, found in enumerate(_records(number, columns, config, max_bytes)):
        yield found if urls is None or found.text is None else found._replace(url=_url(urls[place]))


def _url(value: Any) -> str | None:
    try:
        url = value.as_py()
    except UnicodeDecodeError:
        return None
    return url if isinstance(url, str) and url.strip() else None


def _records(number: int, columns: Mapping[str, Any], config: SourceConfig, max_bytes: int) -> Iterator[Record]:
    """Like `records`, without URLs."""
    if config.loss is None:
        for value in columns[config.field]:
            yield _record(number, value, max_bytes)
            number += 1
    else:
        for cells in zip(*columns.values(), strict=True):
            row = dict(zip(columns, cells, strict=True))

            def value_of(field: str, row: dict[str, Any] = row) -> Any:
                return row[field].as_py()

            yield record_of(number, None, value_of, config, max_bytes)
            number += 1


def _record(number: int, value: Any, max_bytes: int) -> Record:
    """Row `number` as a record, from the Arrow scalar of its column."""
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return Record(number, 0, None, NOT_UTF8)
    if isinstance(text, bytes):  # some programs write text as bytes
        try:
            text = text.decode()
        except UnicodeDecodeError:
            return Record(number, len(text), None, NOT_UTF8)
    if not isinstance(text, str):
        return Record(number, 0, None, NOT_TEXT)
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size > max_bytes:
        return Record(number, size, None, TOO_LONG)
    return Record(number, size, None, EMPTY) if not text or text.isspace() else Record(number, size, text, "")


def _piece(source: str, path: str, config: SourceConfig, begin: int, end: int, size: int, seal: int) -> Piece:
    name = "/".join(filter(None, [path, config.name, config.split, config.revision]))
    return Piece(source, path, name, begin, end, size, -1, seal)


def _check_unchanged(piece: Piece, config: SourceConfig, content: Any) -> None:
    if _fingerprint(piece.source, piece.path, config, content) != piece.modified:
        raise ConfigError(
            f"sources.{piece.source}: data set {piece.name} was changed while it was read; build again with "
            f"overwrite=true"
        )


def _fingerprint(source: str, path: str, config: SourceConfig, content: Any) -> int:
    """63 bits that differ for different content with the same name, rows and bytes.

    - For a data set from save_to_disk: the library's fingerprint with the size and time of its files.
    - For one that the library has stored: the library's fingerprint, which depends on the original files.
    - For a stream: the names of its files, which contain the commit on the hub, and the library's data about each.
    """
    known: Any
    if (folder := _saved(path, config)) is not None:
        try:
            state = json.loads((folder / "state.json").read_bytes())
            stats = [(folder / file["filename"]).stat() for file in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"sources.{source}: data set {folder} cannot be read: {error}") from error
        known = [state, [[about.st_size, about.st_mtime_ns] for about in stats]]
    elif config.streaming:
        known = _files_of_stream(path, config.name, config.split, config.revision)
    else:
        known = content._fingerprint
    return xxhash.xxh3_64_intdigest(json.dumps(known, sort_keys=True, default=str).encode()) >> 1


def _saved(path: str, config: SourceConfig) -> Path | None:
    """The folder that save_to_disk wrote for a source; None if there is none."""
    for folder in (Path(path), Path(path, config.split)):
        if (folder / "state.json").is_file():
            return folder
    return None


@lru_cache(maxsize=8)
def _files_of_stream(path: str, name: str | None, split: str, revision: str | None) -> Any:
    import datasets

    files = datasets.load_dataset_builder(path, name, revision=revision).config.data_files or {}
    return {str(key): [list(of_split), getattr(of_split, "origin_metadata", None)] for key, of_split in files.items()}


@lru_cache(maxsize=8)
def _open(path: str, name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if Path(path, "state.json").is_file():
        return datasets.load_from_disk(path)
    if Path(path, "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)[split]
    return datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming)


def _load(source: str, path: str, config: SourceConfig) -> Any:
    try:
        return _open(path, config.name, config.split, config.revision, config.streaming)
    except Exception as error:  # the library passes on any error of its loaders
        raise ConfigError(
            f"sources.{source}: data set {path}, split {config.split}, cannot be loaded: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
