"""Read the weights of a checkpoint or of a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ponder_scale.checkpoint.find import average_since, read_state
from ponder_scale.checkpoint.index import STATE
from ponder_scale.checkpoint.parts import AVERAGE, WEIGHT, Parts
from ponder_scale.errors import CheckpointError


def read_weights(folder: Path, *, average: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The fp32 weights of a checkpoint as (name, tensor), in the order of the model. A tied weight comes once.

    Args:
        average: read the running average over the steps instead of the weights.

    Raises:
        CheckpointError: files are missing, their layout is unknown, or the run kept no average.
    """
    shapes, parts = _shapes(folder), Parts(folder)
    kind = AVERAGE if average else WEIGHT
    kept = average_since(read_state(folder)) is not None and AVERAGE in parts.kinds(next(iter(shapes)))
    if average and not kept:
        raise CheckpointError(
            f"{folder}: it holds no average of the weights; train with optim.ema, or export without --ema"
        )
    for name, shape in shapes.items():
        count = math.prod(shape)
        if not parts.has(kind, name, 0, count):  # checked before memory is allocated
            raise CheckpointError(f"checkpoint {folder}: its files lack some of the {count:,} elements of {name}")
        weight = torch.empty(shape)
        parts.read(kind, name, 0, weight.view(-1))
        yield name, weight


def _shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of all parameters, from state.json."""
    shapes = read_state(folder, "parameters")["parameters"]
    if not isinstance(shapes, dict) or not shapes:
        raise CheckpointError(f"{folder / STATE}: parameters: expected names and shapes")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise CheckpointError(
                f"{folder / STATE}: parameters: {name!r} has shape {ascii(shape)[:80]}; expected whole numbers"
            )
    return shapes


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face folder or of a universal checkpoint of DeepSpeed, as (name, tensor).

    A Hugging Face folder has safetensors or PyTorch files: one file under transformers' name, or those that its index
    lists. A universal checkpoint has zero/NAME/fp32.pt with {"param": tensor}, the master weight in fp32. If it was
    made from ZeRO-3, that file has only the tensor, flattened.

    Raises:
        CheckpointError: there are no such files, or one cannot be read.
    """
    for file in _files(folder):
        if file.suffix == ".pt":
            content = _load(file)
            named = {file.parent.name: content.get("param") if isinstance(content, dict) else content}
            yield from _tensors(file, named)
        elif file.suffix == ".bin":
            yield from _tensors(file, _load(file))
        else:
            yield from _safetensors(file)


def _files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        present = [name for name in (whole, f"{whole}.index.json") if (folder / name).is_file()]
        if len(present) > 1:
            raise CheckpointError(f"{folder}: has {' and '.join(present)}; remove the one that is not the model's")
        if present:
            return [folder / whole] if present == [whole] else _indexed(folder / present[0])
    universal = sorted(folder.glob("zero/*/fp32.pt"))
    if not universal:
        raise CheckpointError(
            f"{folder}: no weights in it; expected model.safetensors, pytorch_model.bin, an index of several "
            "(model.safetensors.index.json), or a universal checkpoint (zero/*/fp32.pt)"
        )
    return universal


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: cannot be read: {error!r}; download or export it again") from error
    for name in names:
        if type(name) is not str or Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}; expected the name of a file in its folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name}: missing, although {index.name} names it; download or export it again"
            )
    return [index.parent / name for name in names]


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 - safe_open has no iterator
                yield name, content.get_tensor(name)
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; download or export it again") from error


def _tensors(file: Path, content: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{file}: cannot be read: expected tensors by their names")
    yield from content.items()


# Other dtypes are integers or quantized, and their numbers mean nothing without their scales.
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Tensors in published folders that today's stock classes do not have, or compute themselves.
_LEFT_OUT = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def model_weights(
    model: Any, folder: Path, *, optional: Collection[str] = (), dropped: tuple[str, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder under the names of the model's parameters. A tied weight comes once.

    The folder may be one of our exports, or come from transformers' stock classes or from the published code, or be a
    universal checkpoint.

    Args:
        optional: names of parameters that the folder need not have.
        dropped: beginnings of the names of tensors that are left out.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or there is a tensor too many.
    """
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    tied = model.config.tie_word_embeddings
    for stored, tensor in read_folder(folder):
        name = "lm_head.weight" if stored == "embed_out.weight" else stored
        if name not in expected and f"{model.base_model_prefix}.{name}" in expected:
            name = f"{model.base_model_prefix}.{name}"  # the folder was saved from a bare backbone
        if stored == "adapter.weight" or stored.endswith(_LEFT_OUT) or (name == "lm_head.weight" and tied):
            continue
        if stored.startswith(dropped):
            continue
        shape = expected.pop(name, None)
        if shape is not None and tensor.shape == (shape.numel(),):
            tensor = tensor.view(shape)  # a universal checkpoint made from ZeRO-3 has no shapes
        if shape != tensor.shape:
            wanted = "no such parameter" if shape is None else f"shape {tuple(shape)}"
            raise CheckpointError(
                f"{folder}: {stored} has shape {tuple(tensor.shape)}, but the model has {wanted}; "
                "use weights of the same architecture and size"
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{folder}: {stored} has dtype {tensor.dtype}; expected floating-point weights of 16 bits or more; "
                "convert the folder first"
            )
        yield name, tensor
    expected = {name: shape for name, shape in expected.items() if name not in optional}
    if expected:
        raise CheckpointError(
            f"{folder}: it has no weight for {', '.join(sorted(expected)[:5])}; it belongs to another model"
        )


def _load(path: Path) -> Any:
    try:
        # Without weights_only, a pickle could run any code.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from error
