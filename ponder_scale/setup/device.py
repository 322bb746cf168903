"""Where a model goes that nobody has placed."""

from __future__ import annotations

import torch


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
