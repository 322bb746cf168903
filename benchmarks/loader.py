"""Measure reading from a folder of shards. `python -m benchmarks.loader FOLDER` prints JSON rows.

Sequences have 2,048 tokens. With a warm page cache, processor seconds are measured. With a dropped cache, wall seconds
are measured, because waiting for the disk dominates. The baselines read the same files as common loaders do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.shards.format import ShardSet, ShardWriter, open_shards
from ponder_scale.shards.manifest import Manifest, seal

SEQ_LEN, BATCH, SECONDS = 2048, 256, 1.0
COLD_BYTES = 2**31
# Ways in which Megatron-LM separates the documents of a sequence, with its options. Positions alone do not reach its
# attention, so documents see each other. The mask is a square matrix for each sequence. Lengths come from the index,
# for attention that accepts them, since megatron-core 0.19. As in its own test of them, the search for end tokens is
# off.
WAYS = {
    "positions": {"reset_position_ids": True, "reset_attention_mask": True, "create_attention_mask": False},
    "positions and mask": {"reset_position_ids": True, "reset_attention_mask": True, "create_attention_mask": True},
    "document lengths": {
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "create_attention_mask": False,
        "inter_document_masking": True,
    },
}


def main(folder: Path) -> list[dict[str, Any]]:
    """Measure, and return the rows: name, value, unit."""
    rows = []
    begin = time.process_time()
    loader = _loader(folder, masked=False)
    loader.next_batches()
    rows.append(_row("start-up, first batch included", (time.process_time() - begin) * 1000, "CPU-ms"))
    rows.append(_row("state", len(json.dumps(loader.state())), "bytes"))
    ours = _per_second(loader.next_batches, time.process_time)
    loader.close()
    masked = _loader(folder, masked=True)
    bounded = _per_second(masked.next_batches, time.process_time)
    masked.close()
    rows.append(_row("warm, tokens", ours, "sequences/CPU-s"))
    rows.append(_row("warm, tokens and document positions", bounded, "sequences/CPU-s"))
    for name, read, size in _others(folder):
        found = _per_second(read, time.process_time, size)
        rows.append(_row(f"warm, {name}", found, "sequences/CPU-s"))
        rows.append(_row("  tokens and document positions against it", bounded / found, "x"))
    with tempfile.TemporaryDirectory(prefix="ponder-bench-", dir=folder.parent) as scratch:
        cold, plain = _cold(_large(Path(scratch)))
    rows.append(_row("cold, advised and read ahead", cold, "sequences/s"))
    rows.append(_row("cold, plain memory map", plain, "sequences/s"))
    rows.append(_row("ratio of the two", cold / plain, "x"))
    return rows


def _loader(folder: Path, masked: bool) -> Loader:
    data = DataConfig(sources={"it": SourceConfig(path=str(folder))}, seq_len=SEQ_LEN, document_mask=masked)
    return Loader(data, open_sources(data), seed=0, global_batch=BATCH, micro_batch=BATCH)


def _per_second(read: Callable[[], Any], clock: Callable[[], float], size: int = BATCH) -> float:
    """Sequences per second of `clock`, for a function that reads `size` of them."""
    read()
    begin, count = clock(), 0
    while clock() - begin < SECONDS:
        read()
        count += size
    return count / (clock() - begin)


def _others(folder: Path) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Other loaders that give document boundaries, if installed: name, reader, sequences that one call reads."""
    if importlib.util.find_spec("megatron") is None:
        return
    shards, cache = open_shards(folder), Path(tempfile.mkdtemp(prefix="megatron-", dir=folder.parent))
    for way in ways():
        size = 8 if WAYS[way]["create_attention_mask"] else BATCH  # few, because a mask takes a hundred times as long
        yield f"Megatron's GPTDataset, {way}", _reader(megatron_data(shards, way, cache), size), size


def _reader(data: Any, size: int) -> Callable[[], None]:
    """A function that reads `size` random sequences."""
    generator = np.random.default_rng(0)

    def read() -> None:
        for number in generator.integers(len(data), size=size).tolist():
            data[number]

    return read


def ways() -> list[str]:
    """The entries of WAYS that the installed megatron-core supports."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    known = {field.name for field in dataclasses.fields(GPTDatasetConfig)}
    return [way for way, options in WAYS.items() if options.keys() <= known]


def megatron_data(shards: ShardSet, way: str, cache: Path) -> Any:
    """Megatron-LM's own data set on the largest shard. `way`, one of WAYS, is how it separates documents."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    largest = max(shards.split("train"), key=lambda shard: shard.info.tokens)
    prefix = str(shards.folder / largest.info.name)
    tokenizer = SimpleNamespace(
        eod=shards.manifest.eod_id, pad=-1, vocab_size=shards.manifest.vocab_size, unique_identifiers={}
    )
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQ_LEN,
        split="1,0,0",
        path_to_cache=str(cache / way.replace(" ", "-")),
        tokenizer=tokenizer,
        eod_mask_loss=False,
        **WAYS[way],
    )
    documents = np.arange(largest.info.documents, dtype=np.int32)
    return GPTDataset(IndexedDataset(prefix), prefix, documents, 100_000, Split.train, config)


def _maps(shards: ShardSet) -> list[np.ndarray]:
    files = [shards.folder / f"{shard.info.name}.bin" for shard in shards.split("train")]
    dtype = np.dtype(shards.manifest.dtype)
    maps = [np.memmap(path, dtype=dtype, mode="r") for path in files]
    return [tokens for tokens in maps if len(tokens) > SEQ_LEN]


def _large(folder: Path) -> Path:
    """Write a shard much larger than the kernel's read-ahead."""
    writer = ShardWriter(folder, "train-00000", 60_000)
    block = np.random.default_rng(0).integers(1, 60_000, 2**24).astype(np.uint16)
    for _ in range(COLD_BYTES // block.nbytes):
        writer.add(block, np.array([len(block)]))
    seal(folder, Manifest("uint16", 60_000, 0, None, "0" * 64, {"train": [writer.close()], "heldout": []}))
    return folder


def _cold(folder: Path) -> tuple[float, float]:
    """Sequences per second from a cold page cache, for our loader and for a memory map without advice. Medians of
    three.
    """
    ours: list[float] = []
    plain: list[float] = []
    for _ in range(3):
        _drop(folder)
        loader = _loader(folder, masked=False)
        begin = time.perf_counter()
        loader.next_batches()
        ours.append(BATCH / (time.perf_counter() - begin))
        loader.close()
        _drop(folder)
        maps, generator = _maps(open_shards(folder)), np.random.default_rng(len(plain))
        begin = time.perf_counter()
        for _ in range(BATCH):
            tokens = maps[generator.integers(len(maps))]
            first = int(generator.integers(len(tokens) - SEQ_LEN))
            tokens[first : first + SEQ_LEN + 1].astype(np.int64)
        plain.append(BATCH / (time.perf_counter() - begin))
    return float(np.median(ours)), float(np.median(plain))


def _drop(folder: Path) -> None:
    for path in folder.glob("*.bin"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _row(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
