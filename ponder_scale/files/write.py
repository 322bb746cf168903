"""What lasts: files that are whole or not there, and the only calls that wait for a disk.

Copies do not depend on modes. What a run reads may be read-only, to its user too: shards of a group, a checkout by an
administrator. What it writes is its own: new files and folders get the modes that new ones get here (umask, setgid of
shared folders).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

_READ, _EXECUTE = 0o444, 0o111
_READ_BYTES = 2**20  # at once: what hashes a file must not take more memory than what wrote it


@contextmanager
def writing(file: Path, *, temporary: Path | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """A stream whose content becomes the file's when the block ends; until then, or if it fails, it is as it was.

    Args:
        temporary: the name that it has meanwhile; default: a hidden one beside it.
        durable: wait until it is on the disk; else it is never seen half written, but may be lost with the machine.
    """
    temporary = temporary or file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        yield stream
        if durable:
            sync(stream)
    temporary.replace(file)
    if durable:
        sync_folder(file.parent)


def write_whole(file: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a small file by `writing`; text in UTF-8."""
    with writing(file, durable=durable) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def sync(stream: IO[Any]) -> None:
    """Make what was written durable."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_file(path: Path) -> None:
    """Make the contents of a file durable, whoever wrote it: that needs no permission to write."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    sync_file(folder)


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, in hexadecimal."""
    whole = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            whole.update(piece)
    return whole.hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file; of its modes only whether it can be executed."""
    shutil.copyfile(source, target)
    if source.stat().st_mode & _EXECUTE:
        mode = target.stat().st_mode
        target.chmod(mode | (mode & _READ) >> 2)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder and all in it to a new one, links as what they point to."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        (copy_folder if path.is_dir() else copy_file)(path, target / path.name)
