"""The folder that a build writes. It stays under another name until it is complete, and is then renamed in one step."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_pipeline.config import SourceConfig
from data_pipeline.read.sources import roots
from ponder_scale.errors import ConfigError, ShardError
from ponder_scale.files.delete import MARK, Ours, check_ours, delete_file, delete_made, held, is_unfinished, mark
from ponder_scale.files.write import sync, sync_folder
from ponder_scale.shards.format import ShardWriter
from ponder_scale.shards.manifest import MANIFEST, ShardInfo, read_manifest
from ponder_scale.shards.packing import names_of_packings

_COPIED_AT_ONCE = 2**20  # bytes
WORK = "work"  # in the unfinished folder, with the plan, claims, journals and incomplete files
MAX_SHARD_DOCUMENTS = 2**24  # limits the memory for a shard's index
PARTIAL, REPLACED = ".partial", ".replaced"  # suffixes of `out` while it is made, and after it is replaced

_STAGES = "keys|duplicates|scatter|gather|shards|cut"
_UNFINISHED = re.compile(
    rf"{re.escape(MARK)}|manifest\.json(\.tmp)?|(inputs|quarantine|dropped)\.jsonl|compared\.keys"
    r"|(train|heldout)-\d{5,}(-\d+)?\.(bin|idx|mask)|tokenizer/|tokenizer/[^/]+\.(json|model|jinja)"
    r"|work/|work/plan(\.new)?\.jsonl(\.tmp)?|work/failed"
    rf"|work/({_STAGES}|quarantine|claims|scratch|ranks)/|work/({_STAGES}|quarantine)/\d{{6,}}[-.][^/]+"
    rf"|work/claims/({_STAGES})/|work/claims/({_STAGES})/\d{{6,}}|work/ranks/\d+"
    r"|work/scratch/[^/]+-\d+/|work/scratch/[^/]+-\d+/(now|journal\.json|quarantine|(train|heldout|\d{6,})[-.][^/]+)"
)


def unfinished(out: Path) -> Path:
    """The folder in which `out` is made."""
    return out.with_name(out.name + PARTIAL)


def named_by_build(name: str) -> bool:
    """Whether a build gives this name to something in its unfinished folder. Names of folders end with a slash."""
    return _UNFINISHED.fullmatch(name) is not None


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """The folder beside `out` that will become `out`, with what an earlier build that was killed left there.

    At the end of the block it stays as it is, or is removed if it is empty. Raises ConfigError if another build on this
    machine writes there, or if it holds anything that no build has made.
    """
    with held(unfinished(out), named_by_build, lambda folder: is_unfinished(folder) or _is_sealed(folder)):
        yield unfinished(out)


def check_places(out: Path, sources: Mapping[str, SourceConfig], tokenizer: Path, overwrite: bool) -> None:
    """Raise ConfigError if a build of `out` would write, move or delete something that is not its own.

    Touches nothing. `out` is an absolute path without links.
    """
    if out.name.endswith((PARTIAL, REPLACED)):
        raise ConfigError(f"out is {out}; names with this ending belong to unfinished builds; choose another out")
    for place in places(out):
        if Path.cwd().is_relative_to(place):
            raise ConfigError(f"out is {out}, where this program runs ({place}); choose another folder")
    for name, source in sources.items():
        for path, place in roots(source):
            if within := _holds(places(out), place):
                raise ConfigError(
                    f"sources.{name}.path is {path}, which lies in {within}, where the build of {out} writes and "
                    f"deletes; move it, or choose another out"
                )
    if within := _holds(places(out)[1:], tokenizer.resolve()):
        raise ConfigError(f"tokenizer is {tokenizer}, which lies in {within}, where the build of {out} writes; move it")
    check_replaceable(out, overwrite)


def places(out: Path) -> list[Path]:
    """The folders that a build of `out` creates, replaces and removes."""
    return [out, unfinished(out), out.with_name(out.name + REPLACED)]


def _holds(taken: list[Path], path: Path) -> Path | None:
    return next((place for place in taken if path.is_relative_to(place)), None)


def check_replaceable(out: Path, replaces: bool) -> None:
    """Raise ConfigError if `out` is something that no build has made. With `replaces`, check everything in it too.

    Also checks the folder that has the name which the old `out` will get.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"out is {out}, which exists and is not a finished folder of shards; choose another out")
    if not _is_sealed(out):
        raise ConfigError(f"out is {out}, whose {MANIFEST} was not written by a build; choose another out")
    if replaces:
        check_ours(out, _named_by_manifest(out), _is_sealed)
        replaced = out.with_name(out.name + REPLACED)
        if replaced.is_symlink() or replaced.exists():
            check_ours(replaced, _named_by_manifest(replaced), is_unfinished)


