"""What a build will take, from its plan and a sample: tokens, disk, processor time, and what would be dropped."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.clean.filters import blocked, chosen, edits, sampled
from data_pipeline.config import BuildConfig, SourceConfig
from data_pipeline.document import Piece, Unit
from data_pipeline.read.compressed import suffix_of
from data_pipeline.read.readers import read
from data_pipeline.read.sources import LeftOut, parquet_about
from data_pipeline.read.units import units
from data_pipeline.tokenize.backends import REFERENCE, Mismatch, checked, choose
from data_pipeline.tokenize.tokenizer import Tokenizer, open_tokenizer
from data_pipeline.write.output import places
from ponder_scale.errors import ConfigError
from ponder_scale.figures import span
from ponder_scale.shards.format import dtype_for

SAMPLES = 16  # places in the corpus that are looked at
INDEX_BYTES_PER_DOCUMENT = 20
WORTH_SPLITTING = 2**26  # bytes of a compressed file
UNITS_PER_CORE = 4  # at least, for all cores to end at about the same time


class _Meter:
    """Counts the bytes that a reader takes from a file, which for compressed ones are not those of the records."""

    def __init__(self) -> None:
        self.stored = 0

    def update(self, content: bytes | memoryview, /) -> None:
        """Take the next bytes."""
        self.stored += len(content)


@dataclass
class _Sample:
    input_bytes: int = 0  # as they are stored
    seconds: float = 0.0  # of processor time
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    drops: Counter[str] = field(default_factory=Counter)


def estimate(config: BuildConfig, sample_bytes: int) -> str:
    """Some lines: the units of the build, and what a sample of about `sample_bytes` lets expect of the whole.

    Raises a UserError for inputs and a tokenizer that cannot be used.
    """
    left_out = LeftOut()
    found = list(units(config.sources, config.shard_bytes, left_out, places(Path(config.out).resolve())))
    for line in left_out:
        print(line, file=sys.stderr, flush=True)
    if not found:
        raise ConfigError(f"sources: {', '.join(config.sources)}: nothing in them")
    planned = [unit for unit in found if not config.sources[unit.source].streaming]
    if not planned:
        raise ConfigError(
            f"sources: {', '.join(config.sources)}: streamed, and nobody knows how large a stream is before it is "
            f"read; plan with streaming=false, or build without a plan"
        )
    total = sum(unit.size for unit in planned)
    sample = _Sample()
    looked_at = [planned[i * len(planned) // SAMPLES] for i in range(min(SAMPLES, len(planned)))]
    for unit in looked_at:
        _read(unit, config, sample_bytes // len(looked_at), sample)
    engine = _tokenize(config, sample)
    factor = total / max(1, sample.input_bytes)
    documents, tokens = len(sample.texts) * factor, sample.tokens * factor
    itemsize = dtype_for(_tokenizer(config).vocab_size).itemsize
    disk = tokens * itemsize + documents * INDEX_BYTES_PER_DOCUMENT
    hours, cores = sample.seconds * factor / 3600, len(os.sched_getaffinity(0))
    records = len(sample.texts) + sample.drops.total()
    drops = ", ".join(f"{count / records:.2%} {reason}" for reason, count in sample.drops.most_common()) or "nothing"
    largest = max(unit.size for unit in planned) / 1e6
    whole = [piece for unit in planned for piece in unit.pieces if suffix_of(piece.path)]
    uncut = [piece for piece in whole if piece.size > max(WORTH_SPLITTING, total / (cores * UNITS_PER_CORE))]
    note = f"; {len(uncut):,} compressed files cannot be cut: split them to use all cores" if uncut else ""
    note += f"; {len(found) - len(planned):,} streamed units, of unknown size, not counted" if found != planned else ""
    return "\n".join(
        [
            f"input       {total / 1e9:,.3f} GB in {len(planned):,} units of up to {largest:,.1f} MB{note}",
            f"sampled     {sample.input_bytes / 1e6:,.1f} MB at {len(looked_at)} places, by {engine}",
            f"documents   about {documents:,.0f}; dropped: {drops}",
            f"tokens      about {tokens / 1e6:,.1f} million, {tokens / max(total, 1):.3f} for each byte of input",
            f"disk        about {disk * (2 if config.shuffle else 1) / 1e9:,.3f} GB",
            f"time        about {hours:,.3f} core hours; {span(3600 * hours / cores)} on all {cores} cores of this "
            "machine",
        ]
    )


def _read(unit: Unit, config: BuildConfig, size: int, sample: _Sample) -> None:
    source = config.sources[unit.source]
    filters, shorten = chosen(unit.source, source.filters), edits(source.filters)
    by_url = blocked(source.filters)
    if source.sample is not None:
        filters.insert(0, sampled(source.sample, config.seed))
    begin, stored = time.process_time(), 0
    for piece in unit.pieces:
        meter, rows, taken = _Meter(), _rows(piece, source), 0
        for count, record in enumerate(read(piece, source, config.max_document_bytes, meter), start=1):
            text = record.text or ""
            for edit in shorten:
                text, _ = edit(text)
            reason = (
                record.reason
                or (by_url and by_url(record.url))
                or next(filter(None, (screen(text) for screen in filters)), None)
            )
            if record.text is not None and reason is None:
                sample.texts.append(text)
            else:
                sample.drops[reason or ""] += 1
            taken = meter.stored if rows is None else piece.size * count // rows
            if stored + taken >= size:
                break
        stored += meter.stored if rows is None else taken
        if stored >= size:
            break
    sample.input_bytes += stored
    sample.seconds += time.process_time() - begin


def _rows(piece: Piece, source: SourceConfig) -> int | None:
    """How many there are, where bytes are not read one after another."""
    if source.kind == "parquet":
        _, metadata = parquet_about(piece)
        return sum(metadata.row_group(i).num_rows for i in range(piece.begin, piece.end))
    return piece.end - piece.begin if source.kind == "dataset" else None


def _tokenize(config: BuildConfig, sample: _Sample) -> str:
    tokenizer = _tokenizer(config)

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)

    def count(engine: str) -> None:
        encode, begin, sample.tokens = checked(engine, tokenizer), time.process_time(), 0
        for first in range(0, len(sample.texts), 256):
            tokens, lengths = encode(sample.texts[first : first + 256])
            sample.tokens += len(tokens) + len(lengths)
        sample.seconds += time.process_time() - begin

    engine = choose(config.backend, tokenizer, sample.texts[:32], warn)
    try:
        count(engine)
    except Mismatch as error:
        warn(f"{engine} {error}; the sample is done again by the reference")
        count(engine := REFERENCE)
    return engine


def _tokenizer(config: BuildConfig) -> Tokenizer:
    in_text = config.special_tokens_in_text == "tokens"
    return open_tokenizer(Path(config.tokenizer), config.eod_token, config.bos_token, in_text)
