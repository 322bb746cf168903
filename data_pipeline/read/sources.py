"""Find the files that a source names, and cut each into pieces that can be read independently."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_pipeline.config import SourceConfig, SourceKind
from data_pipeline.document import Piece
from data_pipeline.read import hub
from data_pipeline.read.columns import names_of
from data_pipeline.read.compressed import suffix_of
from data_pipeline.read.counted import check_fields
from data_pipeline.read.remote import LOOK_BYTES, Stat, find, is_remote, name_of, open_file, takes_ranges
from data_pipeline.read.walk import HIDDEN, TWICE, Found, alternatives, is_glob, walk
from ponder_scale.errors import ConfigError
from ponder_scale.files.delete import shown

_SEARCH_BYTES = 2**20


class LeftOut:
    """Counts files that sources name but that builds do not read, by source and reason. Keeps the first of each."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = defaultdict(dict)
        self._first: dict[tuple[str, str], str] = {}

    def add(self, source: str, reason: str, paths: Sequence[str]) -> None:
        """Count some files."""
        self.counts[source][reason] = self.counts[source].get(reason, 0) + len(paths)
        self._first.setdefault((source, reason), shown(paths[0]))

    def __iter__(self) -> Iterator[str]:
        """A line for each source and reason."""
        return self.of()

    def of(self, only: str | None = None) -> Iterator[str]:
        """Yield a line for each source and reason, or only for the given reason."""
        for (source, reason), first in self._first.items():
            if only not in (None, reason):
                continue
            hint = "; a pattern that spells the dot reads them" if reason == HIDDEN else ""
            yield f"left out of {source}: {self.counts[source][reason]:,} {reason}, the first is {first}{hint}"


def files(
    sources: Mapping[str, SourceConfig], left_out: LeftOut | None = None, apart: Iterable[Path] = ()
) -> list[Piece]:
    """All files of all sources as pieces, in reading order, which depends only on their names.

    Files that are not read are counted in `left_out`. They include files in the folders `apart`, whose paths must not
    contain links. Raises ConfigError for a source that names no file.
    """
    found = []
    left_out = LeftOut() if left_out is None else left_out
    for source, config in sources.items():
        pieces: list[Piece] = []
        aside: dict[str, dict[str, None]] = defaultdict(dict)  # by reason, each file once, in order
        for path in config.paths:
            named = _pieces(source, path, config, apart)
            pieces += named.pieces
            for reason, some in named.left_out.items():
                aside[reason] |= dict.fromkeys(some)
            if not named.pieces:
                for reason, some in named.left_out.items():
                    left_out.add(source, reason, list(some))
                raise ConfigError(f"sources.{source}: every file that {path} names is left out: {', '.join(left_out)}")
        if len(config.paths) > 1 or any("{" in text for text in (*config.paths, config.pattern)):
            pieces, again = _each_once(pieces)
            aside[TWICE] |= dict.fromkeys(again)
        for reason, some in aside.items():
            if some:
                left_out.add(source, reason, list(some))
        found += pieces
    return found


class _Named(NamedTuple):
    """The files that one path of a source names, and the names of those left out, by reason."""

    pieces: list[Piece]
    left_out: Mapping[str, Iterable[str]]


def _pieces(source: str, path: str, config: SourceConfig, apart: Iterable[Path]) -> _Named:
    if config.kind == "dataset":
        if is_remote(path):
            raise ConfigError(
                f"sources.{source}.path is {path}; kind=dataset expects a name on the hub or a folder; read files "
                f"at a URL with kind=parquet, jsonl or text"
            )
        return _Named(hub.pieces(source, path, config), {})
    if is_remote(path):
        return _remote_pieces(source, path, config)
    named = _files_of_folder(source, path, config) if config.kind == "folder" else _files_of_glob(source, path, config)
    own = [file for file in named.files if _is_in(file, apart)]
    pieces = []
    for file in [file for file in named.files if file not in own] if own else named.files:
        about = file.stat()
        pieces.append(_whole(source, str(file), _name(str(file), path, config), about.st_size, about.st_mtime_ns))
    aside = {**named.left_out, "files of this build": own}
    return _Named(pieces, {reason: list(map(str, some)) for reason, some in aside.items() if some})


