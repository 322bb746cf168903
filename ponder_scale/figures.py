"""Numbers as people and other programs write and read them, those that have left every bound among them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

LETTERS = (("T", 1e12), ("B", 1e9), ("M", 1e6))
BYTES = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
# (unit, bytes, the least that is not rounded to 1,000 of the next smaller one, digits)
DECIMALS = (
    *(("TB", 1e12, 0.9999995e12, 3), ("GB", 1e9, 0.99995e9, 3)),
    *(("MB", 1e6, 0.99995e6, 1), ("kB", 1e3, 0.9995e3, 1)),
)
TIMES = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))


def perplexity(loss: float | None) -> float:
    """exp of a mean loss in nats: inf above 709, where a float ends; nan for None, as JSON has what is not finite."""
    if loss is None:
        return math.nan
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, tokens: int, size: int | None) -> float | None:
    """Bits per byte of a mean loss in nats over `tokens` tokens of `size` bytes. None if the bytes are not known."""
    return loss * tokens / (size * math.log(2)) if size else None


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


def bound(value: float) -> str:
    """Of a limit, with every digit: 1,000,000, 0.5; 1e12 and 1e-6 where a power of ten says it shorter."""
    mantissa, _, exponent = f"{value:g}".partition("e")
    if isinstance(value, float) and exponent and float(f"{mantissa}e{exponent}") == value and value != 1e6:
        return f"{mantissa}e{int(exponent)}"
    return f"{int(value):,}" if value == int(value) else str(value)


def count(number: float) -> str:
    """Of tokens, parameters, operations: 204,800 with every digit, from a million on 1.500M, 1.500B, 1.500T."""
    for letter, unit in LETTERS:
        if abs(number) >= unit * 0.9999995:  # what would be rounded to 1000.000 of the next smaller one
            return f"{number / unit:,.3f}{letter}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def times(number: float) -> str:
    """How often, to three digits and every whole one: 0.0125, 3.33, 8,113."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


def size(number: float) -> str:
    """Of memory and files, from bytes: 61.2 GiB, 2.06 MiB, to three digits."""
    for name, unit in BYTES:
        if number >= unit:
            return f"{_three_digits(number / unit)} {name}"
    return f"{number:.0f} bytes"


def stored(number: float) -> str:
    """Of data on disk, from bytes, in the decimal units of disks: 1.250 GB, 12.5 MB, 3.1 kB, 812 bytes."""
    for name, unit, least, digits in DECIMALS:
        if number >= least:
            return f"{number / unit:,.{digits}f} {name}"
    return f"{number:.0f} bytes"


def span(seconds: float) -> str:
    """A time in one unit: 30.3 days, 15.0 min, 45.0 s, 12 ms. In two, as a clock gives it: `duration`."""
    for name, unit in TIMES:
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 1 or not seconds else f"{_three_digits(1000 * seconds)} ms"


def duration(seconds: float) -> str:
    """Seconds in words of two units: 45s, 3m20s, 5h07m, 2d04h."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def rate(number: float) -> str:
    """Per second: as `count`, but whole, and with two digits where there are few."""
    return f"{number:.2g}" if number < 100 else count(round(number))


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
