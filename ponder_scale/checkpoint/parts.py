"""The parts of a checkpoint: one safetensors file for each rank, with its stretches of the flattened parameters.

A tensor `KIND/NAME` (n,) holds the elements [begin, begin + n) of the flattened parameter NAME. KIND is `weight` (the
fp32 master) or a state of the optimizer. `begins` in the file's metadata has the first element of each name.

Readers find elements by name and range. So the number of ranks and the ZeRO stage may change between saving and
loading, and a reader never puts together a tensor that it does not need. Nothing is pickled.

A part may come from anywhere, so a header is compared with the file before memory is allocated for its tensors.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from torch import Tensor

from ponder_scale.checkpoint.header import DTYPES, plan_header
from ponder_scale.checkpoint.index import part_files
from ponder_scale.errors import CheckpointError
from ponder_scale.files.write import sync

WEIGHT = "weight"
AVERAGE = "average"  # running average of the weights over the steps, if the run keeps one
_KEYS = {"dtype", "shape", "data_offsets"}  # keys of a tensor in a header
_OPEN_FILES = 64  # most files that are open at the same time; a checkpoint may have thousands
_LAST = 2**63  # larger than any number of elements
_SHOWN = 80  # most characters of a value in an error message
_MAX_HEADER_BYTES = 2**24  # enough for a hundred thousand tensors
_BLOCK_BYTES = 2**24  # limits the memory that reading and writing need besides the tensors


class Stretch(NamedTuple):
    """Elements [begin, begin + length) of a flattened parameter, which start at byte `offset` of a file."""

    begin: int
    length: int
    file: str
    offset: int
    dtype: str


Table = dict[str, list[Stretch]]  # ascending stretches by `KIND/NAME`


def part_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def write_part(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], alive: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Write tensors (n,) to a file, sync it, and return its size and hash.

    Args:
        tensors: by `KIND/NAME`.
        metadata: JSON values by name.
        alive: called for each block that is written.
    """
    sizes = {name: (tensor.dtype, [tensor.numel()]) for name, tensor in tensors.items()}
    header = plan_header(sizes, {name: json.dumps(value) for name, value in metadata.items()}).content
    digest, size = xxhash.xxh3_128(header), len(header)
    with path.open("wb") as stream:
        stream.write(header)
        for tensor in tensors.values():
            for block in tensor.split(_BLOCK_BYTES // tensor.element_size()):
                content = memoryview(block.detach().cpu().contiguous().view(torch.uint8).numpy())
                stream.write(content)
                digest.update(content)
                size += len(content)
                alive()
        sync(stream)
    return size, digest.hexdigest()


class Parts:
    """The tensors of a checkpoint by name and range."""

    def __init__(self, folder: Path, files: Collection[str] | None = None, table: Table | None = None) -> None:
        """
        Args:
            files: files to read from. None means all that the checkpoint's index lists.
            table: stretches that other ranks have found in the headers, so that they need not be read again.

        Raises:
            CheckpointError: a file is not what `write_part` writes, or two have the same elements.
        """
        self.folder = folder
        self.table = read_table(folder, part_files(folder) if files is None else files) if table is None else table
        # Open files, the last used one last. A rank reads hundreds of stretches from few files.
        self._streams: dict[str, BinaryIO] = {}
        self._kinds: dict[str, list[str]] = {}
        for key in sorted(self.table):
            kind, name = key.split("/", 1)
            self._kinds.setdefault(name, []).append(kind)

    def has(self, kind: str, name: str, begin: int, length: int) -> bool:
        """Whether the elements [begin, begin + length) can be read."""
        position = begin
        for stretch in self.table.get(f"{kind}/{name}", ()):
            if stretch.begin <= position:
                position = max(position, stretch.begin + stretch.length)
        return position >= begin + length

    def kinds(self, name: str) -> list[str]:
        """The kinds that the parts have of a parameter: the weight, and states of the optimizer."""
        return self._kinds.get(name, [])

    def read(self, kind: str, name: str, begin: int, out: Tensor) -> None:
        """Fill `out` (n,) with the elements [begin, begin + n) of a parameter or of one of its states.

        Raises:
            CheckpointError: some of these elements are in no file.
        """
        position, end = begin, begin + out.numel()
        for stretch in self.table.get(f"{kind}/{name}", ()):
            stop = min(end, stretch.begin + stretch.length)
            if stretch.begin <= position < stop:
                _read(self._stream(stretch.file), stretch, position, out[position - begin : stop - begin])
                position = stop
        if position < end:
            raise CheckpointError(
                f"checkpoint {self.folder}: it has no {kind} for elements {position:,} to {end:,} of {name}; "
                "it was saved with another model or another optimizer"
            )

    def _stream(self, file: str) -> BinaryIO:
        stream = self._streams.pop(file, None) or _opened(self.folder / file, buffering=0)
        self._streams[file] = stream
        if len(self._streams) > _OPEN_FILES:
            self._streams.pop(next(iter(self._streams))).close()
        return stream


def read_table(folder: Path, files: Collection[str]) -> Table:
    """The ascending stretches in some parts of a checkpoint, by `KIND/NAME`. Raises like `Parts`."""
    table: Table = {}
    for name in files:
        with _opened(folder / name) as stream:
            for key, stretch in _stretches(folder / name, stream):
                table.setdefault(key, []).append(stretch)
    return merged(folder, [table])


def merged(folder: Path, tables: Iterable[Table]) -> Table:
    """One table made of those of several parts. Raises CheckpointError if two parts have the same elements."""
    whole: Table = {}
    for table in tables:
        for key, stretches in table.items():
            whole.setdefault(key, []).extend(stretches)
    for key, stretches in whole.items():
        stretches.sort()
        for one, other in pairwise(stretches):
            if one.begin + one.length > other.begin:
                raise CheckpointError(
                    f"checkpoint {folder}: {one.file} and {other.file} both hold element {other.begin:,} of "
                    f"{_shown(key)}; they come from different saves"
                )
    return whole


def selected(table: Table, needs: Mapping[str, tuple[int, int]]) -> Table:
    """The part of a table that a rank needs if it keeps the elements [begin, begin + length) of each name.

    A kind without elements in that range stays in the result, as an empty list. Otherwise the rank would believe that
    the checkpoint does not have this kind.
    """
    found: Table = {}
    for key, stretches in table.items():
        if (range_ := needs.get(key.split("/", 1)[1])) is not None:
            begin, end = range_[0], sum(range_)
            first = max(0, bisect_right(stretches, (begin,)) - 1)
            last = bisect_right(stretches, (end - 1, _LAST))
            found[key] = [one for one in stretches[first:last] if one.begin + one.length > begin]
    return found


def shares(
    folder: Path, answers: Sequence[tuple[Table, str | None, Mapping[str, tuple[int, int]]]]
) -> list[tuple[Table, str | None]]:
    """For each rank, the part that it needs of all tables, or the error that every rank raises.

    Args:
        answers: for each rank, the table of its share of the parts, what was wrong with them, and what it needs.
    """
    error = next((error for _, error, _ in answers if error is not None), None)
    try:
        table = merged(folder, [found for found, _, _ in answers])
    except CheckpointError as problem:
        error = error or str(problem)
    if error is not None:
        return [({}, error) for _ in answers]
    return [(selected(table, needs), None) for _, _, needs in answers]


def _opened(path: Path, buffering: int = -1) -> Any:
    try:
        return path.open("rb", buffering)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; put it back from a copy") from error


def _stretches(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Stretch]]:
    tensors, metadata, start = _parse(path, stream)
    size = path.stat().st_size - start
    try:
        begins = metadata["begins"]
        places = []
        for key, tensor in tensors.items():
            length, first, end = _checked(key, tensor, size)
            begin = begins[key.split("/", 1)[1]]
            if not _is_count(begin):
                raise ValueError(f"{_shown(key)} begins at element {_shown(begin)}")
            places.append((first, end, key, Stretch(begin, length, path.name, start + first, tensor["dtype"])))
        expected = 0
        for first, end, key, _ in sorted(places):
            if first != expected:
                raise ValueError(
                    f"{_shown(key)} begins at byte {first:,}; expected {expected:,}, where the tensor before it ends"
                )
            expected = end
        if expected != size:
            raise ValueError(f"its tensors end at byte {expected:,} of {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    for _, _, key, stretch in places:
        yield key, stretch


def _checked(key: str, tensor: Any, size: int) -> tuple[int, int, int]:
    """The number of elements, the first byte and the end of a tensor. Raises ValueError if they do not fit together."""
    kind, slash, name = key.partition("/")
    if not (kind and slash and name) or not isinstance(tensor, dict) or tensor.keys() != _KEYS:
        raise ValueError(f"{_shown(key)} is {_shown(tensor)}; expected KIND/NAME with {', '.join(sorted(_KEYS))}")
    dtype, shape, offsets = (tensor[field] for field in ("dtype", "shape", "data_offsets"))
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"{_shown(key)} has dtype {_shown(dtype)}; expected one of {', '.join(DTYPES)}")
    for values, count in ((shape, 1), (offsets, 2)):
        if type(values) is not list or len(values) != count or not all(_is_count(value) for value in values):
            raise ValueError(
                f"{_shown(key)} has shape {_shown(shape)} and data_offsets {_shown(offsets)}; expected one length and "
                "two offsets"
            )
    (length,), (first, end) = shape, offsets
    if end > size or end - first != length * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{_shown(key)} has {_shown(length)} elements of {dtype}, which do not fit bytes {_shown(first)} to "
            f"{_shown(end)} of {size:,}"
        )
    return length, first, end


