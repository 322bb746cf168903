"""Show the progress of long work: a bar on a terminal, or a plain line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, NamedTuple

SECONDS_BETWEEN_LINES = 5.0


class Done(NamedTuple):
    """How much of a task is done since it began."""

    size: int  # bytes of input
    documents: int = 0
    tokens: int = 0


Report = Callable[[int, int, int], None]  # receives bytes, documents and tokens processed since the last report
# a task that yields its progress from time to time and returns its journal
Doing = Generator[Done, None, dict[str, Any]]


def told(doing: Doing, report: Report) -> dict[str, Any]:
    """Run a task to its end, report its progress and return its journal.

    If the task begins again, because an engine failed, the progress reported so far is taken back.
    """
    before = Done(0)
    while True:
        try:
            now = next(doing)
        except StopIteration as end:
            journal: dict[str, Any] = end.value
            return journal
        report(now.size - before.size, now.documents - before.documents, now.tokens - before.tokens)
        before = now


class Progress:
    """Counts bytes, documents and tokens, and estimates the remaining time from the total number of bytes.

    `done`: bytes that an interrupted build processed earlier. They do not enter the rates.
    """

    def __init__(self, what: str, total_bytes: int, quiet: bool = False, done: int = 0) -> None:
        self._what, self._total, self._quiet = what, total_bytes, quiet
        self._bytes = self._before = done
        self._documents = self._tokens = 0
        self._begin = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm  # imported late, because a log file does not need it

            self._bar = tqdm(total=total_bytes, initial=done, desc=what, unit="B", unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print()

    def add(self, size: int, documents: int = 0, tokens: int = 0) -> None:
        """Count finished work: bytes of input, documents, tokens."""
        self._bytes += size
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(now), refresh=False)
            self._bar.update(size)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print()

    def _rates(self, now: float) -> str:
        seconds = max(now - self._begin, 1e-9)
        rates = []
        if self._documents:
            rates.append(f"{self._documents / seconds:,.0f} documents/s")
        if self._tokens:
            rates.append(f"{self._tokens / seconds / 1e6:.2f} M tokens/s")
        return ", ".join(rates)

    def _print(self) -> None:
        if self._quiet:
            return
        now = time.monotonic()
        seconds = max(now - self._begin, 1e-9)
        done = self._bytes / self._total if self._total else 1.0
        speed = (self._bytes - self._before) / seconds
        left = (self._total - self._bytes) / speed if speed else 0.0
        name, unit = ("kB", 1e3) if 0 < self._total < 1e6 else ("MB", 1e6)  # the total of a stream is 0
        amount = f"{self._bytes / unit:,.1f} of {self._total / unit:,.1f} {name} ({done:.0%})"
        rates = filter(None, [f"{speed / unit:,.1f} {name}/s", self._rates(now)])
        print(f"{self._what}: {amount}, {', '.join(rates)}, {left:,.0f} s left", file=sys.stderr, flush=True)
