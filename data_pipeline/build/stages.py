"""The stages of a build, in the order in which they run. See `STAGES` at the end of this file.

A stage consists of tasks, and a function does one task. The function receives the build, the number of the task and an
empty folder of its own. It yields progress from time to time and returns the journal of the task. Its output depends on
the task alone, so it does not matter who does it, when, or how often.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.build.caps import Room, not_read, room_of
from data_pipeline.build.shard import BATCH_DOCUMENTS, SPLITS, documents_of, make_shard, part_writer, placed
from data_pipeline.build.state import Build
from data_pipeline.clean import dedup
from data_pipeline.clean.cleaner import Cleaner
from data_pipeline.config import BuildConfig
from data_pipeline.document import Unit
from data_pipeline.progress import Doing, Done
from data_pipeline.read.records import Records
from data_pipeline.tokenize.backends import REFERENCE, Mismatch
from data_pipeline.write import shuffle
from ponder_scale.files.delete import delete_file
from ponder_scale.files.write import sync
from ponder_scale.shards.manifest import ShardInfo


class Stage(NamedTuple):
    """One stage. File names are globs below the unfinished folder. Journals and the plan are not listed."""

    name: str  # name of the folder with its journals
    title: str  # name in progress lines
    is_needed: Callable[[BuildConfig], bool]
    sizes: Callable[[Build], Sequence[int]]  # sizes of its tasks, in bytes to process
    task: Callable[[Build, int, Path], Doing]
    reads: tuple[str, ...]  # files from earlier stages
    leaves: tuple[str, ...]


def keys_of_unit(build: Build, number: int, scratch: Path) -> Doing:
    """The deduplication keys of a unit's documents.

    Documents that a filter drops get no keys. Otherwise they would also remove equal documents of other sources.
    """
    unit, config = build.plan.unit(number), build.config
    cleaner = Cleaner(unit.source, config.sources[unit.source], config.seed)
    keys_of = dedup.minhash_keys if config.deduplicate == "minhash" else dedup.exact_keys
    writer = dedup.KeyWriter(scratch, build.work / "keys", number)
    records, count = Records(unit, config.sources[unit.source], config.max_document_bytes), 0
    for i, document in documents_of(records, cleaner, None):
        text, count = document.text or "", i + 1
        if cleaner.by_text(text) is None:
            writer.add(i, keys_of(text))
        if count % BATCH_DOCUMENTS == 0:
            yield Done(records.consumed, count)
    yield Done(unit.size, count)
    return dict(writer.close())


def duplicates_of_bucket(build: Build, bucket: int, scratch: Path) -> Doing:
    """Find the documents of all units whose key lies in this bucket and equals the key of an earlier document."""
    found = dedup.find_duplicates(build.work / "keys", build.key_runs, bucket, build.key_buckets, build.seen)
    for name, values in found._asdict().items():
        with (scratch / f"{name}.npy").open("wb") as stream:
            np.save(stream, values)
            sync(stream)
        (scratch / f"{name}.npy").rename(build.work / "duplicates" / f"{bucket:06d}.{name}.npy")
    yield Done(_key_bucket_sizes(build)[bucket])
    return {}


def shard_of_unit(build: Build, number: int, scratch: Path) -> Doing:
    """Turn a unit into its shard of each split. For a shuffle, sort its documents by their target bucket instead."""
    unit = build.plan.unit(number)
    if build.is_behind(unit):
        yield Done(unit.size)
        journal = not_read(unit.source)
        return journal if build.config.shuffle else {**journal, "shards": {split: [] for split in SPLITS}}
    room = room_of(build.config.sources[unit.source]) or Room(None, None)
    return (yield from _by_an_engine_that_agrees(unit, build, scratch, room))


def shard_of_cut_unit(build: Build, number: int, scratch: Path) -> Doing:
    """Process the unit in which the cap of a source lies again, with the room that earlier units leave."""
    of_unit, cut = build.cut_units[number]
    before = build.read.of(of_unit)
    room = Room(cut.documents, cut.tokens)
    journal = yield from _by_an_engine_that_agrees(build.plan.unit(of_unit), build, scratch, room)
    if not build.config.shuffle:
        left = {info["name"] for infos in journal["shards"].values() for info in infos}
        for info in (ShardInfo(**info) for infos in before["shards"].values() for info in infos):
            for name in info.files if info.name not in left else ():
                delete_file(build.folder / name)
    return journal


def shard_of_bucket(build: Build, number: int, scratch: Path) -> Doing:
    """Turn a bucket into its shard of each split, with its documents in random order."""
    source, bucket, size = build.buckets[number]
    documents = tokens = 0
    units = [i for i in build.units_of(source) if i not in build.behind]
    writers = {split: part_writer(f"{split}-{number:05d}", source, build, scratch) for split in SPLITS}
    for split, writer in writers.items():
        prefixes = [build.work / "scatter" / f"{unit:06d}-{split}" for unit in units]
        seed = [build.config.seed, number, SPLITS.index(split), 1]
        for some in shuffle.gather(prefixes, bucket, build.dtype, seed, build.is_masked(source)):
            writer.add(*some)
            documents, tokens = documents + len(some.lengths), tokens + len(some.tokens)
    yield Done(size, documents, tokens)
    return {"source": source, "shards": placed(writers, build.folder)}


def _by_an_engine_that_agrees(unit: Unit, build: Build, scratch: Path, room: Room) -> Doing:
    """Run `make_shard` with the fast engine. If that fails or gives other tokens, run it again with the reference."""
    for engine in (build.engine, REFERENCE):
        try:
            return (yield from make_shard(unit, build, scratch, engine, copy(room)))
        except Mismatch as error:
            yield Done(0)  # takes back the progress that was reported
            print(
                f"warning: unit {unit.number}: {engine} {error}; the reference processes the unit again",
                file=sys.stderr,
                flush=True,
            )
    raise AssertionError("the reference agrees with itself")


def _unit_sizes(build: Build) -> Sequence[int]:
    return build.plan.sizes


def _cut_unit_sizes(build: Build) -> Sequence[int]:
    return [build.plan.sizes[number] for number, _ in build.cut_units]


def _bucket_sizes(build: Build) -> Sequence[int]:
    return [bucket.size for bucket in build.buckets]


def _key_bucket_sizes(build: Build) -> Sequence[int]:
    return [dedup.KEY_BYTES * build.keys // build.key_buckets] * build.key_buckets


def _deduplicates(config: BuildConfig) -> bool:
    return config.deduplicate != "none"


def _shuffles(config: BuildConfig) -> bool:
    return config.shuffle


def _keeps_order(config: BuildConfig) -> bool:
    return not config.shuffle


def is_capped(config: BuildConfig) -> bool:
    return any(room_of(source) is not None for source in config.sources.values())


_KEYS, _DUPLICATES, _SORTED = ("work/keys/*.npy",), ("work/duplicates/*.npy",), ("work/scatter/*-*",)
_SHARDS, _LEFT_OUT = ("train-*", "heldout-*"), ("work/quarantine/*",)

STAGES = (
    Stage(
        name="keys",
        title="keys",
        is_needed=_deduplicates,
        sizes=_unit_sizes,
        task=keys_of_unit,
        reads=(),
        leaves=_KEYS,
    ),
    Stage(
        name="duplicates",
        title="duplicates",
        is_needed=_deduplicates,
        sizes=_key_bucket_sizes,
        task=duplicates_of_bucket,
        reads=_KEYS,
        leaves=_DUPLICATES,
    ),
    Stage(
        name="shards",
        title="build",
        is_needed=_keeps_order,
        sizes=_unit_sizes,
        task=shard_of_unit,
        reads=_DUPLICATES,
        leaves=(*_SHARDS, *_LEFT_OUT),
    ),
    Stage(
        name="scatter",
        title="build",
        is_needed=_shuffles,
        sizes=_unit_sizes,
        task=shard_of_unit,
        reads=_DUPLICATES,
        leaves=(*_SORTED, *_LEFT_OUT),
    ),
    Stage(
        name="cut",
        title="cut",
        is_needed=is_capped,
        sizes=_cut_unit_sizes,
        task=shard_of_cut_unit,
        reads=_DUPLICATES,
        leaves=(*_SHARDS, *_SORTED, *_LEFT_OUT),  # replaces the unit's earlier output
    ),
    Stage(
        name="gather",
        title="gather",
        is_needed=_shuffles,
        sizes=_bucket_sizes,
        task=shard_of_bucket,
        reads=_SORTED,
        leaves=_SHARDS,
    ),
)
