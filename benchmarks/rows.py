"""What the stages of `python -m benchmarks gpu` measure on, and the rows that they give."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import wait


@dataclass(frozen=True)
class Place:
    """Where the stages run, and how large the shapes are."""

    device: str  # "cuda", or "cpu" for a rehearsal
    toy: bool = False  # shapes of no consequence, to see that everything runs
    train_minutes: float | None = None  # of paired training, where it is asked for

    @property
    def dtype(self) -> str:
        """That training computes in."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def tensor(self, *shape: int) -> torch.Tensor:
        """Random values: products of zeros are faster than real ones."""
        return torch.randn(*shape, device=self.device, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class Row:
    """One measurement: what it is of, its figure and what that is a share or a multiple of, for a table."""

    what: str
    figure: str
    beside: str = ""
    values: dict[str, Any] = field(default_factory=dict)  # the bare numbers, in SI units
    error: str | None = None


def tried(what: str, measure: Callable[[], Row]) -> Row:
    """What `measure` gives. That memory does not suffice is a finding. Any other error is kept; the stage goes on."""
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
    """Of one call, from as many that follow each other as take `least` seconds, after two that are not counted."""
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
