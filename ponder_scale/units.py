"""Numbers for a person, in the unit that fits them: a laptop's model is no 0.000B, its training no 0.0 days."""

from __future__ import annotations

LETTERS = (("T", 1e12), ("B", 1e9), ("M", 1e6))
BYTES = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
TIMES = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))


def count(number: float) -> str:
    """Of tokens, parameters, operations: 204,800 with every digit, from a million on 1.500M, 1.500B, 1.500T."""
    for letter, unit in LETTERS:
        if abs(number) >= unit * 0.9999995:  # what would be rounded to 1000.000 of the next smaller one
            return f"{number / unit:,.3f}{letter}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def size(number: float) -> str:
    """Of memory and files, from bytes: 61.2 GiB, 2.06 MiB, to three digits."""
    for name, unit in BYTES:
        if number >= unit:
            return f"{_three_digits(number / unit)} {name}"
    return f"{number:.0f} bytes"


def span(seconds: float) -> str:
    """A time in one unit: 30.3 days, 15.0 min, 45.0 s, 12 ms. In two, as a clock gives it: `records.duration`."""
    for name, unit in TIMES:
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 1 or not seconds else f"{_three_digits(1000 * seconds)} ms"


def rate(number: float) -> str:
    """Per second: as `count`, but whole, and with two digits where there are few."""
    return f"{number:.2g}" if number < 100 else count(round(number))


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"
