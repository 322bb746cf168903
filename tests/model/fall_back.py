"""Kernels that do not start, under Triton's interpreter: prints as JSON what became of the numbers and what was logged.

    python -m tests.model.fall_back exp_product:launch none:capability      case -> numbers

Each case has a process of its own, forked from the one that imports: what falls back does so for good.

Run by test_kernels.py in a process of its own: TRITON_INTERPRET=1 counts when triton is imported.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ponder_scale.model import kernels, tiles
from ponder_scale.model.pondering_embedding import cross_entropy, pondering_embedding
from tests.model.interpret_kernels import leaves, operands, relative


class Refused:
    """A kernel that the driver does not start, and counts how often it was asked to."""

    def __init__(self, kernel: Any, error: Exception) -> None:
        self.fn, self.error, self.asked = kernel.fn, error, 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.asked += 1
            raise self.error

        return launch


class Counted:
    """A kernel that counts how often it is started."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.asked = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.asked += 1
        return self.kernel[grid]


def passes(count: int) -> dict[str, Any]:
    """Largest relative errors of values and gradients in several forwards and backwards."""
    tensors, labels, upstream = operands(torch.float32, tied=False)
    worst = 0.0
    for _ in range(count):
        ours, theirs = leaves(tensors, torch.float32, False), leaves(tensors, torch.float64, False)
        options: dict[str, Any] = {"temperature": 0.8, "scale": 2.0}
        mixed, _ = pondering_embedding(*ours, labels=labels, backend="triton", **options)
        expected, _ = pondering_embedding(*theirs, backend="eager", **options)
        (mixed * upstream).sum().backward()
        (expected * upstream).sum().backward()
        pairs = [(mixed, expected), *((got.grad, wanted.grad) for got, wanted in zip(ours, theirs, strict=True))]
        worst = max([worst, *(relative(*pair) for pair in pairs)])
    total, _ = cross_entropy(*ours[:2], labels, backend="triton")
    wanted, _ = cross_entropy(*theirs[:2], labels)
    return {"error": max(worst, relative(total, wanted))}


def fallen(case: str) -> dict[str, Any]:
    """What comes of a case `kernel:kind`."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ponder_scale.model.tiles").addHandler(handler)
    name, kind = case.split(":")
    if kind == "capability":
        tiles.INTERPRETED = (7, 5)
        return {**passes(2), "lines": lines}
    error = torch.OutOfMemoryError("no memory") if kind == "memory" else OutOfResources(131072, 101376, "shared memory")
    refused = Refused(getattr(kernels, name), error)
    setattr(kernels, name, refused)
    other = Counted(kernels.exp_product)
    if name == "exp_product":  # it runs where no persistent kernel does
        tiles.TABLE = {kind: row._replace(persistent=False) for kind, row in tiles.TABLE.items()}
    elif name == "persistent_exp_product":
        kernels.exp_product = other
    try:
        found = passes(3)
    except torch.OutOfMemoryError as raised:
        found = {"raised": str(raised)}
    return {**found, "lines": lines, "asked": refused.asked, "others": other.asked}


def main() -> None:
    cases = sys.argv[1:]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(dict(zip(cases, pool.map(fallen, cases, chunksize=1), strict=True))))


if __name__ == "__main__":
    main()
