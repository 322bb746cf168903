"""The chart of a comparison."""

from __future__ import annotations

import re

from ponder_scale.evaluate.plot import line_chart


def test_the_ticks_of_a_chart_are_round_numbers() -> None:
    points = [(2304.0 + 48_123.0 * index, 3.87 - 0.0371 * index) for index in range(16)]
    chart = line_chart({"loss": points}, "tokens", "nats")
    assert re.findall(r'text-anchor="end">([\d.]+)<', chart) == ["3.4", "3.6", "3.8"]
    across = re.findall(r'text-anchor="middle">([\de+.]+)<', chart)
    assert [float(text) for text in across] == [200_000, 400_000, 600_000]
