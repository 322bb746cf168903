"""What one worker does with one task of a build: a unit to a shard, a unit to keys, a bucket to its duplicates."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.build.caps import Room, not_read, room_of
from data_pipeline.build.journals import Journals
from data_pipeline.build.parallel import Report, Stage
from data_pipeline.clean import dedup
from data_pipeline.clean.filters import Filter, blocked, chosen, edits, sampled
from data_pipeline.config import BuildConfig
from data_pipeline.document import BEHIND, Meter, Record, Unit
from data_pipeline.read.compressed import suffix_of
from data_pipeline.read.readers import read
from data_pipeline.read.units import PLAN, Plan, check_unchanged
from data_pipeline.tokenize.backends import REFERENCE, Encode, Mismatch, checked
from data_pipeline.tokenize.masked import encode_documents, framed
from data_pipeline.tokenize.tokenizer import Tokenizer, open_tokenizer
from data_pipeline.write import shuffle
from data_pipeline.write.manifest import Ledger
from data_pipeline.write.output import WORK, PartWriter
from ponder_scale.files.delete import delete_file
from ponder_scale.files.write import sync, sync_folder
from ponder_scale.shards.format import TOKENIZER, dtype_for
from ponder_scale.shards.manifest import ShardInfo

SPLITS = ("train", "heldout")
BATCH_DOCUMENTS = 1024
BATCH_BYTES = 2**21  # of text
DUPLICATE = "duplicate"

Writer = PartWriter | shuffle.Scatter


class _Bucket(NamedTuple):
    """The documents that one task of the gather stage puts in order."""

    source: str
    number: int  # in the source
    size: int  # bytes of input


class _Stored(Meter):
    """The hash and the number of the stored bytes that were read: of compressed files, not those of the records."""

    def __init__(self) -> None:
        super().__init__()
        self._hash = xxhash.xxh3_128()

    def update(self, content: bytes | memoryview, /) -> None:
        """Take the next bytes."""
        super().update(content)
        self._hash.update(content)

    def hexdigest(self) -> str:
        """The hash of all."""
        return self._hash.hexdigest()


class Tasks:
    """The tasks of the build in `folder`: a method for each stage, which does one task and returns its journal."""

    def __init__(self, folder: Path, config: BuildConfig, report: Report) -> None:
        self.folder, self.work, self.config = folder, folder / WORK, config
        self.plan = Plan(self.work / PLAN)
        self._report = report
        self.journals = Journals(self.plan, config, self.stage)

    def stage(self, name: str) -> Stage:
        """The tasks of a stage. Those before it must be done."""
        sizes: Any = self.plan.sizes
        if name == "duplicates":
            sizes = [dedup.KEY_BYTES * self._keys // self._key_buckets] * self._key_buckets
        elif name == "gather":
            sizes = [bucket.size for bucket in self._buckets]
        elif name == "cut":
            sizes = [self.plan.sizes[number] for number, _ in self.journals.cut_units]
        return Stage(self.work, name, sizes, self.config.lease_seconds)

    def keys(self, number: int, scratch: Path) -> dict[str, Any]:
        """The keys of the documents of a unit, for deduplication; of none that a filter leaves out anyway, or it would
        take its equals of other sources with it."""
        unit, documents = self.plan.unit(number), 0
        filters = self._filters(unit.source)
        keys_of = dedup.minhash_keys if self.config.deduplicate == "minhash" else dedup.exact_keys
        writer = dedup.KeyWriter(scratch, self.work / "keys", number)
        for record in self._documents(unit, None):
            text = record.text or ""
            if not any(screen(text) for screen in filters):
                writer.add(documents, keys_of(text))
            documents += 1
            if documents % BATCH_DOCUMENTS == 0:
                self._tell(min(self._consumed, unit.size), BATCH_DOCUMENTS, 0)
        self._tell(unit.size, documents % BATCH_DOCUMENTS, 0)
        return writer.close()

    def duplicates(self, bucket: int, scratch: Path) -> dict[str, Any]:
        """The duplicates whose key lies in a bucket."""
        found = dedup.find_duplicates(self.work / "keys", self._key_runs, bucket, self._key_buckets, self._seen)
        for name, values in found._asdict().items():
            with (scratch / f"{name}.npy").open("wb") as stream:
                np.save(stream, values)
                sync(stream)
            (scratch / f"{name}.npy").rename(self.work / "duplicates" / f"{bucket:06d}.{name}.npy")
        self._report(dedup.KEY_BYTES * self._keys // self._key_buckets, 0, 0)
        return {}

    def shards(self, number: int, scratch: Path) -> dict[str, Any]:
        """A unit as its shard of each split."""
        unit = self.plan.unit(number)
        if self.journals.is_behind(number, unit.source):
            self._report(unit.size, 0, 0)
            return {**not_read(unit.source), "shards": {split: [] for split in SPLITS}}
        return self._shards_of(number, unit, scratch, room_of(self.config.sources[unit.source]))

    def _shards_of(self, number: int, unit: Unit, scratch: Path, room: Room | None) -> dict[str, Any]:
        def writer(split: str) -> Writer:
            name = f"{split}-{number:05d}"
            return self._part(scratch, name, unit.source)

        result, writers = self._tokenize(number, unit, scratch, writer, room)
        return {**result, "shards": self._place(writers)}

    def scatter(self, number: int, scratch: Path) -> dict[str, Any]:
        """A unit as documents sorted by the bucket that each is to go to."""
        unit = self.plan.unit(number)
        if self.journals.is_behind(number, unit.source):
            self._report(unit.size, 0, 0)
            return not_read(unit.source)
        return self._scatter_of(number, unit, scratch, room_of(self.config.sources[unit.source]))

    def _scatter_of(self, number: int, unit: Unit, scratch: Path, room: Room | None) -> dict[str, Any]:
        own = sum(bucket.source == unit.source for bucket in self._buckets)

        def writer(split: str) -> Writer:
            seed = [self.config.seed, number, SPLITS.index(split)]
            prefix = scratch / f"{number:06d}-{split}"
            return shuffle.Scatter(prefix, own, self._dtype, seed, self._is_masked(unit.source))

        result, writers = self._tokenize(number, unit, scratch, writer, room)
        for some in writers.values():
            some.close()
        for path in scratch.glob(f"{number:06d}-*"):
            path.rename(self.work / "scatter" / path.name)
        sync_folder(self.work / "scatter")
        return result

    def cut(self, number: int, scratch: Path) -> dict[str, Any]:
        """The unit in which the cap of a source lies, done again with the room that those before it leave."""
        of_unit, cut = self.journals.cut_units[number]
        unit, room = self.plan.unit(of_unit), Room(cut.documents, cut.tokens)
        if self.config.shuffle:
            return self._scatter_of(of_unit, unit, scratch, room)
        before = self.journals.read.result(of_unit)
        result = self._shards_of(of_unit, unit, scratch, room)
        left = {info["name"] for infos in result["shards"].values() for info in infos}
        for info in (ShardInfo(**info) for infos in before["shards"].values() for info in infos):
            for name in info.files if info.name not in left else ():
                delete_file(self.folder / name)
        return result

    def gather(self, number: int, scratch: Path) -> dict[str, Any]:
        """A bucket as its shard of each split, documents in random order."""
        source, bucket, size = self._buckets[number]
        documents = tokens_written = 0
        units = [i for i in self.journals.units_of(source) if i not in self.journals.behind]
        writers = {}
        for split in SPLITS:
            name = f"{split}-{number:05d}"
            writers[split] = self._part(scratch, name, source)
            prefixes = [self.work / "scatter" / f"{unit:06d}-{split}" for unit in units]
            seed = [self.config.seed, number, SPLITS.index(split), 1]
            for some in shuffle.gather(prefixes, bucket, self._dtype, seed, self._is_masked(source)):
                writers[split].add(*some)
                documents, tokens_written = documents + len(some.lengths), tokens_written + len(some.tokens)
        self._report(size, documents, tokens_written)
        return {"source": source, "shards": self._place(writers)}

    def _part(self, scratch: Path, name: str, source: str) -> PartWriter:
        masked = self._is_masked(source)
        return PartWriter(scratch, name, source, self.config.shard_tokens, self._tokenizer.vocab_size, masked)

    def _is_masked(self, source: str) -> bool:
        """Whether not all tokens of a source count in the loss."""
        return self.config.sources[source].loss is not None

    def _place(self, writers: dict[str, Any]) -> dict[str, Any]:
        return {split: [asdict(info) for info in writer.close(self.folder)] for split, writer in writers.items()}

    def _tokenize(
        self, number: int, unit: Unit, scratch: Path, writer: Any, room: Room | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the journal, the writer of each split, not closed), by the fast engine while it agrees."""
        for name in (self._engine, REFERENCE):
            self._told = 0
            try:
                encode = checked(name, self._tokenizer)
                writers = {split: writer(split) for split in SPLITS}
                return {**self._fill(number, unit, scratch, encode, writers, copy(room)), "engine": name}, writers
            except Mismatch as error:
                self._tell(0, 0, 0)  # takes back what it had done
                print(
                    f"warning: unit {number}: {name} {error}; the unit is done again by the reference",
                    file=sys.stderr,
                    flush=True,
                )
        raise AssertionError("the reference agrees with itself")

    def _fill(
        self, number: int, unit: Unit, scratch: Path, encode: Encode, writers: dict[str, Any], room: Room | None
    ) -> dict[str, Any]:
        """Read, clean and tokenize a unit into the writers of its splits, as far as there is room; the journal."""
        dropped = scratch / f"{number:06d}.dropped.jsonl" if self.config.keep_dropped else None
        ledger = Ledger(unit.source, scratch / "quarantine", dropped)
        batch: list[tuple[str, Record]] = []
        masked = self._is_masked(unit.source)
        bound = int(self.config.heldout_fraction * 2**64)
        size = tokens = 0

        def write(consumed: int) -> None:
            nonlocal size, tokens
            lengths = self._write(batch, encode, writers, masked, room)
            for _, record in batch[len(lengths) :]:
                ledger.reject(BEHIND, record)
            self._tell(consumed, len(lengths), sum(lengths))
            ledger.documents, tokens, size = ledger.documents + len(lengths), tokens + sum(lengths), 0
            batch.clear()

        for record in self._wanted(number, unit, ledger):
            text = record.text or ""
            batch.append(("heldout" if bound and self._side(text) < bound else "train", record))
            size += len(text)
            if len(batch) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
                write(min(self._consumed, unit.size))
        write(unit.size)
        result = {**ledger.close(), "tokens": tokens, "full": room is not None and room.full}
        if dropped is not None:
            dropped.rename(self.work / "quarantine" / dropped.name)
        (scratch / "quarantine").rename(self.work / "quarantine" / f"{number:06d}.jsonl")
        return result

    def _side(self, text: str) -> int:
        """The hash that decides a document's split."""
        decides = text.strip() if self.config.split_by == "stripped" else text
        return xxhash.xxh3_64_intdigest(decides.encode(), seed=self.config.seed)

    def _write(
        self,
        batch: list[tuple[str, Record]],
        encode: Encode,
        writers: dict[str, Any],
        masked: bool,
        room: Room | None,
    ) -> list[int]:
        """Tokenize some documents, each of a split, and write those for which there is room: the tokens of each."""
        if room is not None and room.full:
            return []
        eod_id = self._tokenizer.eod_id if self.config.append_eod else None
        encoded = {}
        for split in SPLITS:
            if records := [record for name, record in batch if name == split]:
                encoded[split] = framed(encode_documents(encode, records, masked), self._tokenizer.bos_id, eod_id)
        left = {split: iter(documents.lengths.tolist()) for split, documents in encoded.items()}
        lengths = [next(left[split]) for split, _ in batch]
        taken = len(lengths) if room is None else room.take(lengths)
        for split, documents in encoded.items():
            writers[split].add(*documents.first(sum(name == split for name, _ in batch[:taken])))
        return lengths[:taken]

    def _wanted(self, number: int, unit: Unit, ledger: Ledger) -> Iterator[Record]:
        """The documents of a unit that are to be kept; what is left out is counted."""
        filters = self._filters(unit.source)
        if self.config.deduplicate == "none":
            duplicates: Any = ()
        else:
            duplicates = dedup.Duplicates(self.work / "duplicates", self._key_buckets, number)
        for count, record in enumerate(self._documents(unit, ledger)):
            text = record.text or ""
            if duplicates and count in duplicates:
                ledger.reject(DUPLICATE, record)
                continue
            reason = next(filter(None, (screen(text) for screen in filters)), None) if filters else None
            if reason is None:
                yield record
            else:
                ledger.reject(reason, record)

    def _filters(self, source: str) -> list[Filter]:
        config = self.config.sources[source]
        sample = [] if config.sample is None else [sampled(config.sample, self.config.seed)]
        return [*sample, *chosen(source, config.filters)]

    def _documents(self, unit: Unit, ledger: Ledger | None) -> Iterator[Record]:
        """The records of a unit that are documents; `_consumed` counts the bytes of input read for them."""
        config = self.config.sources[unit.source]
        shorten, by_url = edits(config.filters), blocked(config.filters)
        self._consumed = self._told = done = 0
        for piece in unit.pieces:
            hasher, compressed = _Stored(), bool(suffix_of(piece.path))
            for record in read(piece, config, self.config.max_document_bytes, hasher):
                self._consumed = done + hasher.bytes if compressed else self._consumed + record.size
                if record.text is not None:
                    text = record.text
                    if by_url is not None and (reason := by_url(record.url)):  # as if it were not there: see `keys`
                        if ledger is not None:
                            ledger.reject(reason, record)
                        continue
                    for edit in shorten:
                        text, counts = edit(text)
                        if counts and ledger is not None:
                            ledger.edited(counts)
                    yield record if text is record.text else record._replace(text=text)
                elif ledger is not None:
                    ledger.drop(piece, record)
            check_unchanged(piece)
            if ledger is not None:
                ledger.was_read(piece, hasher.hexdigest())
            done += piece.size

    def _tell(self, size: int, documents: int, tokens: int) -> None:
        """Report `size` bytes of the unit in hand as done, with the documents and tokens since the last report."""
        self._report(size - self._told, documents, tokens)
        self._told = size

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(
            self.folder / TOKENIZER,
            self.config.eod_token,
            self.config.bos_token,
            self.config.special_tokens_in_text == "tokens",
        )

    @property
    def _engine(self) -> str:
        return str(self.plan.header["engine"])

    @cached_property
    def _dtype(self) -> np.dtype:
        return dtype_for(self._tokenizer.vocab_size)

    @cached_property
    def _key_runs(self) -> list[int]:
        stage = self.stage("keys")
        return [stage.result(i)["runs"] for i in range(len(self.plan))]

    @cached_property
    def _key_buckets(self) -> int:
        return dedup.buckets(self._keys + len(self._seen))

    @cached_property
    def _seen(self) -> np.ndarray:
        """The keys of the set that this build adds to."""
        seen = self.plan.header.get("seen")
        return np.empty(0, dtype=np.uint64) if seen is None else dedup.open_keys(Path(seen))

    def write_keys(self, path: Path) -> None:
        """Write the keys of all documents that were compared, for what will be added to them."""
        with path.open("wb") as stream:
            for bucket in range(self._key_buckets):
                keys = np.load(self.work / "duplicates" / f"{bucket:06d}.new.npy", mmap_mode="r")
                stream.write(keys.astype("<u8").tobytes())
            sync(stream)

    @cached_property
    def _keys(self) -> int:
        stage = self.stage("keys")
        return sum(stage.result(i)["keys"] for i in range(len(self.plan)))

    @cached_property
    def _buckets(self) -> list[_Bucket]:
        """Those of the shuffle."""
        found = []
        for source in self.config.sources:
            sizes = [self.plan.sizes[number] for number in self.journals.units_of(source)]
            count = max(1, -(-sum(sizes) // shuffle.BUCKET_BYTES))
            if self.config.sources[source].streaming:  # of unknown size
                count = len(sizes)
            found += [_Bucket(source, i, sum(sizes) // count) for i in range(count)]
        return found
