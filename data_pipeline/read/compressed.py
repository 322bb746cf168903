"""Read the decompressed bytes of a file, and everything that can be recovered from a damaged one.

A fast decompressor loses its buffered output when it meets damage. A damaged file is therefore read a second time, by a
slower decompressor in small steps, so that no intact data before the damage is lost.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from data_pipeline.document import Hasher, Piece
from data_pipeline.read.remote import LOOK_BYTES, name_of, open_file
from ponder_scale.errors import ConfigError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CHUNK = 2**17  # bytes per read; larger reads cost more, because each gets new memory from the kernel
_PATIENT_CHUNK = 2**12  # compressed bytes per step of the slow decompressor; they may expand a thousandfold
_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
_SKIPPABLE = b"\x2a\x4d\x18"  # ends the magic number of a frame without content


class Damaged(Exception):
    """Compressed data is cut off, invalid or followed by other data. In the last case it is `whole`."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole


def suffix_of(path: str) -> str:
    """The suffix of a name that tells how a file is compressed; "" if it is not."""
    name = name_of(path)
    return next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")


def open_piece(piece: Piece, hasher: Hasher) -> IO[bytes]:
    """Open the decompressed bytes of a piece. `hasher` receives the bytes as they are stored.

    `read` raises Damaged after it has returned everything that can be read of a damaged file.
    """
    stored = _Stored(piece.path, piece.begin, piece.end, hasher)
    suffix = suffix_of(piece.path)
    if not suffix:
        return stored  # type: ignore[return-value]
    reader = _Frames if suffix == ".zst" else _Members
    return _Salvaging(reader(stored, suffix), stored, suffix)  # type: ignore[return-value]


def _fast(suffix: str) -> Any:
    if suffix == ".gz":
        from isal import igzip_lib

        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    return _patient(suffix)


def _patient(suffix: str) -> Any:
    if suffix == ".gz":
        return zlib.decompressobj(31)
    return bz2.BZ2Decompressor() if suffix == ".bz2" else lzma.LZMADecompressor()


class _Stored(io.RawIOBase):
    """Bytes [begin, end) of a file, hashed as they are read. From position `slowly` on they are read one by one."""

    def __init__(self, path: str, begin: int, end: int, hasher: Hasher | None, slowly: int | None = None) -> None:
        self._stream: Any = open_file(path)
        self._stream.seek(begin)
        self.path, self.position, self.end = path, begin, end
        self._hasher, self._slowly = hasher, end if slowly is None else slowly

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the file and return the number of bytes read."""
        left = self.end - self.position
        if self.position + len(buffer) > self._slowly and self.position < self.end and self._slowly < self.end:
            left = max(1, self._slowly - self.position)
        view = memoryview(buffer)[:left]
        count = self._stream.readinto(view) or 0
        if self._hasher is not None:
            self._hasher.update(view[:count])
        self.position += count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Members:
    """A file of several compressed streams in sequence, as `cat` makes it. Each stream gets its own decompressor."""

    def __init__(self, stored: _Stored, suffix: str) -> None:
        self._stored, self._suffix, self._magic = stored, suffix, _MAGIC[suffix]
        self._current: Any = None
        self._pending = b""
        self._members = 0  # complete streams so far

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, or none at the end. Raises Damaged and the decompressor's own errors."""
        while True:
            if self._current is None and not self._begin():
                return b""
            if self._current.needs_input and not self._pending:
                self._pending = self._stored.read(CHUNK) or b""
                if not self._pending:
                    raise Damaged(whole=False)
            given, self._pending = (self._pending, b"") if self._current.needs_input else (b"", self._pending)
            content: bytes = self._current.decompress(given, size)
            if self._current.eof:
                self._pending = self._current.unused_data + self._pending
                self._current, self._members = None, self._members + 1
            if content:
                return content

    def _begin(self) -> bool:
        """Begin the next stream. Returns False at the end of the file."""
        while True:
            if self._members and self._suffix in (".gz", ".xz"):
                self._pending = self._pending.lstrip(b"\0")  # both formats allow zeros as padding
            if len(self._pending) >= len(self._magic) or not (more := self._stored.read(CHUNK)):
                break
            self._pending += more
        if not self._pending and self._members:
            return False
        if not self._pending.startswith(self._magic):
            raise Damaged(whole=self._members > 0 and not self._magic.startswith(self._pending))
        self._current = _fast(self._suffix)
        return True


