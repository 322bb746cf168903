"""Read files in object stores and on servers through fsspec. Their names contain `://`.

If the network fails, a file waits and continues at the same byte. Every error names what failed. It is an OSError, or a
ConfigError if you can fix the cause.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import xxhash

from data_pipeline.read.walk import is_glob
from ponder_scale.errors import ConfigError

WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each retry
READ_BYTES = 2**22  # bytes per request
LOOK_BYTES = 2**16  # bytes per request when only the end of a line is needed
_SILENCE_SECONDS = 60.0  # close the connection after this silence of a server
_BUFFER = 2**17

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WEB = ("http", "https")
_IN_EXTRA = ("s3", "s3a", "gs", "gcs", *_WEB)
# Fields that change with the content, the most reliable first: of object stores, web servers, the hub, file systems.
_STAMPS = (
    *("ETag", "etag", "VersionId", "generation", "blob_id", "sha", "Content-MD5", "Digest"),
    *("mtime", "modified", "last_modified", "LastModified", "Last-Modified", "modificationTime", "updated", "created"),
)
# permanent errors, by name because botocore and s3fs need not be installed
_FOR_EVER = ("NoCredentialsError", "FileExpired", "ProfileNotFound")
_LATER = (408, 425, 429)  # HTTP codes from 400 to 499 that are worth a retry

T = TypeVar("T")


class Stat(NamedTuple):
    """The current state of a remote file."""

    url: str
    size: int  # bytes
    modified: int  # 63 bits of an ETag, version or time, which changes with the content


def is_remote(path: str) -> bool:
    return _REMOTE.match(path) is not None


def name_of(path: str) -> str:
    """The last part of a path, which tells the file's kind. Without the query or version of a URL."""
    if not is_remote(path):
        return path.rpartition("/")[2]
    behind = r"[?#].*" if _protocol(path) in _WEB else r"\?versionId=[^/]*$"
    return re.sub(behind, "", path).rpartition("/")[2]


def open_file(path: str, block: int | None = None, *, buffered: bool = False) -> IO[bytes]:
    """Open a local or remote file for reading and seeking. Raises OSError.

    Args:
        block: bytes of one request. None means READ_BYTES.
        buffered: whether a local file keeps what it reads ahead, which helps to read lines.
    """
    if is_remote(path):
        return io.BufferedReader(_File(path, block or READ_BYTES), _BUFFER)
    return Path(path).open("rb", buffering=-1 if buffered else 0)


def stat(path: str) -> tuple[int, int]:
    """The size of a local or remote file, and a number that changes with its content. Raises OSError."""
    if is_remote(path):
        found = about(path)
        return found.size, found.modified
    local = Path(path).stat()
    return local.st_size, local.st_mtime_ns


def about(url: str) -> Stat:
    """The current state of a remote file. Raises OSError, and ConfigError if it is not a file that can be read."""
    system, path = _system(url)

    def look() -> Any:
        system.invalidate_cache()
        return system.info(path)

    return _stat(url, _tried(url, look))


def find(url: str, exclude: Sequence[str] = ()) -> tuple[list[Stat], list[str]]:
    """The files that a URL or a glob names, sorted by name, and the hidden files that the glob would otherwise match.

    Both are empty if a glob matches nothing. Names match as in `walk`: only a pattern that begins with a dot matches a
    part that does. Files whose name or folder matches `exclude` are left out. Raises OSError and ConfigError.
    """
    web = _protocol(url) in _WEB
    if not is_glob(url.replace("?", "") if web else url):
        return [about(url)], []
    system, pattern = _system(url)

    def look() -> Any:
        system.invalidate_cache()
        return system.glob(pattern, detail=True)

    named = {name: info for name, info in _tried(url, look).items() if info.get("type") != "directory"}
    if not named:  # a plain name may contain wildcard characters
        try:
            return [about(url)], []
        except (FileNotFoundError, ConfigError):
            return [], []
    files, hidden, parts = [], [], pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if is_glob(part))
    for name, info in sorted(named.items()):
        found = name.split("/")
        if any(fnmatch.fnmatch(part, excluded) for part in found[fixed:] for excluded in exclude):
            continue
        full = name if web else _in_full(url, pattern, name, system)
        if any(part.startswith(".") for part in found[fixed:]) and not _spelled(found, parts):
            hidden.append(full)
        else:
            files.append(about(full) if web or info.get("size") is None else _stat(full, info))
    return files, hidden


def _in_full(url: str, pattern: str, name: str, system: Any) -> str:
    """The full URL of a name, written as in the URL that led to it if possible."""
    before = url.removesuffix(pattern.lstrip("/"))
    return before + name.lstrip("/") if before != url else str(system.unstrip_protocol(name))


def takes_ranges(path: str) -> bool:
    """Whether parts of a file can be read without the bytes before them. Some web servers cannot do that."""
    if not is_remote(path) or _protocol(path) not in _WEB:
        return True
    with _File(path, 2) as file:
        file.seek(1)
        file.read(1)
        return not file.whole


