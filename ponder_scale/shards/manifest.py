"""manifest.json: what a folder of token shards holds, with the hashes that prove it.

It is written last and atomically, so a folder without it is unfinished. Sizes are checked whenever shards are
opened; `verify` reads and hashes every byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ponder_scale.errors import ShardError
from ponder_scale.files.write import hash_file, writing

FORMAT_VERSION = 2
MASKED_VERSION = 3  # of folders with a mask: a program that knows none would let every token count
READABLE_VERSIONS = (1, 2, 3)  # version 1 knew no sources and no weights
MANIFEST = "manifest.json"
BLOCK_BYTES = 64 * 2**20  # of .bin under one hash
PACKING_PREFIX = "packing-"  # of folders beside the shards, sealed on their own: see ponder_scale/shards/packing.py
_READ_BYTES = 2**20  # at once: what hashes a file must not take more memory than what wrote it


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest describes it. Hashes are xxh3-128, in hexadecimal."""

    name: str  # of the files, without .bin and .idx
    documents: int
    tokens: int
    bytes: int  # of .bin
    bin_hashes: list[str]  # one for each BLOCK_BYTES of .bin
    idx_hash: str
    source: str = ""  # of the build, by name; each shard is of one
    mask_hash: str | None = None  # of .mask; None: there is none, and every token counts in the loss
    counted: int | None = None  # tokens that count in the loss; None: all

    @property
    def tokens_that_count(self) -> int:
        """Tokens that count in the loss."""
        return self.tokens if self.counted is None else self.counted

    @property
    def files(self) -> list[str]:
        """The names of all its files. Whoever copies, moves, links or deletes a shard asks here."""
        suffixes = ("bin", "idx") if self.mask_hash is None else ("bin", "idx", "mask")
        return [f"{self.name}.{suffix}" for suffix in suffixes]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and all that is needed to use and to check it."""

    dtype: str  # uint16 or int32, little-endian
    vocab_size: int
    eod_id: int | None  # ends each document; None: nothing does
    bos_id: int | None  # begins each document; None: nothing does
    tokenizer: str  # sha256 of the tokenizer's files, see tokenizer_sha256
    splits: dict[str, list[ShardInfo]]  # in reading order
    files: dict[str, str] = field(default_factory=dict)  # hash of each other file, by its path in the folder
    provenance: dict[str, Any] = field(default_factory=dict)  # what made the shards; for people
    version: int = FORMAT_VERSION
    weights: dict[str, float] = field(default_factory=dict)  # of the sources in training; none: all read as one

    @property
    def identity(self) -> str:
        """A hash of the tokens, document boundaries, masks, their order and the tokenizer, and of nothing else."""

        def of(shard: ShardInfo) -> list[Any]:
            mask = [] if shard.mask_hash is None else [shard.mask_hash]
            return [shard.tokens, shard.bin_hashes, shard.idx_hash, *mask]

        splits = {name: [of(shard) for shard in shards] for name, shards in self.splits.items()}
        return hash_of_json([self.tokenizer, splits])

    @property
    def masked(self) -> bool:
        """Whether there are tokens that do not count in the loss, or shards that could have some."""
        return any(shard.mask_hash is not None for shards in self.splits.values() for shard in shards)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards. Raises ShardError where there is none that can be read."""
    path = folder / MANIFEST
    content = _read_json(path)
    if content.get("version") not in READABLE_VERSIONS:
        raise ShardError(
            f"{path}: version {content.get('version')!r}; this program reads versions 1 to {READABLE_VERSIONS[-1]}; "
            f"use the ponder-scale that made it, or build again"
        )
    try:
        content.pop("checksum", None)
        content["splits"] = {split: [ShardInfo(**info) for info in infos] for split, infos in content["splits"].items()}
        return Manifest(**content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: not a manifest of token shards ({error}); build the folder again") from error


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, atomically and durably: from now on the folder is finished."""
    content = asdict(manifest)
    for info in (info for infos in content["splits"].values() for info in infos):
        for key in ("mask_hash", "counted"):  # where there is no mask the manifest has no word of it
            if info[key] is None:
                del info[key]
    if manifest.masked:
        content["version"] = MASKED_VERSION
    content["checksum"] = hash_of_json(content)
    path = folder / MANIFEST
    with writing(path, temporary=unsealed(path)) as stream:
        stream.write(json.dumps(content, indent=1).encode() + b"\n")


def verify(folder: Path, progress: Callable[[int], None] = lambda size: None) -> list[str]:
    """Read and hash everything: a line for each thing that is not as the build left it; none when all is.

    `progress` is told the size of each block read, in bytes. Raises ShardError when there is no manifest that
    can be read.
    """
    manifest = read_manifest(folder)
    findings = []
    content = _read_json(folder / MANIFEST)
    if content.pop("checksum", None) != hash_of_json(content):
        findings.append(f"{MANIFEST}: edited or damaged since the build: its checksum differs")
    known = {MANIFEST}
    for info in (info for infos in manifest.splits.values() for info in infos):
        findings += _compare_blocks(folder, info, progress)
        findings += _compare_file(folder, f"{info.name}.idx", info.idx_hash)
        if info.mask_hash is not None:
            findings += _compare_file(folder, f"{info.name}.mask", info.mask_hash)
        known |= set(info.files)
    for name, expected in manifest.files.items():
        findings += _compare_file(folder, name, expected)
        known.add(name)
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    foreign = [name for name in present if name not in known and not _in_packing(name)]
    findings += [f"{name}: not in the manifest, no part of these shards" for name in foreign]
    return findings


def tokenizer_sha256(files: Iterable[Path]) -> str:
    """The identity of a tokenizer: of the contents of its files, in the order of their names."""
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        content = path.read_bytes()
        whole.update(f"{len(content)}\0".encode() + content)
    return whole.hexdigest()


def tokenizer_identity(folder: Path) -> str | None:
    """`tokenizer_sha256` of the file that decides the tokens of a Hugging Face folder; None where there is none."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    files = files[:1] or sorted(folder.glob("*.model"))[:1]
    return tokenizer_sha256(files) if files else None


class BlockHashes:
    """The hash of each BLOCK_BYTES of a stream."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._current = xxhash.xxh3_128()
        self._filled = 0

    def update(self, content: memoryview) -> None:
        """Take the next bytes of the stream."""
        while len(content):
            piece = content[: BLOCK_BYTES - self._filled]
            self._current.update(piece)
            self._filled += len(piece)
            if self._filled == BLOCK_BYTES:
                self._done.append(self._current.hexdigest())
                self._current, self._filled = xxhash.xxh3_128(), 0
            content = content[len(piece) :]

    def finish(self) -> list[str]:
        """All hashes, the last one of a block that may be shorter."""
        return [*self._done, self._current.hexdigest()] if self._filled else self._done


def unsealed(path: Path) -> Path:
    """The name a file has until it is whole and durable."""
    return path.with_name(path.name + ".tmp")


def _in_packing(name: str) -> bool:
    """Whether a file lies in a folder that `verify_packings` reads; one beside the shards does not."""
    return name.startswith(PACKING_PREFIX) and "/" in name


def _compare_blocks(folder: Path, info: ShardInfo, progress: Callable[[int], None]) -> Iterator[str]:
    name = f"{info.name}.bin"
    path = folder / name
    if not path.is_file():
        yield f"{name}: missing"
        return
    size = path.stat().st_size
    if size != info.bytes:
        what = "truncated" if size < info.bytes else "too long"
        yield f"{name}: {what}: {size:,} bytes; the manifest says {info.bytes:,}"
    for number, ((found, length), known) in enumerate(
        zip(_block_hashes(path, progress), info.bin_hashes, strict=False)
    ):
        if found != known:
            first, last = number * BLOCK_BYTES, number * BLOCK_BYTES + length - 1
            yield f"{name}: block {number} (bytes {first:,} to {last:,}) differs from its hash"


def _compare_file(folder: Path, name: str, known: str) -> Iterator[str]:
    path = folder / name
    if not path.is_file():
        yield f"{name}: missing"
    elif hash_file(path) != known:
        yield f"{name}: differs from its hash ({path.stat().st_size:,} bytes)"


def _block_hashes(path: Path, progress: Callable[[int], None]) -> Iterator[tuple[str, int]]:
    """The hash and the length of each block of a file."""
    with path.open("rb") as stream:
        while True:
            block, length = xxhash.xxh3_128(), 0
            while piece := stream.read(min(_READ_BYTES, BLOCK_BYTES - length)):
                block.update(piece)
                length += len(piece)
                progress(len(piece))
            if not length:
                return
            yield block.hexdigest(), length


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ShardError(f"{path.parent}: no such folder; expected a folder of token shards")
    if not path.is_file():
        raise ShardError(
            f"{path.parent}: no {path.name}: its build did not finish, or it is no folder of token shards; "
            f"run its build (again)"
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read ({error}); restore it or build the folder again") from error
    if not isinstance(content, dict):
        raise ShardError(f"{path}: not a manifest of token shards; build the folder again")
    return content


def hash_of_json(content: Any) -> str:
    """xxh3-128 of plain values, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
