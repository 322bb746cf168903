"""What a build will take, from its plan and a sample: tokens, disk, processor time, and what would be dropped."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.backends import choose, open_engine
from data_pipeline.config import BuildConfig
from data_pipeline.document import Unit
from data_pipeline.filters import chosen
from data_pipeline.readers import read
from data_pipeline.sources import COMPRESSED
from data_pipeline.tokenizer import Tokenizer, open_tokenizer
from data_pipeline.units import units
from ponder_scale.errors import ConfigError
from ponder_scale.shards import dtype_for

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
    planned = list(units(config.sources, config.shard_bytes))
    if not planned:
        raise ConfigError(f"sources: {', '.join(config.sources)}: nothing in them")
    total = sum(unit.size for unit in planned)
    sample = _Sample()
    places = [planned[i * len(planned) // SAMPLES] for i in range(min(SAMPLES, len(planned)))]
    for unit in places:
        _read(unit, config, sample_bytes // len(places), sample)
    engine = _tokenize(config, sample)
    factor = total / max(1, sample.input_bytes)
    documents, tokens = len(sample.texts) * factor, sample.tokens * factor
    itemsize = dtype_for(_tokenizer(config).vocab_size).itemsize
    disk = tokens * itemsize + documents * INDEX_BYTES_PER_DOCUMENT
    hours, cores = sample.seconds * factor / 3600, len(os.sched_getaffinity(0))
    records = len(sample.texts) + sample.drops.total()
    drops = ", ".join(f"{count / records:.2%} {reason}" for reason, count in sample.drops.most_common()) or "nothing"
    largest = max(unit.size for unit in planned) / 1e6
    whole = [piece for unit in planned for piece in unit.pieces if piece.path.endswith(COMPRESSED)]
    uncut = [piece for piece in whole if piece.size > max(WORTH_SPLITTING, total / (cores * UNITS_PER_CORE))]
    note = f"; {len(uncut):,} compressed files cannot be cut: split them to use all cores" if uncut else ""
    return "\n".join(
        [
            f"input       {total / 1e9:,.3f} GB in {len(planned):,} units of up to {largest:,.1f} MB{note}",
            f"sampled     {sample.input_bytes / 1e6:,.1f} MB at {len(places)} places, by {engine}",
            f"documents   about {documents:,.0f}; dropped: {drops}",
            f"tokens      about {tokens / 1e6:,.1f} million, {tokens / max(total, 1):.3f} for each byte of input",
            f"disk        about {disk * (2 if config.shuffle else 1) / 1e9:,.3f} GB",
            f"time        about {hours:,.3f} core hours; {_clock(hours / cores)} on all {cores} cores of this machine",
        ]
    )


def _read(unit: Unit, config: BuildConfig, size: int, sample: _Sample) -> None:
    source = config.sources[unit.source]
    filters = chosen(unit.source, source.filters)
    begin, stored = time.process_time(), 0
    by_bytes = source.kind not in ("parquet", "dataset")  # others are read in whole pieces
    for piece in unit.pieces:
        meter = _Meter()
        for record in read(piece, source, config.max_document_bytes, meter):
            reason = record.reason or next(filter(None, (screen(record.text or "") for screen in filters)), None)
            if record.text is not None and reason is None:
                sample.texts.append(record.text)
            else:
                sample.drops[reason or ""] += 1
            if by_bytes and stored + meter.stored >= size:
                break
        stored += meter.stored if by_bytes else piece.size
        if stored >= size:
            break
    sample.input_bytes += stored
    sample.seconds += time.process_time() - begin


def _tokenize(config: BuildConfig, sample: _Sample) -> str:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _tokenizer(config)
    engine = choose(
        config.backend, tokenizer, sample.texts[:32], lambda line: print(f"warning: {line}", file=sys.stderr)
    )
    encode = open_engine(engine, tokenizer)
    begin = time.process_time()
    for first in range(0, len(sample.texts), 256):
        tokens, lengths = encode(sample.texts[first : first + 256])
        sample.tokens += len(tokens) + len(lengths)
    sample.seconds += time.process_time() - begin
    return engine


def _tokenizer(config: BuildConfig) -> Tokenizer:
    in_text = config.special_tokens_in_text == "tokens"
    return open_tokenizer(Path(config.tokenizer), config.eod_token, config.bos_token, in_text)


def _clock(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:,.1f} seconds"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
