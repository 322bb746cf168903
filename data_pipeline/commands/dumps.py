"""Read token files of other programs: find where documents end, and check that the tokens are of the given type.

Tokens read with a wrong width or byte order are usually all in the vocabulary. The check therefore looks for signs of
both in all tokens of the file.
"""

from __future__ import annotations

import csv
import gzip
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.tokenize.tokenizer import Tokenizer
from ponder_scale.errors import ShardError
from ponder_scale.shards.format import check_index

Kind = Literal["megatron", "datatrove", "raw"]
# raw files may have any suffix; dolma's end in .npy
SUFFIXES: dict[Kind, str] = {"megatron": ".bin", "datatrove": ".ds"}
WIDTHS = ("uint16", "uint32")
DOLMA_BOUNDARIES = ".csv.gz"  # beside dolma's .npy, with one row of start, end, id, source, place for each document
_HEADERS = {
    b"\x93NUMPY": "numpy.save; write its tokens alone: array.tofile",
    b"MMIDIDX": "Megatron's index; give the .bin beside it, with --kind megatron",
    struct.pack("<i", 20240520): "llm.c, of 1,024 bytes; write its tokens alone: tail -c +1025",
    struct.pack("<i", 20240801): "llm.c, of 1,024 bytes; write its tokens alone: tail -c +1025",
    b"\x28\xb5\x2f\xfd": "zstd; decompress it",
}
_BLOCK = 2**23  # tokens examined together; even, so that each block begins at an even position
_MAX_DOCUMENT = 2**30  # tokens; a longer stretch without an end token is cut into such "documents"
_NEARLY_ALL, _MANY = 0.95, 0.75


@dataclass(frozen=True)
class Dump:
    """One file of tokens and the lengths of its documents."""

    path: Path
    dtype: np.dtype
    lengths: np.ndarray  # (documents,) in tokens
    indexed: bool = False  # whether Megatron's index lies beside it, with one sequence for each document
    marked: Literal["", "end", "begin"] = ""  # the place of the end token in each document


def open_dump(path: Path, kind: Kind, dtype: str | None, tokenizer: Tokenizer) -> Dump:
    """Open one file of tokens and check all of them.

    dtype: the type that the user gave. Raises ShardError if the file is not of the given kind, holds token ids that the
    tokenizer does not have, or looks like tokens of another width or byte order.
    """
    if kind in SUFFIXES and path.suffix != SUFFIXES[kind]:
        raise ShardError(f"{path}: expected a file that ends in {SUFFIXES[kind]} for --kind {kind}")
    if kind == "megatron":
        dump = _megatron(path, dtype)
    elif kind == "datatrove":
        dump = _datatrove(path, dtype)
    else:
        dump = _raw(path, dtype)
    if dump.dtype.itemsize == 2 and tokenizer.vocab_size > 2**16:
        raise ShardError(
            f"{path}: {tokenizer.path} has {tokenizer.vocab_size:,} tokens, and uint16 holds ids below 65,536; give "
            f"--dtype uint32, or the tokenizer that the tokens were made with"
        )
    _check(dump, tokenizer)
    if kind == "raw" and not path.with_suffix(DOLMA_BOUNDARIES).is_file():
        return _by_end_token(dump, tokenizer.eod_id)
    if kind == "raw":
        dump = replace(dump, lengths=_dolma_lengths(dump))
    return replace(dump, marked="end") if _last_token(dump) == tokenizer.eod_id else dump


