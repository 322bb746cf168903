"""Measure a machine for the planner: `ponder-scale plan --calibrate FILE`, in half a minute.

Two ranks measure at the same time, because they would also train at the same time. Then they measure the link between
them: with gloo on a CPU, with NCCL on two GPUs. One machine cannot measure the links between nodes, so these stay as in
the table. Each figure is a median.

The shapes are those of small models on a CPU and of large models on a GPU. Seconds are turned into rates by the same
counts that the planner uses to turn rates into seconds (`operations`, `time`).
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ponder_scale.config import ModelConfig
from ponder_scale.model.pondering_embedding import cross_entropy, pondering_embedding
from ponder_scale.planning.hardware import COLLECTIVES, CPU, Hardware, Link, hardware_of, read_hardware, write_hardware
from ponder_scale.planning.operations import Counting, Product, Rest
from ponder_scale.planning.time import LOSS_PRODUCTS, MIXTURE_PRODUCTS, TOP_K_ROWS, product_seconds
from ponder_scale.setup.build import build_model, model_configuration

SECONDS = 0.15  # each figure is measured for at least this long
RUNS = 7
TOP_K = 32
COLD_BYTES, MOST_TENSORS = 2**26, 128  # more than a processor's caches


class Sizes(NamedTuple):
    """The sizes of what is measured."""

    products: tuple[tuple[int, int, int], ...]  # (m, n, k)
    width: int
    inner: int  # width of the tensors on which elementwise operations are measured
    tokens: int
    vocabulary: int
    length: int  # tokens of a sequence in attention
    elements: int  # of one matrix of the optimizer, which has eight
    small: int  # bytes of a collective whose time is only latency
    large: int


ON_CPU = Sizes(
    products=((512, 256, 256), (512, 1024, 256), (1024, 384, 1024), (2048, 256, 688), (256, 688, 512), (384, 384, 512)),
    width=320,
    inner=1024,
    tokens=512,
    vocabulary=6000,
    length=128,
    elements=2**18,
    small=2**10,
    large=2**23,
)
ON_GPU = Sizes(
    products=((8192, 5504, 2048), (8192, 2048, 2048), (2048, 5504, 8192), (2048, 2048, 2048), (16384, 1024, 1024)),
    width=2048,
    inner=5504,
    tokens=8192,
    vocabulary=50304,
    length=2048,
    elements=2**24,
    small=2**10,
    large=2**28,
)


def calibrate(*, timeout: float = 300.0) -> Hardware:
    """The hardware of this machine, measured by two ranks. With one GPU, one rank measures and links are the table's.

    Raises:
        RuntimeError: a rank failed.
    """
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    environment = {**os.environ}
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", __name__, folder, str(ranks)]
        logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
        with ExitStack() as stack:
            processes = []
            for rank, log in enumerate(logs):
                stream = stack.enter_context(log.open("w", encoding="utf-8"))
                processes.append(subprocess.Popen([*command, str(rank)], env=environment, stdout=stream, stderr=stream))
                stack.callback(processes[-1].wait)
                stack.callback(processes[-1].kill)
            deadline = time.monotonic() + timeout
            # If one rank has failed, the other would wait for it.
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
        if any(code != 0 for code in codes):
            said = max((log.read_text(encoding="utf-8", errors="replace") for log in logs), key=len)
            raise RuntimeError(f"a rank of the calibration failed, exit codes {codes}: {said[-2000:]}")
        return read_hardware(Path(folder, "hardware.json"))


def measure(rank: int, ranks: int) -> Hardware:
    """Measure the hardware of this rank's device. Every rank of the process group calls it."""
    gpu = torch.cuda.is_available()
    device, sizes = torch.device("cuda", rank) if gpu else torch.device("cpu"), ON_GPU if gpu else ON_CPU
    row = hardware_of(torch.cuda.get_device_name(device)) if gpu else CPU
    precision, dtype = ("bf16", torch.bfloat16) if gpu else ("fp32", torch.float32)
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else _host_memory() // ranks
    found = replace(row, memory_bytes=float(memory), source="measured by ponder-scale plan --calibrate")
    found = _products(found, sizes, precision, device, dtype)
    found = _elementwise(found, sizes, device, dtype)
    found = replace(found, attention_share=_attention(sizes, device, dtype) / found.peak(precision))
    found = replace(found, vocabulary_share=_vocabulary(found, sizes, precision, device, dtype))
    here, host = (_optimizer(sizes, place) for place in (device, torch.device("cpu")))
    copies = _copies(sizes, device) if gpu else found.memory_bytes_per_second
    found = replace(
        found,
        optimizer_bytes_per_second=here,
        host_optimizer_bytes_per_second=host,
        host_bytes_per_second=copies,
    )
    if ranks > 1:
        inside = _link(sizes, device, row.inside)
        found = replace(found, inside=inside, between=row.between if gpu else inside)
    return found


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The median seconds of a call, after a first call to warm up."""
    spent: list[float] = []
    begin = time.perf_counter()
    while len(spent) <= RUNS or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _products(found: Hardware, sizes: Sizes, precision: str, device: Any, dtype: Any) -> Hardware:
    """Measure the rate of large products and the cost of edges: seconds an operation are linear in 1/m + 1/n + 1/k.

    The three products of a linear layer are measured together, forward and backward.
    """
    points = []
    for m, n, k in sizes.products:
        operands = _cold((m, k), device, dtype), _cold((n, k), device, dtype)
        grad = torch.randn(m, n, device=device, dtype=dtype)

        def run(operands: tuple[Iterator[Tensor], ...] = operands, grad: Tensor = grad) -> None:
            both = [next(each).requires_grad_() for each in operands]
            torch.autograd.grad(F.linear(*both), both, grad)

        points.append((1 / m + 1 / n + 1 / k, median_seconds(run, device) / (6.0 * m * n * k)))
    slope, least = _line(points)
    if least < min(each for _, each in points) / 2 or slope < 0:  # disturbed: no product is twice as fast as the best
        slope, least = 0.0, statistics.median(each for _, each in points)
    if device.type != "cuda":
        found = replace(found, peak_flops={"bf16": 1 / least, "fp32": 1 / least})
    return replace(found, product_share=1 / least / found.peak(precision), product_edge=slope / least)


def _cold(shape: tuple[int, ...], device: Any, dtype: Any) -> Iterator[Tensor]:
    """Tensors of a shape in turns, so many that none is in a cache when its turn comes, as in a training."""
    size = torch.empty((), dtype=dtype).element_size() * math.prod(shape)
    count = max(1, min(MOST_TENSORS, round(COLD_BYTES / size)))
    return itertools.cycle([torch.randn(shape, device=device, dtype=dtype) for _ in range(count)])


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The slope and the height at 0 of the line with the least squares of relative errors."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    x0 = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y0 = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True)) / spread
    return slope, y0 - slope * x0


def _elementwise(found: Hardware, sizes: Sizes, device: Any, dtype: Any) -> Hardware:
    """Measure the time of a call, bytes a second and exponentials a second, on operations like those of a layer."""

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x + weight * (x * x.mean(-1, keepdim=True))

    def costly(x: Tensor, weight: Tensor) -> Tensor:
        return F.silu(x) * (x + weight)

    def timed(function: Callable[..., Tensor], rows: int, columns: int) -> tuple[float, Rest]:
        inputs, weight = _cold((rows, columns), device, dtype), torch.randn(columns, device=device, dtype=dtype)

        def run() -> None:
            x = next(inputs).requires_grad_()
            torch.autograd.grad(function(x, weight), x, torch.ones_like(x))

        with Counting() as counting:
            run()
        parts = counting.operations.rest.values()
        return median_seconds(run, device), Rest(*map(sum, zip(*parts, strict=True)))

    seconds, rest = timed(plain, 2, 8)
    # An asynchronous device hides the time of calls on large tensors.
    own = 0.0 if found.asynchronous else seconds / rest.calls
    seconds, rest = timed(plain, sizes.tokens, sizes.inner)
    rate = rest.bytes / max(seconds - own * rest.calls, 0.1 * seconds)
    seconds, rest = timed(costly, sizes.tokens, sizes.inner)
    extra = max(seconds - own * rest.calls - rest.bytes / rate, 0.02 * seconds)
    call = _call_seconds(device, dtype)
    return replace(found, call_seconds=call, memory_bytes_per_second=rate, costly_per_second=rest.costly / extra)


def _call_seconds(device: Any, dtype: Any) -> float:
    """The seconds of an operation of a model so small that nothing else takes time, with the modules around it."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModelConfig(pondering_steps=1, **shape)  # type: ignore[arg-type]
    model = build_model(model_configuration(config, vocab_size=16, seq_len=8, eod_id=0), seed=0).to(device, dtype)
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=device)

    def run() -> None:
        model(input_ids=tokens, shift_labels=tokens, skip_logits=True).loss.backward()

    with Counting() as counting:
        run()
    return median_seconds(run, device) / sum(rest.calls for rest in counting.operations.rest.values())


