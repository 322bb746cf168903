"""Write, open and memory-map token shards on disk.

    FOLDER/manifest.json            lists the contents with hashes. Without it the folder is unfinished.
    FOLDER/train-00000.bin, .idx    tokens and their index, one pair for each shard of each split
    FOLDER/train-00000.mask         which tokens count in the loss, if not all do (see mask.py)
    FOLDER/tokenizer/               the tokenizer that made the tokens

`.bin` and `.idx` follow Megatron-LM's indexed dataset, so its readers open them. `.bin` holds the tokens of all
documents, one after another. `.idx` is little-endian: 9 bytes of magic, u64 version, u8 dtype code, u64 number of
sequences n, u64 number of boundaries, int32 lengths [n] in tokens, int64 offsets [n] in bytes, int64 document
boundaries as sequence numbers. Here each document is one sequence, so the boundaries are 0, 1, ..., n.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from ponder_scale.errors import ConfigError, ShardError, TokenizerError
from ponder_scale.files.write import sync, sync_folder
from ponder_scale.shards.manifest import MANIFEST, BlockHashes, Manifest, ShardInfo, read_manifest, unsealed
from ponder_scale.shards.mask import Mask, MaskWriter

TOKENIZER = "tokenizer"
MAX_VOCABULARY = 2**31 - 1
MAX_DOCUMENT_TOKENS = 2**31 - 1

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {"int32": 4, "uint16": 8}
_BEGINS_AT_ONCE = 64
_INDEX_BLOCK = 2**20  # documents whose index is in memory at the same time


def dtype_for(vocab_size: int) -> np.dtype:
    """The little-endian dtype for token ids below `vocab_size`, chosen as Megatron-LM's builder does."""
    if not 0 < vocab_size <= MAX_VOCABULARY:
        raise ShardError(
            f"vocabulary of {vocab_size:,} tokens: shards hold vocabularies of 1 to {MAX_VOCABULARY:,} tokens"
        )
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class ShardWriter:
    """Stream documents into one shard. No file has its final name before `close`.

    masked: whether some tokens do not count in the loss. If so, `add` needs `counts`.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int, masked: bool = False) -> None:
        self.tokens = 0
        self._name = name
        self._vocab_size = vocab_size
        self._dtype = dtype_for(vocab_size)
        self._lengths = array("i")
        self._hashes = BlockHashes()
        self._bin, self._idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._stream = unsealed(self._bin).open("wb")
        self._mask = MaskWriter(folder / f"{name}.mask") if masked else None

    def add(self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append documents.

        tokens: (sum of lengths,) integers, document after document. lengths: (documents,).
        counts: (sum of lengths,) bool, whether each token counts in the loss. Only for a shard with a mask.
        Raises ShardError for a token id outside the vocabulary and for a document too long for the index.
        """
        assert tokens.ndim == lengths.ndim == 1 and lengths.sum() == len(tokens)
        assert (counts is None) == (self._mask is None) and (counts is None or len(counts) == len(tokens))
        self._check(tokens, lengths)
        if self._mask is not None and counts is not None:
            self._mask.add(counts)
        content = np.ascontiguousarray(tokens, dtype=self._dtype).view(np.uint8).data
        self._stream.write(content)
        self._hashes.update(content)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += len(tokens)

    def close(self, source: str = "") -> ShardInfo:
        """Write the index, make all files durable and rename them to their final names.

        Returns the description of the shard. `source` is the source of the build that its documents come from.
        """
        with self._stream:
            sync(self._stream)
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        index_hash = xxhash.xxh3_128()
        with unsealed(self._idx).open("wb") as stream:
            for piece in index_pieces(lengths, self._dtype):
                stream.write(piece)
                index_hash.update(piece)
            sync(stream)
        masked = {} if self._mask is None else {"mask_hash": self._mask.close(), "counted": self._mask.counted}
        info = ShardInfo(
            name=self._name,
            source=source,
            documents=len(lengths),
            tokens=self.tokens,
            bytes=self.tokens * self._dtype.itemsize,
            bin_hashes=self._hashes.finish(),
            idx_hash=index_hash.hexdigest(),
            **masked,  # type: ignore[arg-type]
        )
        for path in (self._bin.with_name(name) for name in info.files):
            unsealed(path).rename(path)
        sync_folder(self._bin.parent)
        return info

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def _check(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if not len(lengths):
            return
        low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
        if low < 0 or high >= self._vocab_size:
            raise ShardError(
                f"shard {self._name}: the tokenizer gave token id {low if low < 0 else high:,}; expected "
                f"0 to {self._vocab_size - 1:,}; its vocabulary size is wrong"
            )
        if int(lengths.max()) > MAX_DOCUMENT_TOKENS:
            raise ShardError(
                f"shard {self._name}: a document has {int(lengths.max()):,} tokens; expected at most "
                f"{MAX_DOCUMENT_TOKENS:,}; split the document"
            )


class Shard:
    """One shard, read through memory maps that are created on first use.

    Opening takes the same time for any size. Raises ShardError when the files disagree with each other or with the
    manifest. With `check=False` it raises on first use instead.
    """

    def __init__(self, folder: Path, info: ShardInfo, dtype: np.dtype, *, check: bool = True) -> None:
        self.info = info
        self._dtype, self._itemsize = dtype, dtype.itemsize
        self._bin, self._idx = folder / f"{info.name}.bin", folder / f"{info.name}.idx"
        self.mask = None if info.mask_hash is None else Mask(folder / f"{info.name}.mask", info.tokens)
        self._checked = False
        if check:
            self.check()

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, (tokens,), read-only."""
        return np.empty(0, self._dtype) if self._map is None else np.frombuffer(self._map, self._dtype)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int32, read-only."""
        self.check()
        index = np.memmap(self._idx, dtype=np.uint8, mode="r")
        return index[_HEADER.size : _HEADER.size + 4 * self.info.documents].view("<i4")

    @cached_property
    def offsets(self) -> np.ndarray:
        """Byte offset in `.bin` at which each document begins, (documents,) int64, read-only."""
        self.check()
        index = np.memmap(self._idx, dtype=np.uint8, mode="r").view(np.ndarray)
        begin = _HEADER.size + 4 * self.info.documents
        return index[begin : begin + 8 * self.info.documents].view("<i8")

    def begins_within(self, first: int, count: int) -> list[int]:
        """Positions of the tokens in [first, first + count) that begin a document, relative to `first`, ascending."""
        begin, end = first * self._itemsize, (first + count) * self._itemsize
        # Not np.searchsorted: the index is unaligned in its file, so numpy would first copy all of it.
        document = bisect_left(self._offsets, begin)
        found: list[int] = []
        while True:
            some = self._offsets[document : document + _BEGINS_AT_ONCE].tolist()
            if len(some) < _BEGINS_AT_ONCE or some[-1] >= end:
                found += some[: bisect_left(some, end)]
                return [(offset - begin) // self._itemsize for offset in found]
            found += some
            document += _BEGINS_AT_ONCE

    def will_need(self, first: int, count: int) -> None:
        """Ask the kernel to read tokens [first, first + count) before you use them."""
        if self._map is not None:
            start = first * self._itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, (first + count) * self._itemsize - start)
        if self.mask is not None:
            self.mask.will_need(first, count)

    @cached_property
    def _offsets(self) -> memoryview:
        """`offsets` for single look-ups, at half the cost of an array."""
        # valid on little-endian machines only, as the files are
        return memoryview(self.offsets.view(np.uint8).data).cast("q")

    @cached_property
    def _map(self) -> mmap.mmap | None:
        self.check()
        if not self.info.bytes:
            return None
        with self._bin.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        # Sequences are read in random order, so the kernel's read-ahead would fetch megabytes for kilobytes.
        content.madvise(mmap.MADV_RANDOM)
        return content

    def check(self) -> None:
        """Run every check that needs no pass over the data. Later calls do nothing."""
        if self._checked:
            return
        size, index_size, itemsize = _size_of(self._bin), _size_of(self._idx), self._itemsize
        with self._idx.open("rb") as stream:
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise _damaged(self._idx, f"{len(header)} bytes, less than the header of an index")
            magic, version, code, sequences, boundaries = _HEADER.unpack(header)
            if magic != _MAGIC or version != 1:
                raise _damaged(self._idx, "not an indexed dataset of version 1")
            if code != _DTYPE_CODES[self._dtype.name]:
                raise _damaged(self._idx, f"dtype code {code}; the manifest says {self._dtype.name}")
            expected = _HEADER.size + 12 * sequences + 8 * boundaries
            if index_size != expected:
                raise _damaged(self._idx, f"{index_size:,} bytes; its header announces {expected:,}")
            indexed = _indexed_tokens(stream, sequences, itemsize)
        if sequences != self.info.documents:
            raise _damaged(self._idx, f"{sequences:,} documents; the manifest says {self.info.documents:,}")
        if size != indexed * itemsize:
            raise _damaged(
                self._bin, f"index says {indexed:,} tokens, file holds {size // itemsize:,} ({size:,} bytes)"
            )
        if indexed != self.info.tokens:
            raise _damaged(self._bin, f"manifest says {self.info.tokens:,} tokens, file holds {indexed:,}")
        if self.mask is not None:
            self.mask.check()
        self._checked = True


@dataclass(frozen=True)
class ShardSet:
    """An open folder of shards."""

    folder: Path
    manifest: Manifest
    _shards: Mapping[str, list[Shard]] = field(repr=False)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / TOKENIZER

    def every(self) -> list[Shard]:
        return [shard for shards in self._shards.values() for shard in shards]

    def split(self, name: str) -> list[Shard]:
        """The shards of split "train" or "heldout" in reading order, which may be an empty list."""
        if name not in self._shards:
            known = ", ".join(self._shards) or "none"
            raise ShardError(f"{self.folder}: no split {name!r}; its splits are: {known}")
        return self._shards[name]


def open_shards(folder: Path | str, *, check: bool = True) -> ShardSet:
    """Open a folder of shards and check it against its manifest, without a pass over the data.

    With `check=False`, each shard is checked on first use or when you call its `check`.
    Raises ShardError for a folder that is unfinished or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.dtype not in _DTYPE_CODES:
        raise ShardError(
            f"{folder / MANIFEST}: dtype is {manifest.dtype!r}; expected one of: {', '.join(_DTYPE_CODES)}"
        )
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    splits = {
        split: [Shard(folder, info, dtype, check=check) for info in infos] for split, infos in manifest.splits.items()
    }
    return ShardSet(folder, manifest, splits)


def open_all(paths: Mapping[str, str], key: str = "data.sources.{}.path", *, check: bool = True) -> dict[str, ShardSet]:
    """The shards of each source by name, in alphabetical order.

    `key` is the setting that gave the path, for error messages. `check` is passed to `open_shards`.
    Raises ShardError for damaged or unfinished shards, TokenizerError for sources of different tokenizers.
    """
    sources = {}
    for name in sorted(paths):
        try:
            sources[name] = open_shards(Path(paths[name]), check=check)
        except ShardError as error:
            raise ShardError(f"{key.format(name)}: {error}") from error
    same_tokenizer(sources)
    return sources


def same_tokenizer(sets: Mapping[str, ShardSet]) -> None:
    """Raise TokenizerError if shards that are read together differ in tokenizer or end-of-document token."""
    for (one, first), (name, other) in combinations(sets.items(), 2):
        if other.manifest.tokenizer != first.manifest.tokenizer:
            raise TokenizerError(
                f"sources {one} ({first.folder}) and {name} ({other.folder}) have different tokenizers, "
                f"{first.manifest.tokenizer[:12]} and {other.manifest.tokenizer[:12]}; rebuild one with the "
                f"tokenizer of the other"
            )
        ends = [some.manifest.eod_id for some in (first, other)]
        if None not in ends and ends[0] != ends[1]:
            raise TokenizerError(
                f"sources {one} ({first.folder}) and {name} ({other.folder}) end documents with different tokens, "
                f"{ends[0]} and {ends[1]}; rebuild one with the eod_token of the other"
            )


def check_vocabulary(sets: Mapping[str, ShardSet], vocab_size: int) -> None:
    """Raise ConfigError if a model with `vocab_size` tokens is too small for the shards of any source."""
    for name, shards in sets.items():
        if vocab_size < shards.manifest.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {vocab_size:,}; source {name} ({shards.folder}) needs at least "
                f"{shards.manifest.vocab_size:,}; raise it, or leave it null to take the tokenizer's"
            )


def index_pieces(lengths: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """Yield the content of `.idx` for documents of `lengths` tokens, in pieces."""
    count = len(lengths)
    blocks = [slice(begin, begin + _INDEX_BLOCK) for begin in range(0, count, _INDEX_BLOCK)]
    yield _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype.name.replace("uint32", "int32")], count, count + 1)
    for block in blocks:
        yield lengths[block].astype("<i4").tobytes()
    offset = 0
    for block in blocks:
        ends = offset + np.cumsum(lengths[block], dtype="<i8") * dtype.itemsize
        yield np.concatenate([np.array([offset], dtype="<i8"), ends[:-1]]).tobytes()
        offset = int(ends[-1])
    for begin in range(0, count + 1, _INDEX_BLOCK):
        yield np.arange(begin, min(begin + _INDEX_BLOCK, count + 1), dtype="<i8").tobytes()


def check_index(index: Path, data: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Compare an index that any program wrote with all of its `.bin`, and return what it holds.

    Returns the dtype, the lengths of the n sequences (n,), and the first sequence of each document, then n, (d + 1,).
    Raises ShardError if index and data disagree, and for a dtype that shards do not use.
    """
    content = np.memmap(index, dtype=np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
    if len(content) < _HEADER.size:
        raise _damaged(index, f"{len(content)} bytes, less than the header of an index")
    magic, version, code, sequences, boundaries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    names = {code: name for name, code in _DTYPE_CODES.items()}
    if magic != _MAGIC or version != 1 or code not in names:
        raise _damaged(index, f"no indexed dataset of version 1 with tokens of {' or '.join(_DTYPE_CODES)}")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if len(content) != expected:
        raise _damaged(index, f"{len(content):,} bytes; its header announces {expected:,}")
    dtype = np.dtype(names[code]).newbyteorder("<")
    lengths = content[_HEADER.size : _HEADER.size + 4 * sequences].view("<i4")
    offsets = content[_HEADER.size + 4 * sequences : _HEADER.size + 12 * sequences].view("<i8")
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if not np.array_equal(offsets[1:], ends[:-1]) or (sequences and offsets[0]):
        raise _damaged(index, "its sequences do not follow one another")
    if (int(ends[-1]) if sequences else 0) != data.stat().st_size:
        raise _damaged(data, f"{data.stat().st_size:,} bytes; its index says {int(ends[-1]) if sequences else 0:,}")
    documents = content[_HEADER.size + 12 * sequences :].view("<i8")
    if len(documents) < 2:  # its builder was never told where documents end
        documents = np.arange(sequences + 1, dtype="<i8")
    if documents[0] or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise _damaged(index, f"its documents do not cover its {sequences:,} sequences")
    return dtype, lengths, documents


def _indexed_tokens(stream: IO[bytes], sequences: int, itemsize: int) -> int:
    """The total number of tokens in `.bin`, read from the last entry of the index."""
    if not sequences:
        return 0
    stream.seek(_HEADER.size + 4 * (sequences - 1))
    (length,) = struct.unpack("<i", stream.read(4))
    stream.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
    (offset,) = struct.unpack("<q", stream.read(8))
    return int(offset // itemsize + length)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise ShardError(f"shard {path.name}: missing in {path.parent}; restore it, or build again") from error


def _damaged(path: Path, what: str) -> ShardError:
    return ShardError(f"shard {path.name}: {what}; rebuild it or remove it from {MANIFEST}")
