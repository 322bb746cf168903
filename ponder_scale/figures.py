"""Numbers that may have left every bound: of a run that diverged, too, they are shown and kept, and end nothing."""

from __future__ import annotations

import json
import math
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


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