def _attention(sizes: Sizes, device: Any, dtype: Any) -> float:
    """The FLOP/s of causal attention, forward and backward."""
    shape = (4, max(1, sizes.width // 64), sizes.length, 64)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def run() -> None:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(mixed, (q, k, v), torch.ones_like(mixed))

    with Counting() as counting:
        run()
    flops = sum(rest.attention_flops for rest in counting.operations.rest.values())
    return flops / median_seconds(run, device)


def _vocabulary(found: Hardware, sizes: Sizes, precision: str, device: Any, dtype: Any) -> dict[str, float]:
    """The shares of the peak that the products of the pondering embedding and of the loss reach, by way."""
    tokens, vocabulary, width = sizes.tokens, sizes.vocabulary, sizes.width
    hidden, head, table = (
        (0.1 * torch.randn(rows, width, device=device)).to(dtype).requires_grad_()
        for rows in (tokens, vocabulary, vocabulary)
    )
    labels = torch.randint(0, vocabulary, (tokens,), device=device)

    def mix(rows: Tensor, **options: Any) -> Callable[[], None]:
        def run() -> None:
            mixed, _ = pondering_embedding(hidden, head, rows, labels=labels, **options)
            inputs = [hidden, head] if rows is head else [hidden, head, rows]
            torch.autograd.grad(mixed, inputs, torch.ones_like(mixed))

        return run

    def loss() -> None:
        torch.autograd.grad(cross_entropy(hidden, head, labels)[0], (hidden, head))

    def share(run: Callable[[], None], products: int, apart: float = 0.0) -> float:
        whole = median_seconds(run, device)
        product = Product("forward", tokens, vocabulary, width, products)
        # A machine that slows down meanwhile must not make a product faster than the fastest.
        return min(1.0, product_seconds(product, found, precision, 1.0) / max(whole - apart, 0.1 * whole))

    rows = sum(TOP_K_ROWS) * tokens * TOP_K * width * hidden.element_size() / found.memory_bytes_per_second
    return {
        "mixture": share(mix(table), sum(MIXTURE_PRODUCTS)),
        "tied": share(mix(head), sum(MIXTURE_PRODUCTS)),
        "loss": share(loss, LOSS_PRODUCTS),
        "top_k": share(mix(table, top_k=TOP_K), 1, rows),
    }


def _optimizer(sizes: Sizes, device: torch.device) -> float:
    """The bytes a second of AdamW, which reads four numbers for each parameter and writes three."""
    elements = sizes.elements if device.type == "cuda" else ON_CPU.elements
    weights = [torch.zeros(elements, device=device, requires_grad=True) for _ in range(8)]
    optimizer = torch.optim.AdamW(weights, fused=device.type == "cuda")
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return 7 * 4 * 8 * elements / median_seconds(optimizer.step, device)


def _copies(sizes: Sizes, device: Any) -> float:
    """The bytes a second that are copied from the host's pinned memory."""
    host = torch.empty(sizes.large, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    return sizes.large / median_seconds(lambda: there.copy_(host, non_blocking=True), device)


def _link(sizes: Sizes, device: Any, known: Link) -> Link:
    """The link between the ranks: the rate of each collective, and the latency of one that sends almost nothing."""
    ranks, rates, small = dist.get_world_size(), {}, []
    for kind in COLLECTIVES:
        seconds = {}
        for size in (sizes.small, sizes.large):
            part = torch.zeros(size // 4 // ranks, device=device)
            whole = torch.zeros(part.numel() * ranks, device=device)
            seconds[size] = _alike(kind, part, whole)
        small.append(seconds[sizes.small])
        sent = (2 if kind == "all_reduce" else 1) * (sizes.large - sizes.small) * (ranks - 1) / ranks
        rates[kind] = sent / max(seconds[sizes.large] - seconds[sizes.small], 0.1 * seconds[sizes.large])
    latency = statistics.mean(small)
    hop = known.hop_seconds if device.type == "cuda" else latency / 2
    return Link(rates, max(0.0, latency - hop), hop)


def _alike(kind: str, part: Tensor, whole: Tensor) -> float:
    """The median seconds of a collective. Every rank calls it the same number of times."""
    spent = []
    for _ in range(2 * RUNS):
        dist.barrier()
        start = time.perf_counter()
        if kind == "all_gather":
            dist.all_gather_into_tensor(whole, part)
        elif kind == "all_reduce":
            dist.all_reduce(whole)
        else:
            dist.reduce_scatter_tensor(part, whole)
        if whole.is_cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def main(folder: str, ranks: int, rank: int) -> None:
    """One rank of `calibrate`."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(rank)
    backend, meeting = "nccl" if gpu else "gloo", f"file://{folder}/meeting"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=ranks)
    found = measure(rank, ranks)
    if rank == 0:
        write_hardware(Path(folder, "hardware.json"), found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
