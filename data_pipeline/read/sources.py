"""Which files a source names, and where each may be cut into pieces that are read apart from each other."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data_pipeline.config import SourceConfig, SourceKind
from data_pipeline.document import Piece
from data_pipeline.read import hub
from data_pipeline.read.compressed import COMPRESSED
from data_pipeline.read.counted import check_fields
from data_pipeline.read.walk import HIDDEN, Found, alternatives, is_glob, walk
from ponder_scale.errors import ConfigError
from ponder_scale.files.delete import shown

_SEARCH_BYTES = 2**20


class LeftOut:
    """What sources name and builds do not read, by source and reason: how many files, and the first of them."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = defaultdict(dict)
        self._first: dict[tuple[str, str], str] = {}

    def add(self, source: str, reason: str, paths: list[Path]) -> None:
        """Count some files."""
        self.counts[source][reason] = self.counts[source].get(reason, 0) + len(paths)
        self._first.setdefault((source, reason), shown(str(paths[0])))

    def __iter__(self) -> Iterator[str]:
        """A line for each source and reason."""
        return self.of()

    def of(self, only: str | None = None) -> Iterator[str]:
        """A line for each source and reason, or of one reason only."""
        for (source, reason), first in self._first.items():
            if only not in (None, reason):
                continue
            hint = "; a pattern that spells the dot reads them" if reason == HIDDEN else ""
            yield f"left out of {source}: {self.counts[source][reason]:,} {reason}, the first is {first}{hint}"


def files(
    sources: Mapping[str, SourceConfig], left_out: LeftOut | None = None, apart: Iterable[Path] = ()
) -> list[Piece]:
    """All files of all sources as pieces, in reading order, which depends on their names only.

    What is left out is counted in `left_out`; so are files in the folders `apart`, which have no links in their names.
    Raises ConfigError for a source that names no file.
    """
    found = []
    left_out = LeftOut() if left_out is None else left_out
    for source, config in sources.items():
        if config.kind == "dataset":
            found += hub.pieces(source, config)
            continue
        named = _files_of_folder(source, config) if config.kind == "folder" else _files_of_glob(source, config)
        own = [path for path in named.files if _is_in(path, apart)]
        paths = [path for path in named.files if path not in own] if own else named.files
        for reason, some in {**named.left_out, "files of this build": own}.items():
            if some:
                left_out.add(source, reason, some)
        if not paths:
            raise ConfigError(f"sources.{source}: all that {config.path} names is left out: {', '.join(left_out)}")
        for path in paths:
            name = path.relative_to(config.path).as_posix() if config.kind == "folder" else str(path)
            about = path.stat()
            size = about.st_size
            found.append(Piece(source, str(path), shown(name), 0, size, size, size, about.st_mtime_ns))
    return found


def kind_of(path: str) -> SourceKind:
    """What a file holds, by its name."""
    stem = Path(path).stem if path.endswith(COMPRESSED) else Path(path).name
    return "parquet" if stem.endswith(".parquet") else "jsonl" if stem.endswith(".jsonl") else "text"


def root(config: SourceConfig) -> Path | None:
    """The folder or file, without links, in which all inputs of a source lie; None for a data set of the hub."""
    path = Path(config.path)
    if config.kind == "dataset" and not path.exists():
        return None
    if config.kind not in ("dataset", "folder") and not path.exists():
        path = Path(os.path.commonpath([_cut(Path(one).absolute())[0] for one in alternatives(config.path)]))
    return path.resolve()


def _is_in(path: Path, folders: Iterable[Path]) -> bool:
    folders = list(folders)
    return bool(folders) and any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders)


def _cut(path: Path) -> tuple[Path, list[str]]:
    """(the folder before the first part with a wildcard, the parts from there on)."""
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if is_glob(part)), len(parts) - 1)
    return Path(*parts[:first]), list(parts[first:])


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
            names, groups = _columns(content.schema_arrow), content.metadata
            sizes = [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"sources.{file.source}: {file.path} is no parquet file that can be read: {reason}"
        ) from error
    check_fields(file.source, config, names, file.path)
    begin, start, filled, total = 0, 0, 0, max(1, sum(sizes))
    for group, group_size in enumerate(sizes, start=1):
        filled += group_size
        end = file.file_size * filled // total  # of the file, as sizes of groups are of decompressed data
        if end - start >= size or group == len(sizes):
            yield _part(file, begin, group, end - start)
            begin, start = group, end


def _columns(fields: Any, prefix: str = "") -> list[str]:
    """The names of columns, and of the fields in them: `data.text`."""
    from pyarrow.types import is_struct

    found = []
    for field in fields:
        found.append(prefix + field.name)
        if is_struct(field.type):
            found += _columns([field.type.field(i) for i in range(field.type.num_fields)], f"{prefix}{field.name}.")
    return found


def _part(file: Piece, begin: int, end: int, size: int) -> Piece:
    return Piece(file.source, file.path, file.name, begin, end, size, file.file_size, file.modified)


def _files_of_folder(source: str, config: SourceConfig) -> Found:
    folder = Path(config.path)
    if not folder.is_dir():
        what = "which is a file; kind=text reads it" if folder.is_file() else "no such folder"
        raise ConfigError(f"sources.{source}.path is {config.path}; {what}")
    pattern = Path(config.pattern)
    if pattern.is_absolute() or not pattern.parts:
        raise ConfigError(f"sources.{source}.pattern is {config.pattern!r}; expected a relative glob, such as **/*.py")
    patterns = [list(Path(one).parts) for one in alternatives(config.pattern)]
    each = [_walked(source, folder, parts, config.exclude) for parts in patterns]
    found = each[0]
    for more in each[1:]:
        left_out = {reason: found.left_out.get(reason, []) + paths for reason, paths in more.left_out.items()}
        found = Found(sorted({*found.files, *more.files}), {**found.left_out, **left_out})
    if not found.files and not found.left_out:
        raise ConfigError(f"sources.{source}.pattern is {config.pattern}; it matches no file in {config.path}")
    return found


def _files_of_glob(source: str, config: SourceConfig) -> Found:
    path = Path(config.path)
    if path.is_file():
        return Found([path], {})
    if path.is_dir():
        raise ConfigError(
            f"sources.{source}.path is {config.path}, which is a folder; name its files, such as "
            f"{path / '*'}.{config.kind if config.kind != 'text' else 'txt'}"
            + (", or set kind=folder" if config.kind == "text" else "")
        )
    files: dict[Path, None] = {}  # in order, each once
    left_out: dict[str, list[Path]] = {}
    for one in alternatives(config.path):
        found = Found([Path(one)] if Path(one).is_file() else [], {})
        if not found.files and is_glob(one):
            folder, parts = _cut(Path(one))
            found = _walked(source, folder, parts, [])
        if not found.files and not found.left_out:
            raise ConfigError(f"sources.{source}.path is {one}; no such file, and no file matches it as a glob")
        files |= dict.fromkeys(found.files)
        for reason, paths in found.left_out.items():
            left_out.setdefault(reason, []).extend(paths)
    return Found(list(files), left_out)


def _walked(source: str, folder: Path, parts: list[str], exclude: list[str]) -> Found:
    try:
        return walk(folder, parts, exclude)
    except OSError as error:
        raise ConfigError(f"sources.{source}: {error.filename} cannot be read: {error.strerror}") from error
