"""Best-fit packing decides which documents share a sequence. It runs once, and the result lies beside the shards.

    FOLDER/packing-2048/packing.json          lists the contents with hashes. The folder gets its name last.
    FOLDER/packing-2048/train-00000.starts    int64 [bins + 1], first piece of each bin, then the number of pieces
    FOLDER/packing-2048/train-00000.pieces    PIECE [pieces], bin after bin

A bin is the content of one sequence of seq_len + 1 tokens. It holds whole documents, or the rest of a document that is
longer than a sequence. Such a document is cut every seq_len tokens. Neighbouring pieces share one token, so that each
token but the first is predicted once. Each full piece fills a bin of its own. Only the rests and the short documents
are packed, by best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
A bin holds pieces of one shard only, so that you can pack, read and remove shards independently.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ponder_scale.errors import ShardError
from ponder_scale.files.delete import MARK, check_ours, delete_contents, delete_file, delete_made, held
from ponder_scale.files.write import hash_file, sync, sync_folder
from ponder_scale.shards.format import Shard, ShardSet
from ponder_scale.shards.manifest import PACKING_PREFIX, hash_of_json, read_manifest

# tokens < 0: the piece continues a document that was cut before it
PIECE = np.dtype([("begin", "<i8"), ("tokens", "<i4")])
SEAL = "packing.json"
Progress = Callable[[int, int], None]

_VERSION = 1
# the names in an unfinished folder
_PACKED = re.compile(rf"{re.escape(MARK)}|{re.escape(SEAL)}|[^/]+\.(starts|pieces)")
_DOCUMENTS_AT_ONCE = 2**20  # packed together: bounds the memory, and leaves few bins half full
_LEAST = 2  # the fewest tokens in a piece: one to read and one to predict


@dataclass(frozen=True)
class PackedShard:
    """The bins of one shard, as the seal describes them."""

    bins: int
    pieces: int
    tokens: int  # in all bins; a token that neighbouring pieces share counts twice
    cut_by_concat: int  # documents that fit a sequence and that data.packing=concat would cut; no bin cuts them
    starts_hash: str  # xxh3-128
    pieces_hash: str


class Packing:
    """The bins of a folder of shards, memory-mapped."""

    def __init__(self, folder: Path, identity: str, shards: dict[str, PackedShard]) -> None:
        self.identity, self._folder, self._shards = identity, folder, shards

    def of(self, shard: Shard) -> Bins:
        """The bins of one shard."""
        return Bins(self._folder, shard.info.name, self._shards[shard.info.name])


class Bins:
    """The bins of one shard. The files are opened at the first look-up."""

    def __init__(self, folder: Path, name: str, info: PackedShard) -> None:
        self._starts_path, self._pieces_path, self._info = folder / f"{name}.starts", folder / f"{name}.pieces", info

    def __len__(self) -> int:
        return self._info.bins

    def pieces(self, number: int) -> list[tuple[int, int, bool]]:
        """Each piece of a bin: its first token in the shard, its tokens, and whether it continues a document cut before
        it.
        """
        first, end = self._starts[number], self._starts[number + 1]
        return [(begin, abs(tokens), tokens < 0) for begin, tokens in self._pieces[first:end].tolist()]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.memmap(self._starts_path, dtype="<i8", mode="r").view(np.ndarray)

    @cached_property
    def _pieces(self) -> np.ndarray:
        return np.memmap(self._pieces_path, dtype=PIECE, mode="r").view(np.ndarray)


def packing_folder(shards: Path, seq_len: int) -> Path:
    return shards / f"{PACKING_PREFIX}{seq_len}"


def open_packing(shards: ShardSet, seq_len: int) -> Packing:
    """Open the packing for sequences of `seq_len` predicted tokens. Checks sizes without a pass over the data.

    Raises ShardError if the packing is missing, damaged, or made for other shards.
    """
    folder = packing_folder(shards.folder, seq_len)
    remedy = f"run: ponder-data pack {shards.folder} --seq-len {seq_len}"
    if not (folder / SEAL).is_file():
        raise ShardError(f"{shards.folder}: not packed for data.seq_len {seq_len}; {remedy}")
    content = _read_seal(folder)
    if content["shards_identity"] != shards.manifest.identity:
        raise ShardError(f"{folder}: was made for other shards than the folder now holds; {remedy}")
    packed = {name: PackedShard(**info) for name, info in content["shards"].items()}
    for name, info in packed.items():
        for suffix, size in (("starts", 8 * (info.bins + 1)), ("pieces", PIECE.itemsize * info.pieces)):
            path = folder / f"{name}.{suffix}"
            found = path.stat().st_size if path.is_file() else -1
            if found != size:
                raise ShardError(
                    f"{path}: {'missing' if found < 0 else f'{found:,} bytes'}; expected {size:,} bytes; {remedy}"
                )
    return Packing(folder, content["checksum"], packed)


def pack(shards: ShardSet, seq_len: int, progress: Progress = lambda size, documents: None) -> dict[str, Any]:
    """Pack all shards for sequences of `seq_len` predicted tokens, replacing an earlier packing. Returns the seal.

    `progress` receives the bytes of `.bin` and the documents of each block. Memory does not grow with the shards.
    """
    folder = packing_folder(shards.folder, seq_len)
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        if (folder / SEAL).is_file():
            _read_seal(folder)  # raises with the remedy if the seal is damaged
        check_ours(folder, _names_of_seal(folder).__contains__, lambda folder: (folder / SEAL).is_file())
    with held(partial, _named_by_pack):
        delete_contents(partial, _named_by_pack, keep=[MARK])
        content = _write_packing(shards, seq_len, partial, progress)
        if folder.exists():
            delete_made(folder, _names_of_seal(folder).__contains__, last=SEAL)
        delete_file(partial / MARK)
        partial.rename(folder)
    sync_folder(shards.folder)
    return content


def _write_packing(shards: ShardSet, seq_len: int, partial: Path, progress: Progress) -> dict[str, Any]:
    packed = {}
    for shard in (shard for split in shards.manifest.splits for shard in shards.split(split)):
        packed[shard.info.name] = asdict(_pack_shard(shard, seq_len, partial, progress))
    content = {
        "version": _VERSION,
        "seq_len": seq_len,
        "shards_identity": shards.manifest.identity,
        "shards": packed,
    }
    content["checksum"] = hash_of_json(content)
    with (partial / SEAL).open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        sync(stream)
    sync_folder(partial)
    return content


def names_of_packings(shards: Path) -> set[str]:
    """The paths of everything that the packings in a folder of shards hold. Names of folders end with a slash.

    Includes unfinished packings. Leaves out a packing whose seal cannot be read.
    """
    found = set()
    for folder in shards.glob(f"{PACKING_PREFIX}*"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        if (folder / MARK).is_file():
            names = {path.name for path in folder.iterdir() if _named_by_pack(path.name)}
        else:
            names = _names_of_seal(folder)
        found |= {f"{folder.name}/", *(f"{folder.name}/{name}" for name in names)} if names else set()
    return found


def _named_by_pack(name: str) -> bool:
    return _PACKED.fullmatch(name) is not None


def _names_of_seal(folder: Path) -> set[str]:
    try:
        content = _read_seal(folder)
    except ShardError:
        return set()
    return {SEAL, *(f"{name}.{suffix}" for name in content["shards"] for suffix in ("starts", "pieces"))}


def verify_packings(shards: Path) -> list[str]:
    """Read and hash every packing in a folder of shards. Returns one line for each difference from what was made."""
    findings = []
    identity = read_manifest(shards).identity
    for folder in sorted(path for path in shards.glob(f"{PACKING_PREFIX}*") if path.is_dir()):
        known = {SEAL}
        try:
            content = _read_seal(folder)
        except ShardError as error:
            findings.append(str(error))
            continue
        if content["shards_identity"] != identity:
            findings.append(f"{folder.name}: was made for other shards than the folder now holds")
        for name, info in content["shards"].items():
            for suffix in ("starts", "pieces"):
                path = folder / f"{name}.{suffix}"
                known.add(path.name)
                if not path.is_file():
                    findings.append(f"{folder.name}/{path.name}: missing")
                elif hash_file(path) != info[f"{suffix}_hash"]:
                    findings.append(f"{folder.name}/{path.name}: differs from its hash")
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in known)
        findings += [f"{folder.name}/{name}: no part of this packing" for name in foreign]
    return findings


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Assign items with lengths (n,) of 1 to `capacity` to bins of that capacity.

    Returns the bin of each item, (n,) int64, and the number of bins. The longest item goes first, each into the fullest
    bin that still holds it. Bins with equal room are interchangeable, so all items of one length are placed together.
    The work therefore grows with the number of distinct lengths, not with the number of items.
    """
    order = np.argsort(capacity - lengths, kind="stable")
    counts = np.bincount(lengths, minlength=1)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    open_bins: dict[int, list[np.ndarray]] = defaultdict(list)  # by the room left in them
    rooms = bins = placed = 0  # rooms: bit r is set if there are open bins with room r

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length  # the bin that takes one item is the best fit for the next, until none fits
            needed = -(-left // each)
            if fitting:
                some = open_bins[room].pop()
                if len(some) > needed:
                    open_bins[room].append(some[needed:])
                    some = some[:needed]
                if not open_bins[room]:
                    rooms ^= 1 << room
            else:
                some = np.arange(bins, bins + needed)
                bins += needed
            count = min(left, each * len(some))
            bin_of[order[placed : placed + count]] = np.repeat(some, each)[:count]
            whole, rest = divmod(count, each)
            for changed, taken in ((some[:whole], each), (some[whole : whole + 1] if rest else some[:0], rest)):
                after = room - taken * length
                if len(changed) and after:
                    open_bins[after].append(changed)
                    rooms |= 1 << after
            placed, left = placed + count, left - count
    return bin_of, bins


class _Block(NamedTuple):
    """Some bins: their pieces, bin after bin, and the number of pieces in each bin."""

    pieces: np.ndarray
    per_bin: np.ndarray


def _pack_shard(shard: Shard, seq_len: int, folder: Path, progress: Progress) -> PackedShard:
    bins = pieces = tokens = cut = begin = 0
    hashes = {"starts": xxhash.xxh3_128(), "pieces": xxhash.xxh3_128()}
    paths = {suffix: folder / f"{shard.info.name}.{suffix}" for suffix in hashes}
    with paths["starts"].open("wb") as starts_stream, paths["pieces"].open("wb") as pieces_stream:
        streams = {"starts": starts_stream, "pieces": pieces_stream}

        def write(suffix: str, values: np.ndarray) -> None:
            content = values.tobytes()
            streams[suffix].write(content)
            hashes[suffix].update(content)

        for first in range(0, shard.info.documents, _DOCUMENTS_AT_ONCE):
            lengths = shard.lengths[first : first + _DOCUMENTS_AT_ONCE].astype(np.int64)
            begins = begin + np.cumsum(lengths) - lengths
            begin += int(lengths.sum())
            cut += int(((lengths <= seq_len + 1) & (begins % seq_len + lengths - 1 > seq_len)).sum())
            for block in _blocks(begins, lengths, seq_len):
                write("starts", (pieces + np.cumsum(block.per_bin) - block.per_bin).astype("<i8"))
                write("pieces", block.pieces)
                bins, pieces = bins + len(block.per_bin), pieces + len(block.pieces)
                tokens += int(np.abs(block.pieces["tokens"]).sum(dtype=np.int64))
            progress(int(lengths.sum()) * shard.info.bytes // max(1, shard.info.tokens), len(lengths))
        write("starts", np.array([pieces], dtype="<i8"))
        for stream in streams.values():
            sync(stream)
    return PackedShard(bins, pieces, tokens, cut, hashes["starts"].hexdigest(), hashes["pieces"].hexdigest())


def _blocks(begins: np.ndarray, lengths: np.ndarray, seq_len: int) -> Iterator[_Block]:
    """The bins of a block of documents: first the full pieces of long documents, then the rests, packed."""
    full = np.maximum(lengths - 1, 0) // seq_len  # pieces of seq_len + 1 tokens; neighbours share one token
    ends = np.cumsum(full)
    total = int(ends[-1]) if len(ends) else 0
    for first in range(0, total, _DOCUMENTS_AT_ONCE):
        number = np.arange(first, min(first + _DOCUMENTS_AT_ONCE, total))
        document = np.searchsorted(ends, number, side="right")
        within = number - (ends[document] - full[document])
        pieces = np.empty(len(number), PIECE)
        pieces["begin"] = begins[document] + within * seq_len
        pieces["tokens"] = np.where(within > 0, -1, 1) * (seq_len + 1)
        yield _Block(pieces, np.ones(len(number), dtype=np.int64))
    rests = lengths - full * seq_len
    kept = np.flatnonzero(rests >= _LEAST)  # a shorter rest adds nothing to predict
    if len(kept):
        bin_of, bins = best_fit_decreasing(rests[kept], seq_len + 1)
        kept = kept[np.argsort(bin_of, kind="stable")]
        pieces = np.empty(len(kept), PIECE)
        pieces["begin"] = begins[kept] + full[kept] * seq_len
        pieces["tokens"] = np.where(full[kept] > 0, -1, 1) * rests[kept]
        yield _Block(pieces, np.bincount(bin_of, minlength=bins))


def _read_seal(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / SEAL).read_bytes())
        known = content.pop("checksum")
        if content["version"] != _VERSION or known != hash_of_json(content):
            raise ValueError("its version or checksum differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{folder / SEAL}: cannot be used ({error}); remove {folder} and run ponder-data pack again"
        ) from error
    return {**content, "checksum": known}
