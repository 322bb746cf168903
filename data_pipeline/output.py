"""The folder that a build writes: apart until it is whole, then given its name in one step."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ponder_scale.errors import ConfigError
from ponder_scale.manifest import MANIFEST, ShardInfo, sync_folder
from ponder_scale.shards import ShardWriter

WORK = "work"  # in the unfinished folder: the plan, claims, journals, and what is not whole yet
MAX_SHARD_DOCUMENTS = 2**24  # bounds the memory that a shard's index takes


def unfinished(out: Path) -> Path:
    """Where `out` is made."""
    return out.with_name(out.name + ".partial")


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """The folder beside `out` that is to become `out`, with what an earlier, killed build did there.

    It is left as it is at the end of the block, or removed if it holds nothing. Raises ConfigError while another
    build of this machine writes there.
    """
    partial = unfinished(out)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"out is {out}; another build is writing {partial}; wait for it or choose another out"
            ) from error
        yield partial
    finally:
        if partial.is_dir() and not any(partial.iterdir()):
            partial.rmdir()
        os.close(lock)


def check_replaceable(out: Path) -> None:
    """Raises ConfigError when something stands at `out` that no build has made: it is never deleted.

    `out` is an absolute path.
    """
    if Path.cwd().is_relative_to(out):
        raise ConfigError(f"out is {out}, where this program runs; choose another folder, such as one in it")
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"out is {out}, which exists and is no finished folder of shards; choose another out")


def empty(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name, in place of what is there."""
    shutil.rmtree(partial / WORK, ignore_errors=True)
    replaced = out.with_name(out.name + ".replaced")
    if out.exists():
        check_replaceable(out)
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class PartWriter:
    """The documents of one unit and split as one shard, or as several when they are many; none when there are none.

    They are written in `scratch` and given to `folder` whole.
    """

    def __init__(self, scratch: Path, name: str, source: str, shard_tokens: int, vocab_size: int) -> None:
        self._scratch, self._name, self._source = scratch, name, source
        self._shard_tokens, self._vocab_size = shard_tokens, vocab_size
        self._current: ShardWriter | None = None
        self._done: list[ShardInfo] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents, as `ShardWriter.add`; where a shard ends depends on the documents alone."""
        while len(lengths):
            if self._current is None:
                name = f"{self._name}-{len(self._done)}" if self._done else self._name
                self._current = ShardWriter(self._scratch, name, self._vocab_size)
            ends = np.cumsum(lengths)
            room = self._shard_tokens - self._current.tokens
            count = min(len(lengths), int(np.searchsorted(ends, room)) + 1)
            self._current.add(tokens[: ends[count - 1]], lengths[:count])
            tokens, lengths = tokens[ends[count - 1] :], lengths[count:]
            if self._current.tokens >= self._shard_tokens or self._current.documents >= MAX_SHARD_DOCUMENTS:
                self._finish()

    def close(self, folder: Path) -> list[ShardInfo]:
        """Give all shards their place in `folder`; what they hold."""
        self._finish()
        for info in self._done:
            for name in (f"{info.name}.bin", f"{info.name}.idx"):
                (self._scratch / name).rename(folder / name)
        sync_folder(folder)
        return self._done

    def _finish(self) -> None:
        if self._current is not None:
            self._done.append(self._current.close(self._source))
            self._current = None
