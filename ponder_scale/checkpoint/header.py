"""Plan the header of a safetensors file from the shapes of its tensors.

The file has 8 bytes with the length of the header, the header as JSON, and then the tensors' bytes in the same order
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Header(NamedTuple):
    """The beginning of a file, and the place of each tensor in it."""

    content: bytes
    offsets: dict[str, int]  # from the beginning of the file
    file_bytes: int


def plan_header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> Header:
    """The header of a file of tensors of these types and shapes."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    begins, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name], end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers need aligned tensors
    whole = len(encoded).to_bytes(8, "little") + encoded
    return Header(whole, {name: len(whole) + begin for name, begin in begins.items()}, len(whole) + end)