def pieces(dump: Dump) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the parts of a dump in order, each with the position of its first token."""
    if not dump.path.stat().st_size:
        return
    tokens = np.memmap(dump.path, dtype=dump.dtype, mode="r")
    for begin in range(0, len(tokens), _BLOCK):
        yield begin, tokens[begin : begin + _BLOCK]


def _megatron(path: Path, dtype: str | None) -> Dump:
    """Use Megatron's index. A document of several sequences becomes one document."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise ShardError(f"{path}: {index.name} is missing beside it; expected Megatron's pair of .bin and .idx")
    found, lengths, documents = check_index(index, path)
    if dtype is not None and np.dtype(dtype).itemsize != found.itemsize:
        raise ShardError(f"--dtype is {dtype}; {index} says {found.name}; leave it out for --kind megatron")
    if len(documents) == len(lengths) + 1:
        return Dump(path, found, lengths, indexed=True)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    whole = np.diff(ends)
    if len(whole) and int(whole.max()) >= 2**31:
        raise ShardError(f"{index}: a document has {int(whole.max()):,} tokens; expected at most 2,147,483,647")
    return Dump(path, found, whole[whole > 0])


def _datatrove(path: Path, dtype: str | None) -> Dump:
    """Use datatrove's index, whose last number gives the width of the tokens."""
    index = path.with_name(path.name + ".index")
    if not index.is_file():
        raise ShardError(f"{path}: {index.name} is missing beside it; expected the ends of its documents")
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    size = path.stat().st_size
    fitting = [name for name in WIDTHS if len(ends) and int(ends[-1]) * np.dtype(name).itemsize == size]
    name = dtype or (fitting[0] if fitting else WIDTHS[0])
    if name not in fitting or (np.diff(ends) < 0).any():
        last = f"{ends[-1]:,}" if len(ends) else "none"
        raise ShardError(
            f"{index}: its last document ends at {last}; {path.name} holds {size / np.dtype(name).itemsize:,g} tokens "
            f"of {name}; check --dtype"
        )
    return Dump(path, np.dtype(name).newbyteorder("<"), np.diff(ends, prepend=0))


def _raw(path: Path, dtype: str | None) -> Dump:
    """Open a headerless dump. Its documents are found after its tokens have been checked."""
    if dtype is None:
        raise ShardError(f"{path}: nothing in it says how wide its tokens are; give --dtype uint16 or --dtype uint32")
    with path.open("rb") as stream:
        head = stream.read(max(map(len, _HEADERS)))
    for magic, what in _HEADERS.items():
        if head.startswith(magic):
            raise ShardError(f"{path}: begins with the header of {what}")
    if path.suffix in (".gz", ".zst", ".bz2", ".xz", ".npz"):
        raise ShardError(f"{path}: is compressed; decompress it")
    width = np.dtype(dtype).newbyteorder("<")
    size, rest = divmod(path.stat().st_size, width.itemsize)
    if rest:
        raise ShardError(f"{path}: its size is not a multiple of the {width.itemsize} bytes of {dtype}; check --dtype")
    return Dump(path, width, np.array([size] if size else [], dtype=np.int64))


def _by_end_token(dump: Dump, eod_id: int) -> Dump:
    """Split a dump into documents at the end token.

    The token ends each document. If it is the first token of the dump but not the last, it begins each document
    instead.
    """
    size = int(dump.lengths.sum())
    found = [np.flatnonzero(tokens == eod_id) + begin for begin, tokens in pieces(dump)]
    places = np.concatenate([np.empty(0, np.int64), *found])
    before = len(places) and places[0] == 0 and places[-1] != size - 1
    ends = places[1:] if before else places + 1
    if size and (not len(ends) or ends[-1] != size):
        ends = np.append(ends, size)
    lengths = np.diff(ends, prepend=0)
    if len(lengths) and int(lengths.max()) > _MAX_DOCUMENT:
        cuts = [np.arange(begin, end, _MAX_DOCUMENT) for begin, end in zip(ends - lengths, ends, strict=True)]
        lengths = np.diff(np.append(np.concatenate(cuts), size))
    return replace(dump, lengths=lengths, marked="begin" if before else "end" if len(places) else "")


