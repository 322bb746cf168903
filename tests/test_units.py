"""Numbers for a person: in the unit that fits, at every size."""

from __future__ import annotations

import pytest

from ponder_scale.units import count, rate, size, span


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (2304, "2,304"),
        (999_999, "999,999"),
        (1.3e6, "1.300M"),
        (999_999_900, "1.000B"),
        (3e13, "30.000T"),
    ],
)
def test_counts_keep_every_digit_until_there_are_millions(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(12, "12 bytes"), (2048, "2.00 KiB"), (33e6, "31.5 MiB"), (61.25 * 2**30, "61.2 GiB"), (2**41, "2.00 TiB")],
)
def test_sizes_have_three_digits(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.00042, "0.42 ms"), (1.5, "1.5 s"), (900, "15.0 min"), (7200, "2.0 h"), (2.6e6, "30.1 days")],
)
def test_times_have_one_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0.25, "0.25"), (42.4, "42"), (512_000.4, "512,000"), (5.12e6, "5.120M")])
def test_rates_are_whole_where_they_are_large(number: float, text: str) -> None:
    assert rate(number) == text
