"""The parts of a checkpoint: one safetensors file a rank, with its stretches of the flattened parameters.

A tensor `KIND/NAME` (n,) holds the elements [begin, begin + n) of parameter NAME, flattened; KIND is `weight` (the
fp32 master) or a state of the optimizer. `begins` in the file's metadata has the first element of each name. What a
reader needs is found by name and range, so ranks and ZeRO stages may change between saving and loading, and no
tensor is ever put together that the reader did not ask for. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from torch import Tensor

from ponder_scale.errors import CheckpointError
from ponder_scale.manifest import sync

WEIGHT = "weight"
AVERAGE = "average"  # of the weights over the steps, where a run keeps one
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK_BYTES = 2**24  # bounds the memory that reading and writing take beside the tensors themselves


class Stretch(NamedTuple):
    """Elements [begin, begin + length) of a flattened parameter, in a file from byte `offset` on."""

    begin: int
    length: int
    file: str
    offset: int
    dtype: str


def part_name(rank: int) -> str:
    """The file of a rank."""
    return f"rank-{rank:05d}.safetensors"


def write_part(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], alive: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Write tensors (n,) to a file, sync it, and return its size and hash.

    Args:
        metadata: JSON values by name.
        alive: called for each block that is written.
    """
    header = _header(tensors, metadata)
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

    def __init__(
        self, folder: Path, files: Collection[str] | None = None, table: dict[str, list[Stretch]] | None = None
    ) -> None:
        """
        Args:
            files: to read from; None: all there are.
            table: that of another `Parts` of the same folder, to spare reading the headers of all files again.

        Raises:
            CheckpointError: a file is not what `write_part` writes.
        """
        self.folder = folder
        self.table = _table(folder, files) if table is None else table
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
        """What is held of a parameter: the weight and its states of the optimizer."""
        return self._kinds.get(name, [])

    def read(self, kind: str, name: str, begin: int, out: Tensor) -> None:
        """Fill `out` (n,) with the elements [begin, begin + n) of a parameter or of a state of it.

        Raises:
            CheckpointError: some of them are in no file.
        """
        position, end = begin, begin + out.numel()
        for stretch in self.table.get(f"{kind}/{name}", ()):
            stop = min(end, stretch.begin + stretch.length)
            if stretch.begin <= position < stop:
                _read(self.folder, stretch, position, out[position - begin : stop - begin])
                position = stop
        if position < end:
            raise CheckpointError(
                f"checkpoint {self.folder}: no {kind} for elements {position:,} to {end:,} of {name}; "
                "it is of another model or another optimizer"
            )


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {name: json.dumps(value) for name, value in metadata.items()}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        content[name] = {"dtype": _NAMES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [begin, end]}
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers want the tensors aligned
    return len(encoded).to_bytes(8, "little") + encoded


def _table(folder: Path, files: Collection[str] | None) -> dict[str, list[Stretch]]:
    paths = sorted(folder.glob("rank-*.safetensors")) if files is None else [folder / name for name in files]
    if not paths:
        raise CheckpointError(f"checkpoint {folder}: no {part_name(0)} in it; it is of another program or version")
    table: dict[str, list[Stretch]] = {}
    for path in paths:
        with path.open("rb") as stream:
            for key, stretch in _stretches(path, stream):
                table.setdefault(key, []).append(stretch)
    for stretches in table.values():
        stretches.sort()
    return table


def _stretches(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Stretch]]:
    tensors, metadata, start = _parse(path, stream)
    for key, tensor in tensors.items():
        begin = metadata["begins"][key.split("/", 1)[1]]
        length = math.prod(tensor["shape"])
        yield key, Stretch(begin, length, path.name, start + tensor["data_offsets"][0], tensor["dtype"])


def _parse(path: Path, stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Tensors, metadata, and the byte where the tensors begin."""
    try:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("not a safetensors file")
        tensors = json.loads(stream.read(length))
        metadata = {name: json.loads(value) for name, value in tensors.pop("__metadata__").items()}
        return tensors, metadata, 8 + length
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; nothing else is tried with such a file") from error


def _read(folder: Path, stretch: Stretch, begin: int, out: Tensor) -> None:
    dtype = DTYPES[stretch.dtype]
    direct = out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()
    block = _BLOCK_BYTES // dtype.itemsize
    staging = None if direct else torch.empty(min(block, out.numel()), dtype=dtype)
    with (folder / stretch.file).open("rb", buffering=0) as stream:
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
