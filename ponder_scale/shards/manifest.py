"""manifest.json lists what a folder of token shards holds, with hashes that prove it.

It is written last and atomically, so a folder without it is unfinished. Opening shards checks their sizes. `verify`
reads and hashes every byte.
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
MASKED_VERSION = 3  # for folders with a mask: an older program would ignore the mask and count every token
READABLE_VERSIONS = (1, 2, 3)  # version 1 had no sources and no weights
MANIFEST = "manifest.json"
BLOCK_BYTES = 64 * 2**20  # bytes of .bin that one hash covers
PACKING_PREFIX = "packing-"  # folders beside the shards with a seal of their own: see ponder_scale/shards/packing.py
_READ_BYTES = 2**20  # bytes per read: hashing a file must not need more memory than writing it did


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest describes it. Hashes are xxh3-128 in hexadecimal."""

    name: str  # file name without .bin and .idx
    documents: int
    tokens: int
    bytes: int  # size of .bin
    bin_hashes: list[str]  # one for each BLOCK_BYTES of .bin
    idx_hash: str
    source: str = ""  # name of the one source that all its documents come from
    mask_hash: str | None = None  # hash of .mask; None if there is no mask and every token counts in the loss
    counted: int | None = None  # tokens that count in the loss; None if all do

    @property
    def tokens_that_count(self) -> int:
        return self.tokens if self.counted is None else self.counted

    @property
    def files(self) -> list[str]:
        """The names of all its files. Ask here whenever you copy, move, link or delete a shard."""
        suffixes = ("bin", "idx") if self.mask_hash is None else ("bin", "idx", "mask")
        return [f"{self.name}.{suffix}" for suffix in suffixes]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, with all you need to use and check it."""

    dtype: str  # uint16 or int32, little-endian
    vocab_size: int
    eod_id: int | None  # token that ends each document; None if no token does
    bos_id: int | None  # token that begins each document; None if no token does
    tokenizer: str  # sha256 of the tokenizer's files, see tokenizer_sha256
    splits: dict[str, list[ShardInfo]]  # in reading order
    files: dict[str, str] = field(default_factory=dict)  # hash of each other file, by its path in the folder
    provenance: dict[str, Any] = field(default_factory=dict)  # how the shards were made, for people to read
    version: int = FORMAT_VERSION
    # training weight of each source; empty if all shards are read as one source
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """A hash of tokens, document boundaries, masks, shard order and tokenizer, and of nothing else."""

        def of(shard: ShardInfo) -> list[Any]:
            mask = [] if shard.mask_hash is None else [shard.mask_hash]
            return [shard.tokens, shard.bin_hashes, shard.idx_hash, *mask]

        splits = {name: [of(shard) for shard in shards] for name, shards in self.splits.items()}
        return hash_of_json([self.tokenizer, splits])

    def tokens(self, split: str) -> int:
        """The number of tokens of a split; 0 if there is no such split."""
        return sum(shard.tokens for shard in self.splits.get(split, ()))

    @property
    def masked(self) -> bool:
        """Whether any shard has a mask, so that some tokens may not count in the loss."""
        return any(shard.mask_hash is not None for shards in self.splits.values() for shard in shards)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of shards. Raises ShardError if it is missing or cannot be read."""
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
    """Write the manifest atomically and durably. From then on the folder counts as finished."""
    content = asdict(manifest)
    for info in (info for infos in content["splits"].values() for info in infos):
        # a manifest without masks has none of these keys, so older programs read it
        for key in ("mask_hash", "counted"):
            if info[key] is None:
                del info[key]
    if manifest.masked:
        content["version"] = MASKED_VERSION
    content["checksum"] = hash_of_json(content)
    path = folder / MANIFEST
    with writing(path, temporary=unsealed(path)) as stream:
        stream.write(json.dumps(content, indent=1).encode() + b"\n")


def verify(folder: Path, progress: Callable[[int], None] = lambda size: None) -> list[str]:
    """Read and hash everything. Returns one line for each difference from what the build left, or an empty list.

    `progress` receives the size of each block read, in bytes. Raises ShardError if the manifest is missing or cannot be
    read.
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
    """The identity of a tokenizer: the sha256 of its files' contents, in the order of their names."""
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        content = path.read_bytes()
        whole.update(f"{len(content)}\0".encode() + content)
    return whole.hexdigest()


def tokenizer_identity(folder: Path) -> str | None:
    """`tokenizer_sha256` of the file in a Hugging Face folder that decides the tokens; None if it has none."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    files = files[:1] or sorted(folder.glob("*.model"))[:1]
    return tokenizer_sha256(files) if files else None


class BlockHashes:
    """Hashes a stream in blocks of BLOCK_BYTES."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._current = xxhash.xxh3_128()
        self._filled = 0

    def update(self, content: memoryview) -> None:
        """Add the next bytes of the stream."""
        while len(content):
            piece = content[: BLOCK_BYTES - self._filled]
            self._current.update(piece)
            self._filled += len(piece)
            if self._filled == BLOCK_BYTES:
                self._done.append(self._current.hexdigest())
                self._current, self._filled = xxhash.xxh3_128(), 0
            content = content[len(piece) :]

    def finish(self) -> list[str]:
        """The hash of every block. The last block may be shorter."""
        return [*self._done, self._current.hexdigest()] if self._filled else self._done


def unsealed(path: Path) -> Path:
    """The temporary name of a file, until it is whole and durable."""
    return path.with_name(path.name + ".tmp")


def _in_packing(name: str) -> bool:
    """Whether `verify_packings` reads this file. It reads only files inside a packing folder."""
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
    """Yield the hash and the length of each block of a file."""
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
            f"{path.parent}: it has no {path.name}, so its build did not finish or it is not a folder of token "
            f"shards; run its build again"
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
