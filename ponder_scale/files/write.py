"""Write files that are either whole or missing. All calls that wait for a disk are here.

Copies do not keep modes. The files that a run reads may be read-only even for its own user, such as shards shared by a
group or a checkout by an administrator. The files that it writes are its own. They get the modes that new files get in
that place (umask, setgid of shared folders).
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
_READ_BYTES = 2**20  # bytes per read: hashing a file must not need more memory than writing it did


@contextmanager
def writing(file: Path, *, temporary: Path | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a stream whose content replaces the file when the block ends. Until then, or if the block fails, nothing
    changes.

    Args:
        temporary: the name to write under meanwhile. The default is a hidden name beside the file.
        durable: wait until the content is on the disk. Otherwise no one sees a half-written file, but a crash of the
            machine may lose it.
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
    """Write a small file with `writing`. Text is written as UTF-8."""
    with writing(file, durable=durable) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def sync(stream: IO[Any]) -> None:
    """Wait until everything written to a stream is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_file(path: Path) -> None:
    """Wait until a file's contents are on the disk. Needs no permission to write, so any process may call it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    sync_file(folder)


def hash_file(path: Path) -> str:
    """The xxh3-128 of a file, in hexadecimal."""
    whole = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            whole.update(piece)
    return whole.hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file, and of its mode only whether it is executable."""
    shutil.copyfile(source, target)
    if source.stat().st_mode & _EXECUTE:
        mode = target.stat().st_mode
        target.chmod(mode | (mode & _READ) >> 2)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder with all its contents to a new folder. A link is copied as what it points to."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        (copy_folder if path.is_dir() else copy_file)(path, target / path.name)
