"""What the device at hand can do at best: products, memory, launches, the link to the host. The planner's constants."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.rows import Place, Row, seconds, tried
from ponder_scale.planning.hardware import peak_flops

LAUNCHES = 100  # captured in one graph
TOKENS, VOCABULARY, LENGTH, HEAD = 8192, 50304, 2048, 128  # of the shapes below
WIDTHS = (768, 1024, 2048, 2560)  # D of the recipes


def ceilings(place: Place) -> Iterator[Row]:
    """The most that anything can reach here, each of it a row."""
    yield tried("largest product", partial(_largest_product, place))
    yield tried("copy in memory", partial(_copy, place))
    yield tried("a launch", partial(_launch, place))
    if place.device == "cuda":
        yield tried("a launch in a graph", partial(_graph, place))
        for name, there in (("host to device", True), ("device to host", False)):
            yield tried(name, partial(_link, place, name, there))


def calibration(place: Place) -> Iterator[Row]:
    """The speed of what a step is made of, by shape: constants for a model of its time."""
    tokens, vocabulary, length, widths = (64, 500, 32, (64,)) if place.toy else (TOKENS, VOCABULARY, LENGTH, WIDTHS)
    for width in widths:
        for name, other in (("D x D", width), ("D x 2.7 D", 8 * round(width * 2.6875 / 8)), ("D x V", vocabulary)):
            what = f"product {tokens} x {width} x {other} ({name})"
            yield tried(what, partial(_product, place, what, tokens, width, other))
    for width in widths:
        what = f"attention, {tokens} tokens in sequences of {length}, D {width}, forward and backward"
        yield tried(what, partial(_attention, place, what, tokens, length, width))
        what = f"norm of {tokens} x {width}, forward and backward"
        yield tried(what, partial(_norm, place, what, tokens, width))
    yield tried("a launch", partial(_launch, place))


def product_seconds(place: Place, rows: int, inner: int, columns: int) -> float:
    """Of (rows, inner) x (inner, columns), by torch's own product."""
    left, right = place.tensor(rows, inner), place.tensor(columns, inner)
    return seconds(lambda: F.linear(left, right), place.device)


def copy_bandwidth(place: Place) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.empty(2**20 if place.toy else 2**31, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), place.device)


def launch_seconds(place: Place) -> float:
    """From the start of one operation on almost nothing to that of the next, as Python gives them."""
    few = place.tensor(1)
    return seconds(lambda: few.add_(1.0), place.device)


def _largest_product(place: Place) -> Row:
    size = 128 if place.toy else 8192
    flops = 2.0 * size**3 / product_seconds(place, size, size, size)
    peak = peak_flops(torch.cuda.get_device_name()) if place.device == "cuda" else None
    share = "" if peak is None else f"{flops / peak:.0%} of the data sheet's {peak / 1e12:.0f}"
    return Row(f"product of {size}^3, {place.dtype}", f"{flops / 1e12:.4g} TFLOP/s", share, {"flops": flops})


def _copy(place: Place) -> Row:
    found = copy_bandwidth(place)
    return Row("copy in memory, read and written", f"{found / 1e12:.3g} TB/s", "", {"bytes_per_second": found})


def _launch(place: Place) -> Row:
    found = launch_seconds(place)
    return Row("a launch from Python", f"{1e6 * found:.2f} us", "", {"seconds": found})


def _graph(place: Place) -> Row:
    few = place.tensor(1)
    few.add_(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            few.add_(1.0)
    found = seconds(graph.replay, place.device) / LAUNCHES
    return Row("a launch in a CUDA graph", f"{1e6 * found:.2f} us", "", {"seconds": found})


def _link(place: Place, name: str, there: bool) -> Row:
    size = 2**20 if place.toy else 2**28
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device=place.device)
    source, target = (host, device) if there else (device, host)
    found = size / seconds(lambda: target.copy_(source, non_blocking=True), place.device)
    return Row(f"{name}, pinned", f"{found / 1e9:.1f} GB/s", "", {"bytes_per_second": found})


def _product(place: Place, what: str, rows: int, inner: int, columns: int) -> Row:
    took = product_seconds(place, rows, inner, columns)
    flops = 2.0 * rows * inner * columns / took
    values: dict[str, Any] = {"rows": rows, "inner": inner, "columns": columns, "seconds": took, "flops": flops}
    return Row(what, f"{flops / 1e12:.4g} TFLOP/s", f"{1e3 * took:.3g} ms", values)


def _attention(place: Place, what: str, tokens: int, length: int, width: int) -> Row:
    heads = max(1, width // HEAD)
    shape = (max(1, tokens // length), heads, length, width // heads)
    query, key, value = (place.tensor(*shape).requires_grad_() for _ in range(3))
    upstream = place.tensor(*shape)

    def both() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).backward(upstream)

    took = seconds(both, place.device)
    flops = 3 * 2.0 * tokens * width * (length + 1) / took  # as the planner counts a causal layer, three forwards
    return Row(what, f"{flops / 1e12:.4g} TFLOP/s", f"{1e3 * took:.3g} ms", {"seconds": took, "flops": flops})


def _norm(place: Place, what: str, tokens: int, width: int) -> Row:
    inputs, weight = place.tensor(tokens, width).requires_grad_(), place.tensor(width).requires_grad_()
    upstream = place.tensor(tokens, width)

    def both() -> None:
        F.rms_norm(inputs, (width,), weight).backward(upstream)

    took = seconds(both, place.device)
    moved = 5 * inputs.numel() * inputs.element_size()  # x and y forward; x, dy and dx backward
    values = {"seconds": took, "bytes_per_second": moved / took}
    return Row(what, f"{moved / took / 1e12:.3g} TB/s", f"{1e3 * took:.3g} ms", values)
