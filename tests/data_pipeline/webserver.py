"""A web server on loopback that sends files in parts or as a whole only, and fails as it is told."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Serves a folder; `requests` are those for files, (method, path, range)."""

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool = True, stamps: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.stamps = folder, ranges, stamps
        self.requests: list[tuple[str, str, str]] = []
        self.failures: list[int] = []  # codes with which the next requests for content are answered; 0: cut off halfway
        self.broken: set[str] = set()  # paths whose content nobody gets, but 503
        self.silent: dict[str, threading.Event] = {}  # paths whose content is held back until then
        self.asked = threading.Event()  # once for one of these
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may leave in the midst of an answer."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing is logged."""

    def do_HEAD(self) -> None:
        """The length and the hash."""
        self._answer(content=False)

    def do_GET(self) -> None:
        """A file, a part of it, or the links of a folder."""
        self._answer(content=True)

    def _answer(self, *, content: bool) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        file, wanted = server.folder / path.lstrip("/"), self.headers.get("Range", "")
        if file.is_dir():
            links = "".join(f'<a href="{one.name}{"/" * one.is_dir()}">x</a>' for one in sorted(file.iterdir()))
            self._send(200, links.encode(), {"Content-Type": "text/html"}, content)
            return
        server.requests.append((self.command, path, wanted))
        if not file.is_file():
            self._send(404, b"", {}, content)
            return
        if content and path in server.silent:
            server.asked.set()
            server.silent[path].wait()
        fail = server.failures.pop(0) if content and server.failures else None
        fail = 503 if content and path in server.broken else fail
        if fail:
            self._send(fail, b"", {}, content)
            return
        stored, code, headers = file.read_bytes(), 200, {}
        if server.stamps:
            headers["ETag"] = f'"{hashlib.md5(stored).hexdigest()}"'
        if (part := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)) and server.ranges:
            begin, end = int(part[1]), min(int(part[2]) + 1, len(stored))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(stored)}"
            stored, code = stored[begin:end], 206
        self._send(code, stored, headers, content, cut=fail == 0)

    def _send(self, code: int, body: bytes, headers: dict[str, str], content: bool, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if content:
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut


@contextmanager
def serving(folder: Path, **how: bool) -> Iterator[Server]:
    """The server while it runs."""
    with Server(folder, **how) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
