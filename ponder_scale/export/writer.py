"""Write safetensors files one tensor at a time. Headers are planned from shapes, so no file is ever whole in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ponder_scale.checkpoint.header import plan_header
from ponder_scale.errors import CheckpointError
from ponder_scale.files.write import sync

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def write_safetensors(
    folder: Path, shapes: Mapping[str, torch.Size], weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write the tensors, in `dtype`, as model.safetensors, or as several files and their index.

    Args:
        shapes: shapes of the expected tensors, in the order of the files.
        weights: pairs (name, tensor) in any order. Each is dropped before the next is taken.

    Raises:
        CheckpointError: a tensor is not expected, has another shape, comes twice or is missing.
    """
    places = _plan(folder, shapes, dtype)
    waiting = set(shapes)
    for name, weight in weights:
        if name not in waiting or weight.shape != shapes[name]:
            wanted = f"shape {tuple(shapes[name])}" if name in shapes else "no such weight"
            raise CheckpointError(f"{name} has shape {tuple(weight.shape)}, but the model to write has {wanted}")
        waiting.remove(name)
        file, offset = places[name]
        with file.open("rb+") as stream:
            stream.seek(offset)
            weight.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tofile(stream)
            sync(stream)
    if waiting:
        raise CheckpointError(f"there is no weight for {', '.join(sorted(waiting)[:5])}")


def _plan(folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> dict[str, tuple[Path, int]]:
    """Write the headers and the index. Returns the file of each tensor and its offset there."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if shards[-1] and used + size > MAX_SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    places: dict[str, tuple[Path, int]] = {}
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        places |= _write_header(folder / file, {name: shapes[name] for name in names}, dtype)
    if len(shards) > 1:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: places[name][0].name for name in sorted(shapes)}
        content = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(content + "\n", encoding="utf-8")
    return places


def _write_header(path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> dict[str, tuple[Path, int]]:
    header = plan_header({name: (dtype, shape) for name, shape in shapes.items()}, {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(header.content)
        stream.truncate(header.file_bytes)
    return {name: (path, offset) for name, offset in header.offsets.items()}