def _dolma_lengths(dump: Dump) -> np.ndarray:
    """The lengths of the documents in dolma's file of boundaries."""
    file, data, size = dump.path.with_suffix(DOLMA_BOUNDARIES), dump.path, int(dump.lengths.sum())
    starts, ends = array("q"), array("q")
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="") as stream:
            for row in csv.reader(stream):
                # Some versions put the document's name before the numbers.
                first, last = row[:2] if row[0].isdecimal() and row[1].isdecimal() else row[-2:]
                starts.append(int(first))
                ends.append(int(last))
    except (OSError, EOFError, ValueError, IndexError, csv.Error) as error:
        raise ShardError(f"{file}: not dolma's boundaries of documents ({error}); {_WITHOUT}") from error
    begin, end = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
    whole = len(end) and end[-1] == size and begin[0] == 0 and (begin[1:] == end[:-1]).all() and (begin <= end).all()
    if not whole and (size or len(end)):
        last_end = f"{end[-1]:,}" if len(end) else "none"
        raise ShardError(
            f"{file}: its documents do not follow one another to the end of {data.name}: the last one ends at "
            f"{last_end}, and there are {size:,} tokens; check --dtype, or {_WITHOUT}"
        )
    return (end - begin)[end > begin]


_WITHOUT = "move it away to split documents at the end token"


def _last_token(dump: Dump) -> int:
    """The last token of a dump, or -1 if it is empty."""
    if not dump.path.stat().st_size:
        return -1
    return int(np.memmap(dump.path, dtype=dump.dtype, mode="r")[-1])


def _check(dump: Dump, tokenizer: Tokenizer) -> None:
    """Raise ShardError for token ids that the tokenizer does not have, and for signs of another width or byte order."""
    places = even = odd = low = high = 0
    for begin, tokens in pieces(dump):
        largest = int(tokens.max())
        if largest >= tokenizer.vocab_size or (tokens.dtype.kind == "i" and int(tokens.min()) < 0):
            where = begin + int(tokens.argmax())
            raise ShardError(
                f"{dump.path}: token {where:,} is {largest:,}; {tokenizer.path} has ids 0 to "
                f"{tokenizer.vocab_size - 1:,}; {_remedy(dump, tokenizer)}"
            )
        pairs = tokens[: len(tokens) // 2 * 2].reshape(-1, 2)
        places += len(pairs)
        even += int((pairs[:, 0] == 0).sum())
        odd += int((pairs[:, 1] == 0).sum())
        if dump.dtype.itemsize == 2:
            low += int(((tokens & 0xFF) < 4).sum())
            high += int(((tokens >> 8) < 4).sum())
    wider = "uint32 tokens" if dump.dtype.itemsize == 2 else "64-bit tokens, which you must write again as uint32"
    zeros, others = max(odd, even), min(odd, even)
    if places > 1 and zeros >= _NEARLY_ALL * places and (others <= _MANY * places or others < zeros == places):
        raise ShardError(
            f"{dump.path}: one of every two tokens of {dump.dtype.name} is 0, so they seem to be halves of {wider}; "
            f"{_remedy(dump, tokenizer)}"
        )
    if low > 3 * high + 0.1 * dump.lengths.sum():
        raise ShardError(
            f"{dump.path}: its tokens look big-endian; write them again in little-endian order with "
            f"array.byteswap().tofile"
        )


def _remedy(dump: Dump, tokenizer: Tokenizer) -> str:
    """The remedy for wrong tokens. Names the width or byte order in which the first tokens would be valid."""
    asked = "give the tokenizer and the dtype that it was made with"
    others = [np.dtype(name).newbyteorder("<") for name in WIDTHS]
    others = [other for other in others if other.itemsize != dump.dtype.itemsize]
    with dump.path.open("rb") as stream:
        head = stream.read(2**16)
    for other in (*others, dump.dtype.newbyteorder(">")):
        if dump.path.stat().st_size % other.itemsize or tokenizer.vocab_size > 2 ** (8 * other.itemsize):
            continue
        tokens = np.frombuffer(head, other)
        if int(tokens.min()) >= 0 and int(tokens.max()) < tokenizer.vocab_size:
            if other.itemsize != dump.dtype.itemsize:
                return f"{asked}: its first tokens fit --dtype {other.name}"
            return f"{asked}: its bytes seem to be big-endian; swap them with array.byteswap().tofile"
    return asked
