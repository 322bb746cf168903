"""Progress of long work: a bar on a terminal, a plain line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, NamedTuple

SECONDS_BETWEEN_LINES = 5.0


class Done(NamedTuple):
    """How much of a task is done, since its beginning."""

    size: int  # bytes of input
    documents: int = 0
    tokens: int = 0


Report = Callable[[int, int, int], None]  # of bytes, documents and tokens that were worked off since the last report
Doing = Generator[Done, None, dict[str, Any]]  # a task; it says now and then how much is done, and returns its journal


def told(doing: Doing, report: Report) -> dict[str, Any]:
    """Do a task to its end and report what it does; its journal. Where it begins again, as when an engine has failed,
    what it had done is taken back."""
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
    """Counts bytes, documents and tokens against the bytes there are, and says how long it will take yet.

    `done`: bytes that were done before it began, by an interrupted build; rates are without them.
    """

    def __init__(self, what: str, total_bytes: int, quiet: bool = False, done: int = 0) -> None:
        self._what, self._total, self._quiet = what, total_bytes, quiet
        self._bytes = self._before = done
        self._documents = self._tokens = 0
        self._begin = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm  # not loaded for a log file

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
        """Count work that was done: bytes of input, documents, tokens."""
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
        name, unit = ("kB", 1e3) if 0 < self._total < 1e6 else ("MB", 1e6)  # of a stream, 0
        amount = f"{self._bytes / unit:,.1f} of {self._total / unit:,.1f} {name} ({done:.0%})"
        rates = filter(None, [f"{speed / unit:,.1f} {name}/s", self._rates(now)])
        print(f"{self._what}: {amount}, {', '.join(rates)}, {left:,.0f} s left", file=sys.stderr, flush=True)
