"""The device of a model for which none was chosen."""

from __future__ import annotations

import torch


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
