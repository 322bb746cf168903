"""What the readers make of a source, and files of each compression."""

import bz2
import gzip
import lzma
from pathlib import Path

import xxhash
import zstandard

from data_pipeline.config import SourceConfig
from data_pipeline.read.readers import read
from data_pipeline.read.sources import files, split

LIMIT = 2**16
WHOLE = 2**60


def pieces(config: SourceConfig, size: int = WHOLE):
    return [piece for file in files({"it": config}) for piece in split(file, config, size)]


def records(config: SourceConfig, size: int = WHOLE, limit: int = LIMIT):
    """All records of a source read in pieces of `size` bytes, after checking that the hashes cover the bytes."""
    found = []
    for piece in pieces(config, size):
        hasher = xxhash.xxh3_128()
        found += read(piece, config, limit, hasher)
        if config.kind in ("jsonl", "text", "folder"):
            content = Path(piece.path).read_bytes()[piece.begin : piece.end]
            assert hasher.hexdigest() == xxhash.xxh3_128_hexdigest(content)
    return found


def texts(config: SourceConfig, **how) -> list[str]:
    return [record.text for record in records(config, **how) if record.text is not None]


def drops(config: SourceConfig, **how) -> list[tuple[int, str]]:
    return [(record.offset, record.reason) for record in records(config, **how) if record.text is None]


def stored(path, content: bytes):
    """A file of `content`, compressed as its name says."""
    if path.suffix == ".gz":
        half = len(content) // 2
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])  # two members, as `cat` makes
    elif path.suffix == ".zst":
        half = len(content) // 2
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
        content = compress(content[:half]) + compress(content[half:])
    elif path.suffix in (".bz2", ".xz"):
        compress, half = (bz2 if path.suffix == ".bz2" else lzma).compress, len(content) // 2
        content = compress(content[:half]) + compress(content[half:])
    path.write_bytes(content)
    return path


SUFFIXES = ["", ".gz", ".zst", ".bz2", ".xz"]
