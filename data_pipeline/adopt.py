"""Tokens that other programs wrote, made a folder of shards where they lie: their data is read and never changed.

Megatron-LM, NeMo and GPT-NeoX (.bin/.idx) need a manifest only. datatrove (.ds, .ds.index) and headerless dumps
(nanoGPT's, dolma's and others' uint16 or uint32) get an index in Megatron's format and a .bin that is a symbolic
link. What the formats do not say, the tokenizer and the type of the tokens, the user says, and it is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from data_pipeline.tokenizer import Tokenizer, open_tokenizer, save
from ponder_scale.errors import ShardError
from ponder_scale.manifest import BlockHashes, Manifest, ShardInfo, hash_file, seal, sync, unsealed
from ponder_scale.shards import TOKENIZER, check_index, index_pieces

Kind = Literal["megatron", "datatrove", "raw"]
SUFFIXES: dict[Kind, str] = {"megatron": ".bin", "datatrove": ".ds"}  # raw has any: dolma's end in .npy
_NUMPY = b"\x93NUMPY"  # begins a file of numpy.save, whose header is no tokens
_BLOCK = 2**23  # tokens looked at together
_MAX_RAW_DOCUMENT = 2**30  # tokens; a dump without boundaries is cut into such "documents"


@dataclass(frozen=True)
class Dump:
    """One file of tokens and where its documents end."""

    path: Path
    dtype: np.dtype
    lengths: np.ndarray  # (documents,) in tokens
    indexed: bool  # it has Megatron's index beside it


def adopt(
    files: list[Path],
    kind: Kind,
    tokenizer_path: Path,
    out: Path,
    dtype: str,
    heldout_files: int,
    eod_token: str | None,
    command: str,
) -> Manifest:
    """Make `out` a folder of shards of these files, the last `heldout_files` of them held out.

    dtype: of datatrove's and headerless tokens, uint16 or uint32; eod_token: None: the tokenizer's own. Raises
    ShardError when a file is not what it is said to be, or holds token ids that the tokenizer does not have.
    """
    if out.exists() and any(out.iterdir()):
        raise ShardError(f"--out is {out}, which is not empty; choose another folder")
    if not 0 <= heldout_files < len(files):
        raise ShardError(f"--heldout-files is {heldout_files}, of {len(files)} files; expected 0 to {len(files) - 1}")
    tokenizer = open_tokenizer(tokenizer_path, eod_token)
    dumps = [_open(path, kind, np.dtype(dtype).newbyteorder("<"), tokenizer) for path in files]
    if len({dump.dtype for dump in dumps}) > 1:
        raise ShardError(
            f"tokens of different types: {', '.join(f'{d.path} {d.dtype.name}' for d in dumps)}; adopt apart"
        )
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[ShardInfo]] = {"train": [], "heldout": []}
    for number, dump in enumerate(dumps):
        split = "heldout" if number >= len(dumps) - heldout_files else "train"
        splits[split].append(_place(dump, out, f"{split}-{len(splits[split]):05d}", tokenizer))
    copies = save(tokenizer, out / TOKENIZER)
    ends = {int(_ends(dump)) for dump in dumps if kind != "raw"}
    about = {"kind": kind, "files": [str(path.resolve()) for path in files], "eod_token": eod_token}
    manifest = Manifest(
        dtype=dumps[0].dtype.name.replace("uint32", "int32"),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id if ends == {tokenizer.eod_id} else None,
        bos_id=None,
        tokenizer=tokenizer.sha256,
        splits=splits,
        files={path.relative_to(out).as_posix(): hash_file(path) for path in copies},
        provenance={"command": command, "adopted": about},
    )
    seal(out, manifest)
    return manifest


def _open(path: Path, kind: Kind, dtype: np.dtype, tokenizer: Tokenizer) -> Dump:
    if kind in SUFFIXES and path.suffix != SUFFIXES[kind]:
        raise ShardError(f"{path}: expected a file that ends in {SUFFIXES[kind]} for --kind {kind}")
    if kind == "megatron":
        dtype, lengths = _megatron_index(path)
        indexed = True
    else:
        size, rest = divmod(path.stat().st_size, dtype.itemsize)
        if rest:
            raise ShardError(
                f"{path}: its size is no multiple of {dtype.itemsize}; are its tokens really {dtype.name}?"
            )
        lengths = _datatrove_lengths(path, size) if kind == "datatrove" else _raw_lengths(path, size)
        indexed = False
    dump = Dump(path, dtype, lengths, indexed)
    _check(dump, tokenizer)
    return dump


def _megatron_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """(dtype, lengths) of Megatron's index beside `path`. Documents of several sequences count as several."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise ShardError(f"{path}: no {index.name} beside it; expected Megatron's pair of files")
    return check_index(index, path)


