"""The tiles of the Triton kernels, by compute capability of the GPU and size of an element.

A tile that compiles for one GPU may need more shared memory than another GPU has, or spill registers there. So each GPU
has its own row, and tests compile every row for its GPU. A GPU without a row uses the backend `chunked`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FEW_TOKENS = 64  # up to this number the tables are read once and the products wait for memory, as in decoding
WHOLE_DEPTH = 64  # depth of a step of every product in bf16, which divides the usual hidden sizes
INTERPRETED = (9, 0)  # the row that Triton's interpreter uses on a CPU
PROCESSORS_INTERPRETED = 132
BUSY_ENOUGH = 0.85  # share of the device's processors below which a sum is split
MOST_SPLITS = 64
LEAST_STEPS = 8  # steps of the depth in one part of a split sum


class LaunchFailed(RuntimeError):
    """A kernel did not start, so its outputs must not be used."""


class Tiles(NamedTuple):
    """The extent of one program's product (rows, columns, depth of a step), its warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class DeviceTiles(NamedTuple):
    """The tiles of every product on one GPU. The depth of `mix` divides the columns of the `exp` before it."""

    exp: Tiles  # scores and their exponentials
    tempered: Tiles  # the same at other temperatures than 1, where a loss needs two sums
    mix: Tiles  # exponentials with the table
    add: Tiles  # dz with the head, onto d_hidden
    gradient: Tiles  # p and dz, from two products
    tied: Tiles  # the same if head and table are one, which is loaded once
    learned: Tiles  # both, with learned losses, for which dz needs more registers
    head: Tiles  # the gradient of the loss with the hidden states, onto the gradient of the head
    few_exp: Tiles  # exp and mix for few tokens
    few_mix: Tiles
    persistent: bool = False  # programs of exp and tempered stay on a processor, and load by descriptors (TMA)
    specialized: bool = False  # such programs also divide the work among their warps


# shared memory that one block may ask for, in bytes
SHARED_MEMORY = {
    (8, 0): 166_912,  # A100, A30
    (8, 6): 101_376,  # RTX 30, A10, A40
    (8, 9): 101_376,  # RTX 40, L4, L40S
    (9, 0): 232_448,  # H100, H200
    (10, 0): 232_448,  # B200
    (12, 0): 101_376,  # RTX 50, RTX PRO Blackwell
}
_AMPERE = DeviceTiles(
    exp=Tiles(128, 128, 64, 8, 3),
    tempered=Tiles(128, 128, 64, 8, 3),
    mix=Tiles(128, 128, 64, 8, 3),
    add=Tiles(128, 128, 64, 8, 3),
    gradient=Tiles(128, 64, 64, 8, 3),
    tied=Tiles(128, 128, 64, 8, 3),
    learned=Tiles(128, 64, 64, 8, 3),
    head=Tiles(128, 128, 32, 8, 4),
    few_exp=Tiles(64, 128, 64, 4, 4),
    few_mix=Tiles(64, 128, 64, 4, 4),
)
_HOPPER = _AMPERE._replace(
    exp=Tiles(128, 256, 64, 8, 3),
    tempered=Tiles(128, 128, 64, 8, 4),
    mix=Tiles(128, 256, 64, 8, 3),
    gradient=Tiles(128, 128, 64, 8, 3),
    head=Tiles(128, 128, 64, 8, 3),
    persistent=True,
)
# On capability 9.0 Triton 3.6 and 3.9 do not specialize 8 warps, and 3.9 fails to compile 4.
_BLACKWELL = _HOPPER._replace(exp=Tiles(128, 128, 64, 8, 4), mix=Tiles(128, 128, 64, 8, 4), specialized=True)
_FP32 = DeviceTiles(
    exp=Tiles(64, 64, 16, 8, 3),
    tempered=Tiles(64, 64, 16, 8, 3),
    mix=Tiles(64, 128, 32, 8, 3),
    add=Tiles(64, 128, 32, 8, 3),
    gradient=Tiles(64, 64, 32, 8, 3),
    tied=Tiles(64, 64, 32, 8, 3),
    learned=Tiles(64, 64, 32, 8, 3),
    head=Tiles(64, 128, 32, 8, 3),
    few_exp=Tiles(64, 128, 32, 8, 3),
    few_mix=Tiles(64, 128, 32, 8, 3),
    persistent=True,
)
# by capability and bytes of an element
TABLE: dict[tuple[tuple[int, int], int], DeviceTiles] = {
    ((8, 0), 2): _AMPERE,
    ((8, 6), 2): _AMPERE,
    ((8, 9), 2): _AMPERE,
    ((9, 0), 2): _HOPPER,
    ((10, 0), 2): _BLACKWELL,
    ((12, 0), 2): _AMPERE._replace(persistent=True),
    (INTERPRETED, 4): _FP32,
}
_failed: set[Any] = set()  # (capability, dtype) for which no kernel is started any more
_not_persistent: set[Any] = set()  # the same for persistent kernels


