"""Draw charts as self-contained SVGs: lines over numbers, and bars by group."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 70, 190, 20, 50
COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#17becf",
    "#8c564b",
    "#7f7f7f",
)
TICKS = 5


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """A chart with a legend, and with a line and its points for each of `series`.

    Args:
        series: by name, pairs (x, y) in order of x. Points that are not finite are left out.
    """
    series = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    xs, ys = xs or [0.0], ys or [0.0]
    x_low, x_span = min(xs), (max(xs) - min(xs)) or 1.0
    y_low, y_span = min(ys), (max(ys) - min(ys)) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM)

    parts = [_svg(WIDTH, HEIGHT)]
    values, digits = _round_values(y_low, y_low + y_span)
    for value in values:
        _, down = place(x_low, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{value:.{digits}f}</text>')
    for x in sorted(set(xs)) if len(set(xs)) <= 12 else _round_values(x_low, x_low + x_span)[0]:
        across, _ = place(x, y_low)
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:.4g}</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(x, y) for x, y in points]
        line = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{colour}"/>' for across, down in places]
        down = TOP + 10 + 18 * number
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{down}" fill="{colour}">{escape(name)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(_y_title(y_label))
    return "\n".join([*parts, "</svg>\n"])


def bar_chart(groups: Sequence[str], series: Mapping[str, Sequence[Sequence[float]]], y_label: str) -> str:
    """A chart with a bar for each group and series. The bar shows the mean of the values, and dots show each value.

    Args:
        series: by name, the values of each group in the order of `groups`. Values are between 0 and 1.
    """
    across, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [_svg(WIDTH, HEIGHT)]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        down = HEIGHT - BOTTOM - value * height
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    each = across / len(groups)
    wide = 0.84 * each / len(series)
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        for place, found in enumerate(values):
            left = LEFT + place * each + 0.08 * each + number * wide
            high = height * sum(found) / len(found)
            parts.append(
                f'<rect x="{left:.1f}" y="{HEIGHT - BOTTOM - high:.1f}" width="{0.9 * wide:.1f}" '
                f'height="{high:.1f}" fill="{colour}" fill-opacity="0.55"/>'
            )
            parts += [
                f'<circle cx="{left + 0.45 * wide:.1f}" cy="{HEIGHT - BOTTOM - height * value:.1f}" r="2" '
                f'fill="{colour}"/>'
                for value in found
            ]
        down = TOP + 10 + 18 * number
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{down}" fill="{colour}">{escape(name)}</text>')
    for place, name in enumerate(groups):
        middle = LEFT + (place + 0.5) * each
        for line, words in enumerate(textwrap.wrap(name, max(8, int(each / 5.8)))[:3]):
            down = HEIGHT - BOTTOM + 16 + 12 * line
            text = f'<text x="{middle:.1f}" y="{down}" text-anchor="middle" font-size="10">{escape(words)}</text>'
            parts.append(text)
    return "\n".join([*parts, _y_title(y_label), "</svg>\n"])


def _svg(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )


def _y_title(label: str) -> str:
    return f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(label)}</text>'


def _round_values(low: float, high: float) -> tuple[list[float], int]:
    """At most `TICKS` + 1 multiples of 1, 2 or 5 times a power of ten, and their number of decimals."""
    power = math.floor(math.log10((high - low) / TICKS))
    each = next(each for factor in (1, 2, 5, 10) if (high - low) / (each := factor * 10.0**power) <= TICKS)
    numbers = range(math.ceil(low / each - 1e-9), math.floor(high / each + 1e-9) + 1)
    return [number * each for number in numbers], max(0, -math.floor(math.log10(each) + 1e-9))