def _parse(path: Path, stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Read a header. Returns the tensors, the metadata, and the byte where the tensors begin."""
    try:
        size, head = path.stat().st_size, stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"it is not a safetensors file: its header would take {length:,} of {size:,} bytes")
        tensors = _json(stream.read(length))
        texts = tensors.pop("__metadata__")
        metadata = {name: _json(value) for name, value in texts.items()}
        return tensors, metadata, 8 + length
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _json(text: str | bytes) -> Any:
    """Parse JSON. A name that comes twice, NaN and Infinity are errors."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a name is given twice")
        return values

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a valid number")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _shown(value: Any) -> str:
    """A value of a header as a short text on one line."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = f"its header has no {_shown(error.args[0])}" if isinstance(error, KeyError) else str(error)
    return CheckpointError(f"{path}: cannot be read: {reason}; put it back from a copy")


def _read(stream: BinaryIO, stretch: Stretch, begin: int, out: Tensor) -> None:
    dtype = DTYPES[stretch.dtype]
    direct = out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()
    block = _BLOCK_BYTES // dtype.itemsize
    staging = None if direct else torch.empty(min(block, out.numel()), dtype=dtype)
    stream.seek(stretch.offset + (begin - stretch.begin) * dtype.itemsize)
    for first in range(0, out.numel(), block):
        piece = out[first : first + block]
        target = piece if staging is None else staging[: piece.numel()]
        _read_into(stream, target)
        if staging is not None:
            piece.copy_(target)


def _read_into(stream: Any, target: Tensor) -> None:
    content = memoryview(target.detach().view(torch.uint8).numpy().data)
    while len(content):
        count = stream.readinto(content)
        if not count:
            raise CheckpointError(f"{stream.name}: it ends before its tensors do")
        content = content[count:]
