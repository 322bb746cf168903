"""Find the block list that contains the URL of a document. The lists have the usual format of web block lists.

A line is a domain or an address without its scheme. A domain blocks itself and all its subdomains. An address blocks
everything below its path. Each line takes eight bytes of memory, so lists may have millions of lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import xxhash

from data_pipeline.clean.decontamination import files_of
from data_pipeline.document import Piece
from data_pipeline.read.compressed import CHUNK, Damaged, open_piece
from data_pipeline.read.remote import name_of
from ponder_scale.errors import ConfigError

NO_URL = "url: none in the record"


class BlockLists(NamedTuple):
    """The lines of all lists."""

    names: list[str]
    lines: np.ndarray  # (n,) uint64, ascending: the hash of each line
    lists: np.ndarray  # (n,) the first list that contains each line

    def hit(self, url: str) -> str | None:
        """The first list that blocks a URL."""
        keys = np.array([_hash(key) for key in _keys(url)], np.uint64)
        if not len(self.lines) or not len(keys):
            return None
        places = np.minimum(np.searchsorted(self.lines, keys), len(self.lines) - 1)
        found = self.lists[places[self.lines[places] == keys]]
        return self.names[int(found.min())] if len(found) else None


def url(address: str, *, field: str = "url", block: Sequence[str] = ()) -> str | None:
    """Drop a document whose URL is in one of the lists to `block`, given as paths. `field` is the record's field for
    the URL.
    """
    if not block:
        return None
    name = block_lists(tuple(block)).hit(address)
    return f"url: {name}" if name else None


@lru_cache(maxsize=4)
def block_lists(paths: tuple[str, ...]) -> BlockLists:
    """Read some files as block lists. Raises ConfigError for a file or a line that cannot be read."""
    files = files_of(paths, "url")
    parts, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number, file in enumerate(files):
        parts.append(np.fromiter((_hash(line) for line in _lines(file)), np.uint64))
        owners.append(np.full(len(parts[-1]), number))
    last = [name_of(file.path) for file in files]
    names = [name if last.count(name) == 1 else file.name for name, file in zip(last, files, strict=True)]
    every, first = np.unique(np.concatenate(parts), return_index=True)
    return BlockLists(names, every, np.concatenate(owners)[first])


def _lines(file: Piece) -> Iterator[str]:
    """Yield the lines of a file as keys. In a hosts file the domain is the last word. # begins a comment."""
    try:
        with open_piece(file, xxhash.xxh3_128()) as stream:
            content = b"".join(iter(lambda: stream.read(CHUNK), b"")).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, Damaged) as error:
        what = error.strerror if isinstance(error, OSError) else "it is damaged, or not UTF-8 text"
        raise ConfigError(f"url: {file.name} cannot be read: {what}") from error
    for number, line in enumerate(content.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, path = _parts(words[-1])
        if not host or not all(character.isalnum() or character in "-._:" for character in host):
            raise ConfigError(
                f"url: {file.name}, line {number} is {line.strip()[:60]!r}; expected a domain, or an address and path"
            )
        yield host + path.rstrip("/")


def _parts(url: str) -> tuple[str, str]:
    """The host in lower-case ASCII, and the path with the query. Both are empty if the text is not a URL."""
    try:
        parts = urlsplit(url.strip() if "://" in url else f"//{url.strip()}")
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return "", ""
    if not host.isascii():
        with suppress(UnicodeError):
            host = host.encode("idna").decode()
    return host, parts.path + (f"?{parts.query}" if parts.query else "")


def _keys(url: str) -> Iterator[str]:
    """Yield every line that would block a URL."""
    host, path = _parts(url)
    if not host:
        return
    labels = host.split(".")
    yield from (".".join(labels[i:]) for i in range(1 if labels[-1].isdecimal() else len(labels)))
    ends = [i for i, character in enumerate(path) if character in "/?" and i] + [len(path)]
    for end in ends:
        if begin := path[:end].rstrip("/"):
            yield host + begin
            if host.startswith("www."):
                yield host.removeprefix("www.") + begin


def _hash(line: str) -> int:
    return xxhash.xxh3_64_intdigest(line.encode("utf-8", "surrogatepass"))
