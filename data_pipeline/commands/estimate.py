"""Estimate a build from its plan and a sample: tokens, disk, processor time, and the share that would be dropped."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.clean.cleaner import Cleaner
from data_pipeline.clean.dedup import BANDS
from data_pipeline.config import BuildConfig, SourceConfig
from data_pipeline.document import Meter, Piece, Unit
from data_pipeline.read.compressed import suffix_of
from data_pipeline.read.readers import read
from data_pipeline.read.sources import LeftOut, parquet_about
from data_pipeline.read.units import units
from data_pipeline.tokenize.backends import REFERENCE, Mismatch, checked, choose
from data_pipeline.tokenize.tokenizer import Tokenizer, tokenizer_of
from data_pipeline.write.output import places
from ponder_scale.errors import ConfigError
from ponder_scale.figures import count, span, stored, times
from ponder_scale.shards.format import dtype_for

SAMPLES = 16  # places in the corpus to sample
INDEX_BYTES = 20  # for each document
KEY_BYTES = {"none": 0, "exact": 8, "minhash": 8 * BANDS}  # for each document
WORTH_SPLITTING = 2**26  # size in bytes from which a compressed file should be split
UNITS_PER_CORE = 4  # at least, so that all cores end at about the same time


@dataclass
class _Sample:
    input_bytes: int = 0  # as stored
    seconds: float = 0.0  # of processor time
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    drops: Counter[str] = field(default_factory=Counter)


@dataclass
class _Expected:
    """The estimate for one source."""

    documents: float
    tokens: float  # in both splits
    seconds: float  # of processor time
    records: float
    drops: dict[str, float]
    capped: bool  # the source has more than its cap


def estimate(config: BuildConfig, sample_bytes: int, training_tokens: float | None = None) -> str:
    """Lines that describe the units of the build and the estimate for the whole and for each source.

    `sample_bytes` is the approximate size of the sample. With `training_tokens`, the lines also say how often a run of
    that length reads each source. Raises a UserError for inputs or a tokenizer that cannot be used.
    """
    left_out = LeftOut()
    found = list(units(config.sources, config.shard_bytes, left_out, places(Path(config.out).resolve())))
    for line in left_out:
        print(line, file=sys.stderr, flush=True)
    if not found:
        raise ConfigError(f"sources: {', '.join(config.sources)}: they are empty; check their path and pattern")
    planned = [unit for unit in found if not config.sources[unit.source].streaming]
    if not planned:
        raise ConfigError(
            f"sources: {', '.join(config.sources)}: the size of a stream is unknown before it is read; "
            f"plan with streaming=false, or build without a plan"
        )
    total = sum(unit.size for unit in planned)
    samples, looked_at = _samples(planned, total, config, sample_bytes)
    tokenizer = tokenizer_of(Path(config.tokenizer), config)
    engine = _tokenize(config, tokenizer, list(samples.values()))
    sizes = {name: sum(unit.size for unit in planned if unit.source == name) for name in samples}
    expected = {name: _expect(config.sources[name], sample, sizes[name]) for name, sample in samples.items()}
    documents, tokens, seconds, records = (
        sum(getattr(one, what) for one in expected.values()) for what in ("documents", "tokens", "seconds", "records")
    )
    drops = sum((Counter(one.drops) for one in expected.values()), Counter[str]())
    dropped = ", ".join(f"{count / records:.2%} {reason}" for reason, count in drops.most_common()) or "nothing"
    shuffled = 2 if config.shuffle else 1
    disk = shuffled * (tokens * dtype_for(tokenizer.vocab_size).itemsize + documents * INDEX_BYTES)
    disk += documents * KEY_BYTES[config.deduplicate]
    cores, read = len(os.sched_getaffinity(0)), sum(sample.input_bytes for sample in samples.values())
    return "\n".join(
        [
            f"input       {stored(total)} in {len(planned):,} units of up to "
            f"{stored(max(unit.size for unit in planned))}{_note(planned, len(found), total, cores)}",
            f"sampled     {stored(read)} at {looked_at} places, by {engine}",
            f"documents   about {documents:,.0f}; dropped: {dropped}",
            f"tokens      about {count(round(tokens))}, {tokens / max(total, 1):.3f} for each byte of input",
            *_source_lines(config, expected, training_tokens),
            f"disk        about {stored(disk)}",
            f"time        about {_of_cores(seconds)}; {span(seconds / cores)} on all {cores} cores of this machine",
        ]
    )


def _of_cores(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} core hours" if seconds >= 3600 else f"{span(seconds)} of one core"


def _samples(planned: list[Unit], total: int, config: BuildConfig, sample_bytes: int) -> tuple[dict[str, _Sample], int]:
    """Sample each source at a number of places that grows with its size, at least one. Returns the samples and all
    places.
    """
    samples, looked_at = {}, 0
    for name in config.sources:
        of_source = [unit for unit in planned if unit.source == name]
        if not of_source:
            continue
        share = sum(unit.size for unit in of_source) / max(total, 1)
        places = max(1, min(len(of_source), round(SAMPLES * share)))
        samples[name] = _Sample()
        for unit in (of_source[i * len(of_source) // places] for i in range(places)):
            _read(unit, config, max(1, int(sample_bytes * share / places)), samples[name])
        looked_at += places
    return samples, looked_at


def _expect(source: SourceConfig, sample: _Sample, size: int) -> _Expected:
    factor = size / max(1, sample.input_bytes)
    documents, tokens = len(sample.texts) * factor, sample.tokens * factor
    caps = [(source.max_documents, documents), (source.max_tokens, tokens)]
    part = min((cap / most for cap, most in caps if cap is not None and most > cap), default=1.0)
    drops = {reason: dropped * factor * part for reason, dropped in sample.drops.items()}
    records = (len(sample.texts) + sample.drops.total()) * factor * part
    return _Expected(documents * part, tokens * part, sample.seconds * factor * part, records, drops, part < 1)


def _source_lines(
    config: BuildConfig, expected: Mapping[str, _Expected], training_tokens: float | None
) -> Iterator[str]:
    """A line for each source: its estimate, and how often a run reads it by its weight or, without weights, by its
    size.
    """
    weights = {name: source.weight for name, source in config.sources.items() if source.weight is not None}
    whole = math.fsum(weights.values()) if weights else sum(one.tokens for one in expected.values())
    for name in config.sources:
        if name not in expected:
            yield f"source      {name}: a stream, of which nobody knows the size"
            continue
        one = expected[name]
        share = (weights[name] if weights else one.tokens) / whole if whole else 0.0
        trained = one.tokens * (1 - config.heldout_fraction)
        line = f"source      {name}: about {one.documents:,.0f} documents, {count(round(one.tokens))} tokens"
        line += f"{' (its cap)' if one.capped else ''}, {share:.1%} of a run"
        if training_tokens is not None and trained:
            line += f", {times(training_tokens * share / trained)} epochs in {count(training_tokens)} tokens"
        elif weights and share:
            line += f", an epoch in {count(round(trained / share))} tokens of it"
        yield line


def _note(planned: list[Unit], units: int, total: int, cores: int) -> str:
    whole = [piece for unit in planned for piece in unit.pieces if suffix_of(piece.path)]
    uncut = [piece for piece in whole if piece.size > max(WORTH_SPLITTING, total / (cores * UNITS_PER_CORE))]
    note = f"; {len(uncut):,} compressed files cannot be cut: split them to use all cores" if uncut else ""
    streamed = units - len(planned)
    return note + (f"; {streamed:,} streamed units, of unknown size, not counted" if streamed else "")


def _read(unit: Unit, config: BuildConfig, size: int, sample: _Sample) -> None:
    source = config.sources[unit.source]
    cleaner = Cleaner(unit.source, source, config.seed)
    begin, read_bytes = time.process_time(), 0
    for piece in unit.pieces:
        meter, rows, taken = Meter(), _rows(piece, source), 0
        for number, record in enumerate(read(piece, source, config.max_document_bytes, meter), start=1):
            text = cleaner.edited(record)[0].text or ""
            reason = record.reason or cleaner.by_url(record) or cleaner.by_text(text)
            if record.text is not None and reason is None:
                sample.texts.append(text)
            else:
                sample.drops[reason or ""] += 1
            taken = meter.bytes if rows is None else piece.size * number // rows
            if read_bytes + taken >= size:
                break
        read_bytes += meter.bytes if rows is None else taken
        if read_bytes >= size:
            break
    sample.input_bytes += read_bytes
    sample.seconds += time.process_time() - begin


def _rows(piece: Piece, source: SourceConfig) -> int | None:
    """The number of rows in a piece, for kinds of which bytes are not read in sequence. None for other kinds."""
    if source.kind == "parquet":
        _, metadata = parquet_about(piece)
        return sum(metadata.row_group(i).num_rows for i in range(piece.begin, piece.end))
    return piece.end - piece.begin if source.kind == "dataset" else None


def _tokenize(config: BuildConfig, tokenizer: Tokenizer, samples: list[_Sample]) -> str:
    # tokens that a document has besides those of its text
    around = int(config.append_eod) + int(tokenizer.bos_id is not None)

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)

    def tokenize(engine: str) -> None:
        encode = checked(engine, tokenizer)
        for sample in samples:
            begin, sample.tokens = time.process_time(), 0
            for first in range(0, len(sample.texts), 256):
                tokens, lengths = encode(sample.texts[first : first + 256])
                sample.tokens += len(tokens) + around * len(lengths)
            sample.seconds += time.process_time() - begin

    engine = choose(config.backend, tokenizer, [text for sample in samples for text in sample.texts][:32], warn)
    try:
        tokenize(engine)
    except Mismatch as error:
        warn(f"{engine} {error}; the reference processes the sample again")
        tokenize(engine := REFERENCE)
    return engine