def _remote_pieces(source: str, path: str, config: SourceConfig) -> _Named:
    folder = config.kind == "folder"
    _check_pattern(source, config)
    urls = [f"{path.rstrip('/')}/{one}" for one in alternatives(config.pattern)] if folder else alternatives(path)
    files: dict[str, Stat] = {}
    hidden: dict[str, None] = {}
    for url in urls:
        try:
            some, aside = find(url, config.exclude if folder else ())
        except (OSError, ConfigError) as error:
            what = str(error).removeprefix(f"{url} ").removeprefix(f"{url}: ")
            reason = error.strerror if isinstance(error, OSError) else what
            raise ConfigError(f"sources.{source}.path is {url}: {reason}") from error
        if not some and not aside and not folder:
            raise ConfigError(f"sources.{source}.path is {url}; no such file, and no file matches it as a glob")
        files |= {file.url: file for file in some}
        hidden |= dict.fromkeys(aside)
    if not files and not hidden:
        raise ConfigError(f"sources.{source}.pattern is {config.pattern}; it matches no file in {path}")
    ordered = sorted(files.values()) if folder else list(files.values())
    pieces = [_whole(source, file.url, _name(file.url, path, config), file.size, file.modified) for file in ordered]
    return _Named(pieces, {HIDDEN: list(hidden)} if hidden else {})


def _whole(source: str, path: str, name: str, size: int, modified: int) -> Piece:
    return Piece(source, path, shown(name), 0, size, size, size, modified)


def _name(file: str, path: str, config: SourceConfig) -> str:
    """The name of a file in reports. For a source that is one folder, it is relative to that folder."""
    if config.kind != "folder" or len(config.paths) > 1:
        return file
    return file.removeprefix(f"{path.rstrip('/')}/") if is_remote(path) else Path(file).relative_to(path).as_posix()


def _each_once(pieces: list[Piece]) -> tuple[list[Piece], list[str]]:
    """Each file under the first name by which it is found, and the other names."""
    known: dict[str, Piece] = {}
    again = []
    for piece in pieces:
        is_file = piece.file_size >= 0 and not is_remote(piece.path)
        where = os.path.realpath(piece.path) if is_file else f"{piece.path}#{piece.begin}"
        if where not in known:
            known[where] = piece
        elif known[where].path != piece.path:
            again.append(piece.path)
    return list(known.values()), again


def kind_of(path: str) -> SourceKind:
    """The kind of a file, from its name."""
    name = name_of(path)
    stem = name.removesuffix(suffix_of(path))
    return "parquet" if stem.endswith(".parquet") else "jsonl" if stem.endswith(".jsonl") else "text"


def roots(config: SourceConfig) -> list[tuple[str, Path]]:
    """Each path of a source, with the folder or file (without links) that contains everything the path names.

    Omits data sets on the hub and URLs.
    """
    found = []
    for path in config.paths:
        place = Path(path)
        if is_remote(path) or (config.kind == "dataset" and not place.exists()):
            continue
        if config.kind not in ("dataset", "folder") and not place.exists():
            place = Path(os.path.commonpath([_cut(Path(one).absolute())[0] for one in alternatives(path)]))
        found.append((path, place.resolve()))
    return found


def _is_in(path: Path, folders: Iterable[Path]) -> bool:
    folders = list(folders)
    return bool(folders) and any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders)


def _cut(path: Path) -> tuple[Path, list[str]]:
    """The folder before the first part with a wildcard, and the parts from there on."""
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if is_glob(part)), len(parts) - 1)
    return Path(*parts[:first]), list(parts[first:])


def split(file: Piece, config: SourceConfig, size: int) -> Iterator[Piece]:
    """Consecutive pieces of one file of about `size` bytes. Every record lies wholly in one piece.

    A compressed file stays whole, and so does a file that is one document.
    """
    if config.kind == "parquet":
        yield from _row_groups(file, config, size)
    elif config.kind == "dataset":
        yield from hub.split(file, size)
    elif config.kind == "jsonl" or (config.kind == "text" and config.document == "paragraph"):
        whole = file.size <= size or suffix_of(file.path) or not _takes_ranges(file)
        yield from [file] if whole else _byte_ranges(file, config.kind == "text", size)
    else:
        yield file


