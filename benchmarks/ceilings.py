"""Measure the limits of a device: products, memory, launches and the link to the host. The planner uses the results."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.rows import Place, Row, seconds, tried
from ponder_scale.planning.hardware import peak_flops

LAUNCHES = 100  # captured in one graph
TOKENS, VOCABULARY, LENGTH, HEAD = 8192, 50304, 2048, 128  # for the shapes below
WIDTHS = (768, 1024, 2048, 2560)  # widths D of the recipes


def ceilings(place: Place) -> Iterator[Row]:
    """Yield a row for each upper limit of this device."""
    yield tried("largest product", partial(_largest_product, place))
    yield tried("copy in memory", partial(_copy, place))
    yield tried("a launch", partial(_launch, place))
    if place.device == "cuda":
        yield tried("a launch in a graph", partial(_graph, place))
        for name, there in (("host to device", True), ("device to host", False)):
            yield tried(name, partial(_link, place, name, there))


def calibration(place: Place) -> Iterator[Row]:
    """Yield the speed of the operations in a training step, by shape. The planner uses them as constants."""
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
    """Seconds for torch's own product of (rows, inner) x (inner, columns)."""
    left, right = place.tensor(rows, inner), place.tensor(columns, inner)
    return seconds(lambda: F.linear(left, right), place.device)


def copy_bandwidth(place: Place) -> float:
    """Bytes read and written per second by a copy that is too large for any cache."""
    source = torch.empty(2**20 if place.toy else 2**31, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), place.device)


def launch_seconds(place: Place) -> float:
    """Seconds from the launch of one tiny operation to the next, when Python issues them one after another."""
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
    # counted as the planner counts a causal layer: three forwards
    flops = 3 * 2.0 * tokens * width * (length + 1) / took
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
