"""Turn one unit of input into its shards: read, clean, tokenize, write.

This module knows nothing of workers, kills, resumption or progress lines. `stages` decides when to skip a unit and what
to do if an engine fails. `parallel` gives each task its folder, and gives its journal the final name that makes the
task done. `progress.told` reports what `make_shard` yields.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.build.caps import Room
from data_pipeline.build.state import Build
from data_pipeline.clean.cleaner import Cleaner
from data_pipeline.config import BuildConfig
from data_pipeline.document import BEHIND, Record, Unit
from data_pipeline.progress import Doing, Done
from data_pipeline.read.records import Records
from data_pipeline.tokenize.backends import Encode, checked
from data_pipeline.tokenize.masked import Encoded, encode_documents, framed
from data_pipeline.write.manifest import Ledger
from data_pipeline.write.output import PartWriter
from data_pipeline.write.shuffle import Scatter

SPLITS = TRAIN, HELDOUT = "train", "heldout"
BATCH_DOCUMENTS = 1024
BATCH_BYTES = 2**21  # of text
DUPLICATE = "duplicate"

Writer = PartWriter | Scatter
Sided = tuple[str, Record]  # a document and its split


def make_shard(unit: Unit, build: Build, scratch: Path, engine: str, room: Room) -> Doing:
    """Turn a unit into one shard for each split, or several if a split is large. Yields progress after each batch.

    All output lies in `scratch` until it is complete. Then it gets its final names.

    Args:
        engine: the tokenizer engine, which the journal records.
        room: documents that do not fit are counted and left out.

    Raises:
        Mismatch: the engine fails or gives other tokens than the reference. No output has its final name by then.
        ConfigError: an input cannot be read, or it has changed since it was planned.
    """
    config, source = build.config, build.config.sources[unit.source]
    encode, masked = checked(engine, build.tokenizer), build.is_masked(unit.source)
    cleaner = Cleaner(unit.source, source, config.seed)
    ledger = Ledger(unit, scratch, config.keep_dropped)
    writers = {split: _writer(split, unit, build, scratch) for split in SPLITS}

    records = Records(unit, source, config.max_document_bytes)  # reads each record on demand
    documents = documents_of(records, cleaner, ledger)
    kept = _clean(documents, cleaner, build.duplicates(unit), ledger)
    for batch in _batches(kept, config):
        written: list[int] = []
        if not room.full:
            tokens = _tokenize(batch, encode, masked, build)
            written = _write(batch, tokens, writers, room)
        ledger.wrote(written)
        for _, record in batch[len(written) :]:
            ledger.reject(BEHIND, record)
        yield Done(records.consumed, ledger.documents, ledger.tokens)
    for piece, digest in records.inputs:
        ledger.was_read(piece, digest)

    journal = {**ledger.close(build.work / "quarantine"), "full": room.full, "engine": engine}
    shards = placed(writers, build.work / "scatter" if config.shuffle else build.folder)
    return journal if config.shuffle else {**journal, "shards": shards}


def documents_of(records: Records, cleaner: Cleaner, ledger: Ledger | None) -> Iterator[tuple[int, Record]]:
    """Yield (number, document) for the documents of a unit, after edits.

    A record that is not a document has no number, and neither has a document that is dropped for its URL. `ledger`
    counts these and the edits. Deduplication identifies documents by number, so every stage must get the numbers from
    here.
    """
    number = 0
    for piece, record in records:
        if record.text is None:
            if ledger is not None:
                ledger.drop(piece, record)
        elif reason := cleaner.by_url(record):
            if ledger is not None:
                ledger.reject(reason, record)
        else:
            document, went = cleaner.edited(record)
            if ledger is not None:
                ledger.edited(went)
            yield number, document
            number += 1


def _clean(
    documents: Iterable[tuple[int, Record]], cleaner: Cleaner, duplicates: Container[int], ledger: Ledger
) -> Iterator[Record]:
    """Yield the documents that are not duplicates and that no filter drops. Count the others."""
    for number, document in documents:
        reason = DUPLICATE if number in duplicates else cleaner.by_text(document.text or "")
        if reason is None:
            yield document
        else:
            ledger.reject(reason, document)


def _batches(documents: Iterable[Record], config: BuildConfig) -> Iterator[list[Sided]]:
    """Yield documents with their splits in batches. The last batch may be empty."""
    batch: list[Sided] = []
    size = 0
    for document in documents:
        text = document.text or ""
        batch.append((_side(text, config), document))
        size += len(text)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _side(text: str, config: BuildConfig) -> str:
    """The split of a document, from a hash of its text."""
    bound = int(config.heldout_fraction * 2**64)
    if not bound:
        return TRAIN
    decides = text.strip() if config.split_by == "stripped" else text
    return HELDOUT if xxhash.xxh3_64_intdigest(decides.encode(), seed=config.seed) < bound else TRAIN


def _tokenize(batch: Sequence[Sided], encode: Encode, masked: bool, build: Build) -> dict[str, Encoded]:
    """The tokens of some documents for each split, with begin and end tokens. Omits a split without documents."""
    eod_id = build.tokenizer.eod_id if build.config.append_eod else None
    tokens = {}
    for split in SPLITS:
        if records := [record for side, record in batch if side == split]:
            tokens[split] = framed(encode_documents(encode, records, masked), build.tokenizer.bos_id, eod_id)
    return tokens


def _write(
    batch: Sequence[Sided], tokens: Mapping[str, Encoded], writers: Mapping[str, Writer], room: Room
) -> list[int]:
    """Write the documents that fit in `room`. Returns the number of tokens of each."""
    left = {split: iter(of_split.lengths.tolist()) for split, of_split in tokens.items()}
    lengths = [next(left[side]) for side, _ in batch]
    taken = room.take(lengths)
    for split, of_split in tokens.items():
        writers[split].add(*of_split.first(sum(side == split for side, _ in batch[:taken])))
    return lengths[:taken]


def _writer(split: str, unit: Unit, build: Build, scratch: Path) -> Writer:
    if not build.config.shuffle:
        return part_writer(f"{split}-{unit.number:05d}", unit.source, build, scratch)
    buckets = sum(bucket.source == unit.source for bucket in build.buckets)
    seed = [build.config.seed, unit.number, SPLITS.index(split)]
    return Scatter(scratch / f"{unit.number:06d}-{split}", buckets, build.dtype, seed, build.is_masked(unit.source))


def part_writer(name: str, source: str, build: Build, scratch: Path) -> PartWriter:
    """A writer for documents of one source, as shards with names that begin with `name`."""
    size, vocabulary = build.config.shard_tokens, build.tokenizer.vocab_size
    return PartWriter(scratch, name, source, size, vocabulary, build.is_masked(source))


def placed(writers: Mapping[str, Writer], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Move the output to its final names in `folder`. Returns the shards of each split, for the journal."""
    return {split: [asdict(info) for info in writer.close(folder)] for split, writer in writers.items()}
