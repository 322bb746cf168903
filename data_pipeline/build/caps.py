"""The cap of a source: its first documents, in the order of the plan, that are no more than so many or hold no more
than so many tokens.

Units are done apart from each other, each as if it were the first of its source. When all are done, their journals say
in which of them the cap lies: that one is done again with the room that those before it leave, and those behind it are
left out. So what is taken does not depend on how many workers there were, or on which unit was done first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.config import SourceConfig


class Room:
    """How many documents and tokens may still be taken; None for any number."""

    def __init__(self, documents: int | None, tokens: int | None) -> None:
        self.documents, self.tokens = documents, tokens
        self.full = 0 in (documents, tokens)

    def take(self, lengths: Sequence[int]) -> int:
        """How many of the next documents, of `lengths` tokens, are taken: all up to the first for which no room is
        left, which ends it."""
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
        """Take so many of both if there is room for all of them."""
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

    unit: int | None  # that is taken in part; None: the cap lies between two
    documents: int | None  # the room left for it
    tokens: int | None
    behind: list[int]  # the units that are left out


def room_of(source: SourceConfig) -> Room | None:
    """All the room that a source has; None where it has no cap."""
    if source.max_documents is None and source.max_tokens is None:
        return None
    return Room(source.max_documents, source.max_tokens)


def is_behind(source: SourceConfig, before: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a unit lies behind the cap for certain, by the journals of some of the units before it."""
    room = room_of(source)
    if room is None:
        return False
    return any(result["full"] or not room.hold(result["documents"], result["tokens"]) or room.full for result in before)


def find_cut(source: SourceConfig, results: Iterable[tuple[int, Mapping[str, Any]]]) -> Cut | None:
    """Where the cap of a source lies, by the numbers and journals of its units in order; None where it has none."""
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
    """The journal of a unit that lies behind the cap of its source."""
    counts = {"documents": 0, "tokens": 0, "drops": {}, "lines": 0, "inputs": [], "first_bad": None}
    return {"source": source, **counts, "full": True, "engine": None}
