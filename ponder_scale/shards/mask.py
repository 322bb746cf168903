"""`.mask` says which tokens of a shard count in the loss. It lies beside `.bin` and has one bit for each token.

Bit i of the file, counted from the lowest bit of each byte, is 1 if a model should learn to predict token i. The bits
after the last token are 0. A shard whose tokens all count has no such file.
"""

from __future__ import annotations

import mmap
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from ponder_scale.errors import ShardError
from ponder_scale.files.write import sync
from ponder_scale.shards.manifest import unsealed


class MaskWriter:
    """Streams the bits of one shard into a file. The file keeps its `.tmp` name until `ShardWriter` renames it."""

    def __init__(self, path: Path) -> None:
        self.counted = 0  # tokens that count in the loss
        self._stream = unsealed(path).open("wb")
        self._hash = xxhash.xxh3_128()
        self._rest = np.empty(0, dtype=bool)  # bits that do not fill a byte yet

    def add(self, counts: np.ndarray) -> None:
        """Append tokens. counts: (tokens,) bool, whether each token counts in the loss."""
        self.counted += int(counts.sum())
        bits = np.concatenate([self._rest, counts])
        full = len(bits) // 8 * 8
        self._write(bits[:full])
        self._rest = bits[full:]

    def close(self) -> str:
        """Make the file durable, still under its `.tmp` name. Returns the xxh3-128 of its bytes."""
        self._write(self._rest)
        with self._stream:
            sync(self._stream)
        return self._hash.hexdigest()

    def _write(self, bits: np.ndarray) -> None:
        content = np.packbits(bits, bitorder="little").tobytes()
        self._stream.write(content)
        self._hash.update(content)


class Mask:
    """The bits of one shard, memory-mapped on first use."""

    def __init__(self, path: Path, tokens: int) -> None:
        self._path, self._tokens = path, tokens

    def check(self) -> None:
        """Raise ShardError if the file is missing or its size does not fit the tokens of the shard."""
        found = self._path.stat().st_size if self._path.is_file() else -1
        if found != mask_bytes(self._tokens):
            what = (
                "missing"
                if found < 0
                else f"{found:,} bytes; {self._tokens:,} tokens have {mask_bytes(self._tokens):,}"
            )
            raise ShardError(
                f"shard {self._path.name}: {what}; without it, tokens would count in the loss that must not; restore "
                f"it, or build again"
            )

    def read(self, first: int, count: int) -> np.ndarray:
        """Whether each of the tokens [first, first + count) counts in the loss, (count,) bool."""
        begin = first // 8
        some = self._bytes[begin : (first + count + 7) // 8]
        return np.unpackbits(some, bitorder="little")[first - 8 * begin :][:count].view(bool)

    def will_need(self, first: int, count: int) -> None:
        """Ask the kernel to read the bits of tokens [first, first + count) before you use them."""
        if self._map is not None:
            start = first // 8 // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, (first + count + 7) // 8 - start)

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.empty(0, np.uint8) if self._map is None else np.frombuffer(self._map, np.uint8)

    @cached_property
    def _map(self) -> mmap.mmap | None:
        self.check()
        if not self._tokens:
            return None
        with self._path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        content.madvise(mmap.MADV_RANDOM)
        return content


def mask_bytes(tokens: int) -> int:
    """The size of `.mask` in bytes for a shard of `tokens` tokens."""
    return -(-tokens // 8)


def is_mask(path: Path, tokens: int) -> bool:
    """Whether a file has the size of a mask for `tokens` tokens, with no bit set after the last of them."""
    if not path.is_file() or path.stat().st_size != mask_bytes(tokens):
        return False
    with path.open("rb") as stream:
        stream.seek(max(0, mask_bytes(tokens) - 1))
        last = stream.read(1)
    return tokens % 8 == 0 or last[0] >> tokens % 8 == 0


def count_bits(path: Path) -> int:
    """The number of tokens that count in the loss, from a file of bits."""
    return int(np.bitwise_count(np.fromfile(path, np.uint8)).sum(dtype=np.int64))