def kernels_start(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels support these operands: bf16 or fp16 on a GPU that has tiles."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return False
    return importlib.util.find_spec("triton") is not None and tiles_for(device, dtype) is not None


def tiles_for(device: torch.device, dtype: torch.dtype) -> DeviceTiles | None:
    """The tiles for operands of a dtype on a device. None if the kernels must not be started."""
    kind = _capability(device), dtype
    row = None if kind in _failed else _row(kind[0], dtype.itemsize)
    return row._replace(persistent=False) if row is not None and kind in _not_persistent else row


def give_up_persistent(tensor: Tensor, failure: Exception) -> None:
    """Stop using persistent kernels for operands like this one, and warn once. The others remain."""
    _give_up(tensor, failure, _not_persistent, "a kernel that is not persistent")


def give_up(tensor: Tensor, failure: Exception) -> None:
    """Stop using the kernels for operands like this one, and warn once."""
    _give_up(tensor, failure, _failed, "the backend 'chunked'")


def _give_up(tensor: Tensor, failure: Exception, given_up: set[Any], instead: str) -> None:
    kind = _capability(tensor.device), tensor.dtype
    if kind not in given_up:
        given_up.add(kind)
        logger.warning(
            "a Triton kernel of the pondering embedding did not start on compute capability %d.%d (%s); this process "
            "continues with %s, which is slower and gives the same result within rounding",
            *kind[0],
            failure,
            instead,
        )


@functools.cache  # so that it also warns only once
def _row(capability: tuple[int, int], element_bytes: int) -> DeviceTiles | None:
    row = TABLE.get((capability, element_bytes))
    if row is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in SHARED_MEMORY)
        logger.warning(
            "the Triton kernels of the pondering embedding have no tiles for elements of %d bytes on compute "
            "capability %d.%d (known: %s); this process uses the backend 'chunked', which is slower and gives "
            "the same result within rounding",
            element_bytes,
            *capability,
            known,
        )
    return row


@functools.cache
def is_whole(width: int) -> bool:
    """Whether a hidden size consists of whole steps of every product. To mask a rest would take more registers."""
    if width % WHOLE_DEPTH == 0:
        return True
    logger.warning(
        "the hidden size %d is not a multiple of %d, which the Triton kernels of the pondering embedding need; this "
        "process uses the backend 'chunked', which is slower and gives the same result within rounding",
        width,
        WHOLE_DEPTH,
    )
    return False


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETED


def processors(tensor: Tensor) -> int:
    """The number of processors of a tensor's device. Each runs its own programs."""
    if not tensor.is_cuda:
        return PROCESSORS_INTERPRETED
    count: int = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return count


def splits(programs: int, steps: int, available: int) -> int:
    """The number of parts in which to compute a sum of `steps` steps, for `programs` tiles of the result.

    It is the least number that keeps almost all processors busy. If there is none, the number that keeps most busy.
    """
    most = max(1, min(MOST_SPLITS, steps // LEAST_STEPS))
    choices = sorted({_parts(steps, _parts(steps, parts)) for parts in range(1, most + 1)})
    enough = (parts for parts in choices if _busy(programs * parts, available) >= BUSY_ENOUGH)
    return next(enough, None) or max(choices, key=lambda parts: _busy(programs * parts, available))


def _parts(steps: int, each: int) -> int:
    return -(-steps // each)


def _busy(programs: int, available: int) -> float:
    """The share of busy processors, over all waves of programs."""
    return programs / (-(-programs // available) * available)