def _is_sealed(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except ShardError:
        return False
    return True


def _named_by_manifest(folder: Path) -> Ours:
    """A function that says whether a path in a finished folder belongs to the shards.

    It knows the paths in the manifest and in the seals of packings. Without a manifest nothing belongs to the shards.
    """
    known = {MANIFEST, MARK}
    if _is_sealed(folder):
        manifest = read_manifest(folder)
        known |= set(manifest.files) | {f"{Path(name).parent.as_posix()}/" for name in manifest.files}
        known |= {name for infos in manifest.splits.values() for info in infos for name in info.files}
        known |= names_of_packings(folder)
    return known.__contains__


def publish(partial: Path, out: Path) -> None:
    """Rename the finished folder to `out`, and replace what is there.

    Raises ConfigError and keeps everything if either folder holds something that no build has made.
    """
    if (partial / WORK).is_dir():
        delete_made(partial / WORK, lambda name: named_by_build(f"{WORK}/{name}"))
    replaced = out.with_name(out.name + REPLACED)
    if out.exists() and any(out.iterdir()):
        check_replaceable(out, replaces=True)
        if replaced.exists():
            _delete_replaced(replaced)
        out.rename(replaced)
        mark(replaced)
    delete_file(partial / MARK)
    partial.rename(out)
    sync_folder(out.parent)
    if (replaced / MARK).is_file():
        try:
            _delete_replaced(replaced)
        except (ConfigError, OSError) as error:  # the build has succeeded anyway
            print(f"warning: the folder that {out} replaced could not be deleted: {error}", file=sys.stderr, flush=True)


def delete_set(folder: Path) -> None:
    """Delete a finished folder of shards that was an intermediate step. Raises the errors of `delete_made`."""
    mark(folder)
    _delete_replaced(folder)


def _delete_replaced(replaced: Path) -> None:
    delete_made(replaced, _named_by_manifest(replaced), last=MARK)


def join(parts: Iterable[Path], whole: Path, size: int | None = None) -> None:
    """Concatenate files durably. Takes the first `size` bytes of each, or all of it."""
    with whole.open("wb") as stream:
        for part in parts:
            left = part.stat().st_size if size is None else size
            with part.open("rb") as content:
                while left and (piece := content.read(min(left, _COPIED_AT_ONCE))):
                    stream.write(piece)
                    left -= len(piece)
        sync(stream)
    sync_folder(whole.parent)


class PartWriter:
    """Writes the documents of one unit and split as one shard, or as several if it is large. Writes none for no
    documents.

    The shards are written in `scratch` and moved to `folder` when they are complete.
    """

    def __init__(
        self, scratch: Path, name: str, source: str, shard_tokens: int, vocab_size: int, masked: bool = False
    ) -> None:
        self._scratch, self._name, self._source = scratch, name, source
        self._shard_tokens, self._vocab_size, self._masked = shard_tokens, vocab_size, masked
        self._current: ShardWriter | None = None
        self._done: list[ShardInfo] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append documents, as `ShardWriter.add` does. The documents alone decide where a shard ends."""
        while len(lengths):
            if self._current is None:
                name = f"{self._name}-{len(self._done)}" if self._done else self._name
                self._current = ShardWriter(self._scratch, name, self._vocab_size, self._masked)
            ends = np.cumsum(lengths)
            room = self._shard_tokens - self._current.tokens
            count = min(len(lengths), int(np.searchsorted(ends, room)) + 1)
            end = ends[count - 1]
            self._current.add(tokens[:end], lengths[:count], None if counts is None else counts[:end])
            tokens, lengths = tokens[end:], lengths[count:]
            counts = None if counts is None else counts[end:]
            if self._current.tokens >= self._shard_tokens or self._current.documents >= MAX_SHARD_DOCUMENTS:
                self._finish()

    def close(self, folder: Path) -> list[ShardInfo]:
        """Move all shards to `folder` and return their descriptions."""
        self._finish()
        for info in self._done:
            for name in info.files:
                (self._scratch / name).rename(folder / name)
        sync_folder(folder)
        return self._done

    def _finish(self) -> None:
        if self._current is not None:
            self._done.append(self._current.close(self._source))
            self._current = None