class _File(io.RawIOBase):
    """A remote file. Temporary failures are retried from the next byte."""

    def __init__(self, url: str, block: int) -> None:
        self._url, self._block = url, block
        self._system, self._path = _system(url)
        self._size = about(url).size
        self._stream: Any = None
        self._at = self._position = 0  # position of the stream, and of this file
        self.whole = False  # whether it can only be read from its beginning

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position, as any file does."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the file and return the number of bytes read."""
        view = memoryview(buffer).cast("B")
        count = min(len(view), self._size - self._position)
        if count <= 0:
            return 0
        content = _tried(self._url, lambda: self._read(count))
        view[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, count: int) -> bytes:
        try:
            try:
                self._go()
                content: bytes = self._stream.read(count)
            except ValueError:  # fsspec raises it for a server that sends the whole file when asked for a part
                if _protocol(self._url) not in _WEB or self.whole:
                    raise
                self._drop()
                self.whole = True
                self._go()
                content = self._stream.read(count)
            if not content:
                raise OSError(f"it ended at byte {self._position:,} of {self._size:,}")
            self._at += len(content)
            return content
        except BaseException:
            self._drop()
            raise

    def _go(self) -> None:
        """Bring the stream to the position."""
        if self.whole and self._at > self._position:
            self._drop()
        if self._stream is None:
            self._stream, self._at = self._opened(), 0
        if not self.whole:
            self._stream.seek(self._position)
            self._at = self._position
        while self._at < self._position:
            skipped = self._stream.read(min(_BUFFER, self._position - self._at))
            if not skipped:
                raise OSError(f"it ended at byte {self._at:,} of {self._size:,}")
            self._at += len(skipped)

    def _opened(self) -> Any:
        if self.whole:
            return self._system.open(self._path, "rb", block_size=0)
        return self._system.open(self._path, "rb", block_size=self._block, cache_type="readahead")

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower()


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    import fsspec

    protocol = _protocol(url)
    if protocol in ("file", "local"):
        raise ConfigError(f"{url}: write the path of a file on this machine without {protocol}://")
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        remedy = "pip install ponder-scale[remote]" if protocol in _IN_EXTRA else _line(error)
        raise ConfigError(f"{url}: the library that reads {protocol}:// is missing; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: fsspec knows no {protocol}://; expected s3, gs, https, hf or the like") from error
    options = {**_options(protocol), **kind._get_kwargs_from_urls(url)}
    return _tried(url, lambda: kind(**options)), kind._strip_protocol(url)


def _options(protocol: str) -> dict[str, Any]:
    """Options for web servers. Content arrives as stored, a silent server is given up, proxies come from the
    environment.

    Everything else is left to the library: environment variables and configuration files.
    """
    if protocol not in _WEB:
        return {}
    import aiohttp
    from fsspec.config import conf

    known = conf.get(protocol, {})
    limits = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS)
    client = {"timeout": limits, "trust_env": True, "auto_decompress": False}
    return {
        "headers": {"Accept-Encoding": "identity", **known.get("headers", {})},
        "client_kwargs": {**client, **known.get("client_kwargs", {})},
    }


def _stat(url: str, info: dict[str, Any]) -> Stat:
    at = re.sub(r"[?#].*", "", str(info.get("url") or url)) if _protocol(url) in _WEB else url
    if info.get("type") == "directory" or at.endswith("/"):
        raise ConfigError(f"{url} is a folder; name its files, such as {url.rstrip('/')}/*.jsonl")
    if info.get("size") is None:
        raise ConfigError(f"{url}: the server does not give its size, so a cut-off file would go unnoticed; copy it")
    stamp = next((str(info[name]) for name in _STAMPS if info.get(name)), "")
    return Stat(url, int(info["size"]), xxhash.xxh3_64_intdigest(json.dumps(stamp).encode()) >> 1)


def _spelled(parts: list[str], pattern: list[str]) -> bool:
    """Whether a glob matches a file without matching a leading dot that the glob does not spell."""
    if not pattern or not parts:
        return not pattern and not parts
    first, dot = pattern[0], parts[0].startswith(".")
    if first == "**":
        deeper = not dot and (len(parts) == 1 == len(pattern) or _spelled(parts[1:], pattern))
        return deeper or _spelled(parts, pattern[1:])
    return (
        (first.startswith(".") or not dot) and fnmatch.fnmatchcase(parts[0], first) and _spelled(parts[1:], pattern[1:])
    )


def _tried(url: str, action: Callable[[], T]) -> T:
    """The result of an action, after retries if needed. Raises OSError with an errno."""
    for number, wait in enumerate((*WAITS, None), start=1):
        try:
            return action()
        except Exception as error:  # each library raises its own
            cause = _cause(error)
            if wait is None or not _may_pass(cause):
                raise _as_os_error(cause, number) from error
            print(f"warning: {url}: {_line(cause)}; trying again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _cause(error: Exception) -> Exception:
    """The real cause of an error. fsspec also reports a missing file if a web server does not answer."""
    inner = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(inner, Exception):
        known = isinstance(inner, OSError) or type(inner).__module__.startswith("aiohttp")
        return inner if known and getattr(inner, "status", None) not in (404, 410) else error
    return error


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in _LATER:
        return False
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
    ours = (ConfigError, NotImplementedError, TypeError)
    return not isinstance(error, (*lasting, *ours)) and type(error).__name__ not in _FOR_EVER


def _as_os_error(error: Exception, tries: int) -> Exception:
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such file")
    reason = f"{_line(error)} (tried {tries} times)" if tries > 1 else _line(error)
    return OSError(errno.EACCES if isinstance(error, PermissionError) else errno.EIO, reason)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    status = getattr(error, "status", None)  # aiohttp's own text repeats the URL
    message: Any = getattr(error, "message", "")
    if isinstance(status, int) and message:
        text = f"{status} {message}"
    return text or type(error).__name__
