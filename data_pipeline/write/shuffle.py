"""Put documents in a random order over all shards of a source, in two passes with bounded memory.

Scatter: each unit writes its documents sorted by random bucket, in runs of bounded size. Gather: each bucket is read
from all runs, permuted, and written as a shard. Both draws depend on (seed, unit or bucket) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ponder_scale.files.write import sync, sync_folder
from ponder_scale.shards.manifest import ShardInfo

BUCKET_BYTES = 2**27  # of input
RUN_TOKENS = 2**24
_DOCUMENTS_AT_ONCE = 1024


class Run(NamedTuple):
    """The documents of one bucket in one run of one unit."""

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray | None  # whether each token counts in the loss; None if all do


class Scatter:
    """Writes the documents of one unit and split to disk, sorted by bucket within each run."""

    def __init__(self, prefix: Path, buckets: int, dtype: np.dtype, seed: list[int], masked: bool = False) -> None:
        self._prefix, self._buckets, self._dtype, self._seed = prefix, buckets, dtype, seed
        self._held: list[Run] = []
        self._held_tokens = self._documents = self._tokens = 0
        self._index: list[np.ndarray] = []
        kinds = ("tokens", "lengths", "counts") if masked else ("tokens", "lengths")
        self._streams = {kind: prefix.with_suffix(f".{kind}").open("wb") for kind in kinds}

    def add(self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append documents, as `ShardWriter.add` does."""
        self._held.append(Run(tokens.astype(self._dtype), lengths, counts))
        self._held_tokens += len(tokens)
        if self._held_tokens >= RUN_TOKENS:
            self._write()

    def close(self, folder: Path) -> list[ShardInfo]:
        """Write the remaining documents and the index, and move all files to `folder`. Returns no shards, `gather`
        makes them.

        The index is (runs, buckets + 1, 2) int64: the first document and token of each bucket, then the end of the last
        bucket.
        """
        if self._held:
            self._write()
        for stream in self._streams.values():
            with stream:
                sync(stream)
        index = np.stack(self._index) if self._index else np.zeros((0, self._buckets + 1, 2), dtype=np.int64)
        with self._prefix.with_suffix(".npy").open("wb") as stream:
            np.save(stream, index)
            sync(stream)
        for kind in (*self._streams, "npy"):
            path = self._prefix.with_suffix(f".{kind}")
            path.rename(folder / path.name)
        sync_folder(folder)
        return []

    def _write(self) -> None:
        lengths = np.concatenate([run.lengths for run in self._held])
        of_tokens = {"tokens": np.concatenate([run.tokens for run in self._held])}
        if "counts" in self._streams:
            of_tokens["counts"] = np.concatenate([run.counts for run in self._held if run.counts is not None])
        bucket = np.random.default_rng([*self._seed, len(self._index)]).integers(self._buckets, size=len(lengths))
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(lengths)
        for begin in range(0, len(order), _DOCUMENTS_AT_ONCE):
            some = order[begin : begin + _DOCUMENTS_AT_ONCE]
            for kind, values in of_tokens.items():
                self._streams[kind].write(b"".join(values[ends[i] - lengths[i] : ends[i]].tobytes() for i in some))
        self._streams["lengths"].write(lengths[order].astype(np.int32).tobytes())
        index = np.zeros((self._buckets + 1, 2), dtype=np.int64)
        index[1:, 0] = np.cumsum(np.bincount(bucket, minlength=self._buckets))
        np.cumsum(np.bincount(bucket, weights=lengths, minlength=self._buckets).astype(np.int64), out=index[1:, 1])
        self._index.append(index + np.array([self._documents, self._tokens]))
        self._documents += len(lengths)
        self._tokens += self._held_tokens
        self._held, self._held_tokens = [], 0


def gather(prefixes: list[Path], bucket: int, dtype: np.dtype, seed: list[int], masked: bool = False) -> Iterator[Run]:
    """Yield the documents of one bucket from all units, in random order, in blocks."""
    runs = [run for prefix in prefixes for run in _runs(prefix, bucket, dtype, masked)]
    if not runs:
        return
    of_run = np.repeat(np.arange(len(runs)), [len(run.lengths) for run in runs])
    lengths = np.concatenate([run.lengths for run in runs])
    ends = np.concatenate([np.cumsum(run.lengths, dtype=np.int64) for run in runs])
    order = np.random.default_rng(seed).permutation(len(lengths))
    for begin in range(0, len(order), _DOCUMENTS_AT_ONCE):
        some = order[begin : begin + _DOCUMENTS_AT_ONCE]
        of_some = [(runs[of_run[i]], slice(ends[i] - lengths[i], ends[i])) for i in some]
        tokens = np.concatenate([run.tokens[place] for run, place in of_some])
        counts = [run.counts[place] for run, place in of_some if run.counts is not None]
        yield Run(tokens, lengths[some].astype(np.int64), np.concatenate(counts) if masked else None)


def _runs(prefix: Path, bucket: int, dtype: np.dtype, masked: bool) -> Iterator[Run]:
    """Yield memory maps of the documents that one unit holds of a bucket."""
    index = np.load(prefix.with_suffix(".npy"), mmap_mode="r")
    # One map for all runs, because the kernel allows a process 65,530 maps.
    tokens = _mapped(prefix.with_suffix(".tokens"), dtype)
    lengths = _mapped(prefix.with_suffix(".lengths"), np.dtype(np.int32))
    counts = _mapped(prefix.with_suffix(".counts"), np.dtype(bool)) if masked else None
    for (document, token), (document_end, token_end) in zip(index[:, bucket], index[:, bucket + 1], strict=True):
        if document < document_end:
            of_bucket = None if counts is None else counts[token:token_end]
            yield Run(tokens[token:token_end], lengths[document:document_end], of_bucket)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
