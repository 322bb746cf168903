"""The random number generators of a rank: torch on the host and on its device, numpy, Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def states() -> dict[str, Any]:
    """The states of all of them, as JSON values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    values: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        values["cuda"] = _text(torch.cuda.get_rng_state())
    return values


def restore(values: dict[str, Any]) -> None:
    """Go on where `states` was taken."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(values["torch"]))
    if "cuda" in values and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(values["cuda"]))


def seed(run_seed: int, step: int, rank: int) -> None:
    """Begin anew, differently for each run, step and rank."""
    value = random.Random(f"generators {run_seed} {step} {rank}").getrandbits(32)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