class _Frames:
    """A file of zstd frames, read with pyarrow."""

    def __init__(self, stored: _Stored, suffix: str) -> None:
        import pyarrow

        self._stored = stored
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, "r"), suffix[1:].replace("zst", "zstd"))

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, or none at the end. Raises Damaged for a file without a frame, and OSError."""
        content: bytes = self._stream.read(size)
        if not content and not self._stored.end:
            raise Damaged(whole=False)
        return content


class _Salvaging:
    """A decompressing stream that returns everything readable of a damaged file before it raises Damaged."""

    def __init__(self, stream: _Members | _Frames, stored: _Stored, suffix: str) -> None:
        self._stream, self._stored, self._suffix = stream, stored, suffix
        self._given = 0
        self._rest: Iterator[bytes] | None = None

    def __enter__(self) -> _Salvaging:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        while kind is None and self._stored.read(CHUNK):
            pass  # the hash includes the bytes after the damage
        self._stored.close()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, or more of a damaged file. Returns none at the end."""
        if self._rest is None:
            try:
                content = self._stream.read(size)
                self._given += len(content)
                return content
            except Damaged as error:
                if error.whole:  # no data is missing
                    raise
            except Exception as error:  # each library raises its own
                _check_is_damage(error)
            salvage = _salvage_frames if self._suffix == ".zst" else _salvage_members
            self._rest = salvage(self._stored, self._suffix, self._given)
        return next(self._rest)


def _salvage_members(stored: _Stored, suffix: str, given: int) -> Iterator[bytes]:
    """Yield what the slow decompressor finds after the first `given` bytes, then raise Damaged."""
    with _Stored(stored.path, 0, stored.end, None, slowly=max(0, stored.position - 2 * CHUNK)) as again:
        try:
            current = _patient(suffix)
            for chunk in iter(lambda: again.read(_PATIENT_CHUNK), b""):
                while chunk:
                    content, current, chunk = _one_step(current, chunk, suffix)
                    yield from _behind(content, given)
                    given = max(0, given - len(content))
        except Exception as error:
            _check_is_damage(error)
    raise Damaged(whole=False)


def _one_step(current: Any, chunk: bytes, suffix: str) -> tuple[bytes, Any, bytes]:
    """The output for a chunk, the decompressor for the next one, and the rest of the chunk."""
    content: bytes = current.decompress(chunk)
    if current.eof:
        return content, _patient(suffix), current.unused_data
    return content, current, b""


def _salvage_frames(stored: _Stored, suffix: str, given: int) -> Iterator[bytes]:
    """Like `_salvage_members`, for zstd frames."""
    end = _end_of_frames(stored.path)
    with open_file(stored.path, LOOK_BYTES) as stream:
        stream.seek(end)
        rest = stream.read(4)
    magic = _MAGIC[suffix]
    whole = end > 0 and not (rest.startswith(magic) or magic.startswith(rest) or rest[1:] == _SKIPPABLE)
    slowly = None if whole else max(0, stored.position - 2 * CHUNK)
    with _Stored(stored.path, 0, end if whole else stored.end, None, slowly) as again:
        frames = _Frames(again, suffix)
        try:
            while given:
                given -= len(frames.read(min(given, CHUNK)))
            while content := frames.read(CHUNK if whole else 1):
                yield content
        except Exception as error:
            _check_is_damage(error)
    raise Damaged(whole)


def _check_is_damage(error: Exception) -> None:
    """Raise the error if it comes from the disk or the machine and not from the decompressor."""
    if isinstance(error, (MemoryError, ConfigError)) or getattr(error, "errno", None) is not None:
        raise error


def _behind(content: bytes, given: int) -> Iterator[bytes]:
    if len(content) > given:
        yield content[given:]


def _end_of_frames(path: str) -> int:
    """The end of the last complete frame at the beginning of a zstd file, from the headers of its blocks (RFC 8878)."""
    end = 0
    with open_file(path, LOOK_BYTES) as stream:
        size = stream.seek(0, 2)

        def number(at: int, count: int) -> int:
            stream.seek(at)
            return int.from_bytes(stream.read(count), "little")

        while end < size:
            stream.seek(end)
            head = stream.read(5)
            if head[1:4] == _SKIPPABLE and head[0] >> 4 == 5:
                position = end + 8 + number(end + 4, 4)
            elif head[:4] == _MAGIC[".zst"] and len(head) == 5:
                position = _end_of_frame(end + 5, head[4], number, size)
            else:
                break
            if position > size:
                break
            end = position
    return end


def _end_of_frame(position: int, about: int, number: Callable[[int, int], int], size: int) -> int:
    single, checksum = about >> 5 & 1, about >> 2 & 1
    position += (0, 1, 2, 4)[about & 3] + (single, 2, 4, 8)[about >> 6] + (1 - single)
    while position + 3 <= size:
        block = number(position, 3)
        position += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        if block & 1:
            return position + 4 * checksum
    return size + 1
