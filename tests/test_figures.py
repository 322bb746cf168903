"""Numbers beyond every bound: shown and kept, and never the end of what shows them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from ponder_scale.data.heldout import HeldOut
from ponder_scale.evaluate.plot import line_chart
from ponder_scale.export.card import trained_card
from ponder_scale.figures import bound, count, json_text, perplexity, rate, shown, size, span, stored, times

LARGEST = 709.78  # whose exp a float holds


def strictly(text: str) -> Any:
    """JSON as every parser reads it; Python's own also takes NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_a_perplexity_beyond_a_float_is_inf() -> None:
    losses = [math.log(2), LARGEST, 710.0, 1e300, math.inf, math.nan]
    values = HeldOut(losses, 1).perplexities
    assert values[0] == pytest.approx(2) and 1e308 < values[1] < math.inf
    assert values[2:5] == [math.inf] * 3 and math.isnan(values[5]) and math.isnan(perplexity(None))
    assert [shown(value) for value in (12.345, 1.5e300, math.inf, math.nan)] == [
        "12.35",
        "1.50e+300",
        "inf",
        "not finite",
    ]


def test_json_has_null_for_what_it_has_no_number_for() -> None:
    content = {"losses": [1.0, math.inf, (math.nan,)], 3: {"text": "NaN", "whole": 7, "none": None, "true": True}}
    assert strictly(json_text(content)) == {
        "losses": [1.0, None, [None]],
        "3": {"text": "NaN", "whole": 7, "none": None, "true": True},
    }


def test_a_chart_leaves_out_what_it_cannot_place() -> None:
    assert "nan" not in line_chart({"a": [(1, math.nan), (2, 3.0), (3, math.inf)], "b": []}, "x", "y")
    assert "polyline" in line_chart({"a": [(1, math.nan)]}, "x", "y")


def test_a_card_tells_a_loss_that_has_no_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    from ponder_scale.export import card

    rows: dict[str, str] = {}
    monkeypatch.setattr(card, "model_card", lambda *arguments: rows.update(arguments[3]) or "")
    monkeypatch.setattr(card, "configuration_from_dict", lambda values: values)
    config = {"data": {"sources": {"x": {"weight": 1.0}}, "seq_len": 8}, "optim": {"ema": None}}
    state = {"config": config, "tokens": 8, "step": 1, "loader": {"shards": "a"}, "versions": {}, "model": {}}
    trained_card("name", state, {"losses": [800.0, None], "step": 1}, 5, None)
    assert rows["held-out loss (perplexity)"] == "pass 0: 800.0000 (inf), pass 1: not finite, at step 1"
    trained_card("name", state, {"losses": [2.0], "bits_per_byte": [1.25], "step": 1}, 5, None)
    assert rows["held-out loss (perplexity)"] == "pass 0: 2.0000 (7.39); the last is 1.2500 bits per byte, at step 1"


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
    ("number", "text"),
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1234, "1.2 kB"), (999_960, "1.0 MB"), (12.5e6, "12.5 MB")),
        *((999.96e6, "1.000 GB"), (1.25e9, "1.250 GB"), (3e12, "3.000 TB")),
    ],
)
def test_stored_data_has_the_units_of_disks(number: float, text: str) -> None:
    assert stored(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (0.0125, "0.0125"), (3.3333, "3.33"), (8112.7, "8,113")])
def test_how_often_has_three_digits_and_every_whole_one(number: float, text: str) -> None:
    assert times(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.00042, "0.42 ms"), (1.5, "1.5 s"), (900, "15.0 min"), (7200, "2.0 h"), (2.6e6, "30.1 days")],
)
def test_times_have_one_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0.25, "0.25"), (42.4, "42"), (512_000.4, "512,000"), (5.12e6, "5.120M")])
def test_rates_are_whole_where_they_are_large(number: float, text: str) -> None:
    assert rate(number) == text


def test_a_limit_is_written_with_its_digits_or_a_short_power() -> None:
    values = [0, 64, 2**31 - 1, 1.0, 0.5, 1e6, 2.0**31, 1e9, 1e12, 1e-6, 1e-30, 0.999999, 2.5e-8]
    expected = "0 64 2,147,483,647 1 0.5 1,000,000 2,147,483,648 1e9 1e12 1e-6 1e-30 0.999999 2.5e-8"
    assert [bound(value) for value in values] == expected.split()
