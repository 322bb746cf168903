"""The texts from which a tokenizer learns: the documents of a build's sources, in the shares that its weights give.

Dropped records are counted by source and reason, as in a build. If too many are bad, training ends before it begins.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_pipeline.clean.cleaner import Cleaner
from data_pipeline.config import BuildConfig
from data_pipeline.document import BAD, BEHIND, Meter
from data_pipeline.progress import Progress
from data_pipeline.read.compressed import suffix_of
from data_pipeline.read.readers import read
from data_pipeline.read.sources import LeftOut
from data_pipeline.read.units import check_unchanged, units
from ponder_scale.errors import ConfigError

_WITH_FIELD = ("jsonl", "parquet", "dataset")  # a wrong field name loses the whole source, even a small one


@dataclass
class Read:
    """What was read from one source."""

    documents: int = 0
    bytes: int = 0  # size of the texts in UTF-8
    drops: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""  # file, offset and reason

    @property
    def records(self) -> int:
        """All records, whether they are documents or not."""
        return self.documents + self.drops.total()

    @property
    def bad(self) -> int:
        """Records with an error in the input."""
        return sum(self.drops[reason] for reason in BAD)


def texts_to_learn(config: BuildConfig, counts: dict[str, Read]) -> Iterator[str]:
    """Yield the texts of all sources that the filters keep. Duplicates are kept too. Fills `counts` by source.

    With weights, the source that is smallest for its weight is taken whole. From each other source, evenly spaced
    documents are taken, so that the bytes of text follow the weights. Raises ConfigError if more than
    `max_bad_fraction` of all records are bad, or if a source with a field has only bad records.
    """
    if capped := [f"sources.{name}.max_tokens" for name, source in config.sources.items() if source.max_tokens]:
        print(
            f"warning: {', '.join(capped)}: ignored, because there are no tokens yet; use max_documents",
            file=sys.stderr,
            flush=True,
        )
    shares = dict.fromkeys(config.sources, 1.0)
    weights = {name: source.weight for name, source in config.sources.items() if source.weight is not None}
    if weights:
        found: dict[str, Read] = {}
        for _ in _documents(config, found, "count"):
            pass
        check_bad(config, found)
        wanted = {name: weight / max(1, found[name].bytes) for name, weight in weights.items()}
        most = max((share for name, share in wanted.items() if found[name].bytes), default=1.0)
        shares = {name: min(1.0, share / most) for name, share in wanted.items()}
    owed = dict.fromkeys(config.sources, 0.0)
    taken = {name: Read() for name in config.sources}
    for name, text in _documents(config, counts, "read"):
        owed[name] += shares[name]
        if owed[name] >= 1.0 - 1e-9:
            owed[name] -= 1.0
            taken[name].documents += 1
            taken[name].bytes += len(text.encode())
            yield text
    check_bad(config, counts)
    for name, of_source in counts.items():
        of_source.documents, of_source.bytes = taken[name].documents, taken[name].bytes
    print("learning the tokens", file=sys.stderr, flush=True)


def check_bad(config: BuildConfig, counts: dict[str, Read]) -> None:
    """Raise ConfigError if the share of bad records exceeds `max_bad_fraction`, as in `texts_to_learn`."""
    everything = Read(drops=sum((one.drops for one in counts.values()), Counter()))
    everything.documents = sum(one.documents for one in counts.values())
    everything.first_bad = next((one.first_bad for one in counts.values() if one.first_bad), "")
    of_field = {name: one for name, one in counts.items() if config.sources[name].kind in _WITH_FIELD}
    wholly = {f" of {name}": one for name, one in of_field.items() if not one.documents}
    for name, one in {**wholly, "": everything}.items():
        if one.bad > config.max_bad_fraction * one.records:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in one.drops.most_common() if reason in BAD)
            nothing = "" if everything.documents else "the inputs hold no text to train on: "
            raise ConfigError(
                f"{nothing}{one.bad:,} of {one.records:,} records{name} are bad ({reasons}), more than "
                f"max_bad_fraction {config.max_bad_fraction:g}; the first is {one.first_bad}; correct the input, name "
                f"the right field, or raise the bound (--max-bad-fraction, or the recipe's key)"
            )


def _documents(config: BuildConfig, counts: dict[str, Read], what: str) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of each document that the filters keep. Fills `counts` by source."""
    counts.update({name: Read() for name in config.sources})
    cleaners = {name: Cleaner(name, source, config.seed) for name, source in config.sources.items()}
    left_out = LeftOut()
    planned = list(units(config.sources, config.shard_bytes, left_out))
    for line in left_out if what == "read" else ():
        print(line, file=sys.stderr, flush=True)
    with Progress(what, sum(unit.size for unit in planned)) as progress:
        for piece in (piece for unit in planned for piece in unit.pieces):
            count, stored, told, consumed = counts[piece.source], Meter(), 0, 0
            compressed = bool(suffix_of(piece.path))
            for record in read(piece, config.sources[piece.source], config.max_document_bytes, stored):
                # In compressed files and parquet, records are larger than the bytes that they take there.
                consumed += record.size
                now = min(piece.size, stored.bytes if compressed else consumed)
                progress.add(now - told, record.text is not None)
                told, text, reason = now, record.text, record.reason
                if text is not None:
                    cleaner = cleaners[piece.source]
                    text = cleaner.edited(record)[0].text or ""
                    reason = cleaner.by_url(record) or cleaner.by_text(text) or ""
                if text is not None and not reason and count.documents == config.sources[piece.source].max_documents:
                    reason = BEHIND
                if text is None or reason:
                    count.drops[reason] += 1
                    if reason in BAD and not count.first_bad:
                        count.first_bad = f"{piece.name} at {record.offset:,}: {reason}"
                    continue
                count.documents += 1
                count.bytes += len(text.encode())
                yield piece.source, text
            check_unchanged(piece)
            progress.add(piece.size - told)
