"""Which files a source names, and where each may be cut into pieces that are read apart from each other."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from data_pipeline import hub
from data_pipeline.config import SourceConfig
from data_pipeline.document import Piece
from ponder_scale.errors import ConfigError

COMPRESSED = (".gz", ".zst")
_SEARCH_BYTES = 2**20


def files(sources: Mapping[str, SourceConfig]) -> list[Piece]:
    """All files of all sources as pieces, in reading order, which depends on their names only.

    Raises ConfigError for a source that names no file.
    """
    found = []
    for source, config in sources.items():
        if config.kind == "dataset":
            found += hub.pieces(source, config)
            continue
        paths = _files_of_folder(source, config) if config.kind == "folder" else _files_of_glob(source, config)
        for path in paths:
            name = path.relative_to(config.path).as_posix() if config.kind == "folder" else str(path)
            about = path.stat()
            found.append(
                Piece(source, str(path), name, 0, about.st_size, about.st_size, about.st_size, about.st_mtime_ns)
            )
    return found


def split(file: Piece, config: SourceConfig, size: int) -> Iterator[Piece]:
    """Consecutive pieces of one file of about `size` bytes; every record is whole in one of them.

    A compressed file and a file that is one document stay whole.
    """
    if config.kind == "parquet":
        yield from _row_groups(file, config, size)
    elif config.kind == "dataset":
        yield from hub.split(file, size)
    elif config.kind == "jsonl" or (config.kind == "text" and config.document == "paragraph"):
        yield from [file] if file.path.endswith(COMPRESSED) else _byte_ranges(file, config.kind == "text", size)
    else:
        yield file


def _byte_ranges(file: Piece, paragraphs: bool, size: int) -> Iterator[Piece]:
    begin = 0
    with Path(file.path).open("rb") as stream:
        while begin < file.file_size:
            end = file.file_size
            if begin + size < end:
                end = _next_boundary(stream, begin + size, paragraphs)
            yield _part(file, begin, end, end - begin)
            begin = end


def _next_boundary(stream: IO[bytes], position: int, paragraphs: bool) -> int:
    """The first start of a line, or of what follows a blank line, after the byte before `position`."""
    stream.seek(position - 1)
    _skip_line(stream)
    while paragraphs:
        line = stream.readline(_SEARCH_BYTES)
        if not line or (line.endswith(b"\n") and not line.strip()):
            break
        if not line.endswith(b"\n"):
            _skip_line(stream)
    return stream.tell()


def _skip_line(stream: IO[bytes]) -> None:
    while (piece := stream.readline(_SEARCH_BYTES)) and not piece.endswith(b"\n"):
        pass


def _row_groups(file: Piece, config: SourceConfig, size: int) -> Iterator[Piece]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file.path) as content:
            names, groups = content.schema_arrow.names, content.metadata
            sizes = [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"sources.{file.source}: {file.path} is no parquet file that can be read: {reason}"
        ) from error
    if config.field not in names:
        raise ConfigError(
            f"sources.{file.source}.field is {config.field!r}; the columns of {file.path} are: {', '.join(names)}"
        )
    begin, start, filled, total = 0, 0, 0, max(1, sum(sizes))
    for group, group_size in enumerate(sizes, start=1):
        filled += group_size
        end = file.file_size * filled // total  # of the file, as sizes of groups are of decompressed data
        if end - start >= size or group == len(sizes):
            yield _part(file, begin, group, end - start)
            begin, start = group, end


def _part(file: Piece, begin: int, end: int, size: int) -> Piece:
    return Piece(file.source, file.path, file.name, begin, end, size, file.file_size, file.modified)


def _files_of_folder(source: str, config: SourceConfig) -> list[Path]:
    folder = Path(config.path)
    if not folder.is_dir():
        raise ConfigError(f"sources.{source}.path is {config.path}; no such folder")
    try:
        found = list(folder.glob(config.pattern))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"sources.{source}.pattern is {config.pattern!r}; expected a relative glob: {error}"
        ) from error
    paths = []
    for path in found:
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(fnmatch.fnmatch(part, name) for part in parts for name in config.exclude):
            paths.append(path)
    if not paths:
        raise ConfigError(f"sources.{source}.pattern is {config.pattern}; it matches no file in {config.path}")
    return sorted(paths)


def _files_of_glob(source: str, config: SourceConfig) -> list[Path]:
    path = Path(config.path)
    if path.is_file():
        return [path]
    root = Path(path.anchor)
    paths = sorted(found for found in root.glob(str(path.relative_to(root))) if found.is_file())
    if not paths:
        raise ConfigError(f"sources.{source}.path is {config.path}; no such file, and no file matches it as a glob")
    return paths
