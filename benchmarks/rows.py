"""The place where stages of `python -m benchmarks gpu` run, and the rows that they yield."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import wait


@dataclass(frozen=True)
class Place:
    """The device of the stages, and the size of their shapes."""

    device: str  # "cuda", or "cpu" for a rehearsal
    toy: bool = False  # tiny shapes, to test that everything runs
    train_minutes: float | None = None  # minutes of paired training; None if it was not requested

    @property
    def dtype(self) -> str:
        """The dtype in which training computes."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def tensor(self, *shape: int) -> torch.Tensor:
        """A tensor of random values. Products of zeros would be faster than real ones."""
        return torch.randn(*shape, device=self.device, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class Row:
    """One measurement for a table: what was measured, its figure, and a comparison such as a share or a multiple."""

    what: str
    figure: str
    beside: str = ""
    values: dict[str, Any] = field(default_factory=dict)  # the plain numbers, in SI units
    error: str | None = None


def tried(what: str, measure: Callable[[], Row]) -> Row:
    """Run `measure`. Out of memory is a result, and any other error becomes a row, so that the stage can continue."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        _release()
        return Row(what, "out of memory")
    except Exception as error:
        _release()
        sentence = " ".join(f"{type(error).__name__}: {error}".split())
        return Row(what, "failed", sentence[:200], error=sentence[:2000])


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds(function: Callable[[], Any], device: str, least: float = 0.05) -> float:
    """Seconds of one call, averaged over enough calls to take `least` seconds, after two warm-up calls."""
    for _ in range(2):
        function()
    calls = 1
    while True:
        wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            function()
        wait(device)
        took = time.perf_counter() - began
        if took >= least:
            return took / calls
        calls = max(2 * calls, min(100 * calls, int(1.2 * calls * least / max(took, 1e-9))))
