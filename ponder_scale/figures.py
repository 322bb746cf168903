"""Numbers as people and other programs write and read them, those that have left every bound among them."""

from __future__ import annotations

import json
import math
import re
from typing import Any


def perplexity(loss: float | None) -> float:
    """exp of a mean loss in nats: inf above 709, where a float ends; nan for None, as JSON has what is not finite."""
    if loss is None:
        return math.nan
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def shown(value: float) -> str:
    """A perplexity for people: two decimals, and three digits from a million on."""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else "inf"
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


def json_text(content: Any, indent: int | None = None) -> str:
    """Plain values as JSON that every parser reads: null for numbers that are not finite, which JSON does not have."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def seconds_of(text: str) -> float | None:
    """Seconds of "90", "30:00" (minutes), "12:00:00" or Slurm's "1-12:00:00", "1-12:00" and "1-12" (hours).

    None for anything else.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text.strip())
    if not found:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    if found[1]:  # after days Slurm counts from the left
        parts = [float(part) for part in text.strip().partition("-")[2].split(":")]
        hours, minutes, seconds = [*parts, 0.0, 0.0][:3]
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
