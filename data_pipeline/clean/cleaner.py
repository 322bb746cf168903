"""Apply all filters of one source to a document, in this order: by its URL, edits of its text, by its text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from data_pipeline.clean.filters import Filter, blocked, chosen, edits, sampled
from data_pipeline.config import SourceConfig
from data_pipeline.document import Record


class Cleaner:
    """The filters of one source. Raises ConfigError for an unknown filter or threshold."""

    def __init__(self, name: str, source: SourceConfig, seed: int) -> None:
        sample = [] if source.sample is None else [sampled(source.sample, seed)]
        self._screens: list[Filter] = [*sample, *chosen(name, source.filters)]
        self._edits, self._by_url = edits(source.filters), blocked(source.filters)

    def by_url(self, record: Record) -> str | None:
        """The reason to drop a document because of its URL, or None."""
        return None if self._by_url is None else self._by_url(record.url)

    def edited(self, record: Record) -> tuple[Record, Mapping[str, int]]:
        """The document after the edits, and how much of each kind was removed or replaced."""
        if not self._edits:
            return record, {}
        text, went = record.text or "", Counter[str]()
        for edit in self._edits:
            text, counts = edit(text)
            went.update(counts)
        return (record if text == record.text else record._replace(text=text)), went

    def by_text(self, text: str) -> str | None:
        """The reason to drop a document because of its edited text, or None."""
        return next(filter(None, (screen(text) for screen in self._screens)), None)
