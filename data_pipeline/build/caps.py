"""Apply the cap of a source: take its first documents, in the order of the plan, up to a number of documents or tokens.

Each unit is processed on its own, as if it were the first of its source. When all units are done, their journals show
in which unit the cap lies. That unit is processed again with the room that the units before it leave. The units after
it are left out. The result therefore does not depend on the number of workers or on which unit was done first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.config import SourceConfig


class Room:
    """How many more documents and tokens may be taken. None means any number."""

    def __init__(self, documents: int | None, tokens: int | None) -> None:
        self.documents, self.tokens = documents, tokens
        self.full = 0 in (documents, tokens)

    def take(self, lengths: Sequence[int]) -> int:
        """Take the next documents, of `lengths` tokens, until one does not fit, and return how many were taken.

        The first document that does not fit closes the room.
        """
        count = 0 if self.full else len(lengths)
        if self.documents is not None:
            count = min(count, self.documents)
        ends = np.cumsum(np.array(lengths, dtype=np.int64))
        if self.tokens is not None:
            count = min(count, int(np.searchsorted(ends, self.tokens, side="right")))
        self.full = self.full or count < len(lengths)
        self._leave(count, int(ends[count - 1]) if count else 0)
        return count

    def hold(self, documents: int, tokens: int) -> bool:
        """Take this many documents and tokens if there is room for all of them. Returns whether there was."""
        fit = not self.full
        fit = fit and (self.documents is None or documents <= self.documents)
        fit = fit and (self.tokens is None or tokens <= self.tokens)
        if fit:
            self._leave(documents, tokens)
        return fit

    def _leave(self, documents: int, tokens: int) -> None:
        if self.documents is not None:
            self.documents -= documents
        if self.tokens is not None:
            self.tokens -= tokens
        self.full = self.full or 0 in (self.documents, self.tokens)


class Cut(NamedTuple):
    """Where the cap of a source lies."""

    unit: int | None  # the unit that is taken in part; None if the cap lies between two units
    documents: int | None  # the room left for that unit
    tokens: int | None
    behind: list[int]  # the units after it, which are left out


def room_of(source: SourceConfig) -> Room | None:
    """The full room of a source; None if it has no cap."""
    if source.max_documents is None and source.max_tokens is None:
        return None
    return Room(source.max_documents, source.max_tokens)


def is_behind(source: SourceConfig, before: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a unit certainly lies after the cap, judged by the journals of some of the units before it."""
    room = room_of(source)
    if room is None:
        return False
    return any(result["full"] or not room.hold(result["documents"], result["tokens"]) or room.full for result in before)


def find_cut(source: SourceConfig, results: Iterable[tuple[int, Mapping[str, Any]]]) -> Cut | None:
    """Find the cap of a source from the numbers and journals of its units in order. None if the source has no cap."""
    room = room_of(source)
    if room is None:
        return None
    cut, ended, behind = None, False, []
    for number, result in results:
        if ended:
            behind.append(number)
        elif room.hold(result["documents"], result["tokens"]):
            ended = room.full or result["full"]
        else:
            cut, ended = number, True
    return Cut(cut, room.documents, room.tokens, behind)


def not_read(source: str) -> dict[str, Any]:
    """The journal of a unit that lies after the cap of its source."""
    counts = {"documents": 0, "tokens": 0, "drops": {}, "lines": 0, "inputs": [], "first_bad": None}
    return {"source": source, **counts, "full": True, "engine": None}