def _datatrove_lengths(path: Path, size: int) -> np.ndarray:
    index = path.with_name(path.name + ".index")
    if not index.is_file():
        raise ShardError(f"{path}: no {index.name} beside it; expected the ends of its documents")
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    if len(ends) == 0 or ends[-1] != size or (np.diff(ends) < 0).any():
        last = f"{ends[-1]:,}" if len(ends) else "none"
        raise ShardError(
            f"{index}: its last document ends at {last}; {path.name} holds {size:,} tokens; is dtype right?"
        )
    return np.diff(ends, prepend=0)


def _raw_lengths(path: Path, size: int) -> np.ndarray:
    """Lengths that cover a dump without boundaries."""
    with path.open("rb") as stream:
        if stream.read(len(_NUMPY)) == _NUMPY:
            raise ShardError(f"{path}: begins with the header of numpy.save; write its tokens alone: array.tofile")
    whole, rest = divmod(size, _MAX_RAW_DOCUMENT)
    return np.array([_MAX_RAW_DOCUMENT] * whole + [rest] * (rest > 0), dtype=np.int64)


def _check(dump: Dump, tokenizer: Tokenizer) -> None:
    """Raises ShardError for token ids that the tokenizer does not have: another tokenizer or dtype made them."""
    for begin, tokens in _pieces(dump):
        largest = int(tokens.max())
        if largest >= tokenizer.vocab_size or (tokens.dtype.kind == "i" and int(tokens.min()) < 0):
            where = begin + int(tokens.argmax())
            raise ShardError(
                f"{dump.path}: token {where:,} is {largest:,}; {tokenizer.path} has ids 0 to "
                f"{tokenizer.vocab_size - 1:,}; give the tokenizer and the dtype that it was made with"
            )


def _pieces(dump: Dump) -> Iterator[tuple[int, np.ndarray]]:
    if not dump.path.stat().st_size:
        return
    tokens = np.memmap(dump.path, dtype=dump.dtype, mode="r")
    for begin in range(0, len(tokens), _BLOCK):
        yield begin, tokens[begin : begin + _BLOCK]


def _place(dump: Dump, out: Path, name: str, tokenizer: Tokenizer) -> ShardInfo:
    """Links and an index in `out`; what the shard holds."""
    target, index = out / f"{name}.bin", out / f"{name}.idx"
    target.symlink_to(dump.path.resolve())
    if dump.indexed:
        index.symlink_to(dump.path.with_suffix(".idx").resolve())
        index_hash = hash_file(index)
    else:
        whole = xxhash.xxh3_128()
        with unsealed(index).open("wb") as stream:
            for piece in index_pieces(dump.lengths, dump.dtype):
                stream.write(piece)
                whole.update(piece)
            sync(stream)
        unsealed(index).rename(index)
        index_hash = whole.hexdigest()
    hashes = BlockHashes()
    for _, tokens in _pieces(dump):
        hashes.update(np.ascontiguousarray(tokens).view(np.uint8).data)
    size = int(dump.lengths.sum())
    return ShardInfo(name, len(dump.lengths), size, size * dump.dtype.itemsize, hashes.finish(), index_hash)


def _ends(dump: Dump) -> int:
    """The last token of the dump, or -1."""
    with dump.path.open("rb") as stream:
        if not dump.path.stat().st_size:
            return -1
        stream.seek(-dump.dtype.itemsize, 2)
        return int(struct.unpack("<H" if dump.dtype.itemsize == 2 else "<i", stream.read())[0])