def _byte_ranges(file: Piece, paragraphs: bool, size: int) -> Iterator[Piece]:
    begin = 0
    with _readable(file), open_file(file.path, LOOK_BYTES, buffered=True) as stream:
        while begin < file.file_size:
            end = file.file_size
            if begin + size < end:
                end = _next_boundary(stream, begin + size, paragraphs)
            yield _part(file, begin, end, end - begin)
            begin = end


@contextmanager
def _readable(file: Piece) -> Iterator[None]:
    """Turn errors of reading a file into one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"sources.{file.source}: {file.path} cannot be read: {error.strerror or error}") from error


def _takes_ranges(file: Piece) -> bool:
    with _readable(file):
        return takes_ranges(file.path)


def _next_boundary(stream: IO[bytes], position: int, paragraphs: bool) -> int:
    """The first beginning of a line, or of the text after a blank line, at or after `position`."""
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
    schema, groups = parquet_about(file)
    sizes = [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
    check_fields(file.source, config, names_of(schema), file.path)
    begin, start, filled, total = 0, 0, 0, max(1, sum(sizes))
    for group, group_size in enumerate(sizes, start=1):
        filled += group_size
        # bytes of the file, because the sizes of groups are those of decompressed data
        end = file.file_size * filled // total
        if end - start >= size or group == len(sizes):
            yield _part(file, begin, group, end - start)
            begin, start = group, end


def parquet_about(file: Piece) -> tuple[Any, Any]:
    """The Arrow schema and the metadata of a parquet file. Raises ConfigError."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    if not _takes_ranges(file):
        raise ConfigError(
            f"sources.{file.source}: the server of {file.path} only sends whole files, but parquet is read in "
            f"parts; copy the file to this machine"
        )
    try:
        with open_file(file.path, LOOK_BYTES) as stream, ParquetFile(stream) as content:
            return content.schema_arrow, content.metadata
    except (ArrowException, OSError) as error:
        if is_remote(file.path) and isinstance(error, OSError) and error.errno is not None:
            reason = f"cannot be read: {error.strerror}"
        else:
            reason = f"is no parquet file that can be read: {str(error).splitlines()[0]}"
        raise ConfigError(f"sources.{file.source}: {file.path} {reason}") from error


def _part(file: Piece, begin: int, end: int, size: int) -> Piece:
    return Piece(file.source, file.path, file.name, begin, end, size, file.file_size, file.modified)


def _files_of_folder(source: str, path: str, config: SourceConfig) -> Found:
    folder = Path(path)
    if not folder.is_dir():
        what = "which is a file; kind=text reads it" if folder.is_file() else "no such folder"
        raise ConfigError(f"sources.{source}.path is {path}; {what}")
    _check_pattern(source, config)
    patterns = [list(Path(one).parts) for one in alternatives(config.pattern)]
    each = [_walked(source, folder, parts, config.exclude) for parts in patterns]
    found = each[0]
    for more in each[1:]:
        left_out = {reason: found.left_out.get(reason, []) + paths for reason, paths in more.left_out.items()}
        found = Found(sorted({*found.files, *more.files}), {**found.left_out, **left_out})
    if not found.files and not found.left_out:
        raise ConfigError(f"sources.{source}.pattern is {config.pattern}; it matches no file in {path}")
    return found


def _check_pattern(source: str, config: SourceConfig) -> None:
    pattern = Path(config.pattern)
    if pattern.is_absolute() or not pattern.parts:
        raise ConfigError(f"sources.{source}.pattern is {config.pattern!r}; expected a relative glob, such as **/*.py")


def _files_of_glob(source: str, name: str, config: SourceConfig) -> Found:
    path = Path(name)
    if path.is_file():
        return Found([path], {})
    if path.is_dir():
        raise ConfigError(
            f"sources.{source}.path is {name}, which is a folder; name its files, such as "
            f"{path / '*'}.{config.kind if config.kind != 'text' else 'txt'}"
            + (", or set kind=folder" if config.kind == "text" else "")
        )
    files: dict[Path, None] = {}  # in order, each once
    left_out: dict[str, list[Path]] = {}
    for one in alternatives(name):
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
