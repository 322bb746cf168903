"""`python -m benchmarks op`: the pondering embedding by every backend, against the method's published way.

Times are medians of runs that take turns in one process; ratios are to the published way in the same run. Peak memory
of a CPU run is measured in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.measure import (
    MIB,
    answer,
    check_dtype,
    check_numbers,
    device_name,
    in_fresh_process,
    medians,
    reset_peak,
    resident,
    wait,
)
from ponder_scale.model.pondering_embedding import pondering_embedding
from ponder_scale.setup.device import default_device

NAIVE = "published"
SAMPLE_TOKENS = 64  # on which errors are measured
PRODUCTS = {NAIVE: 6, "top_k": 1}  # of N x V x D multiply-adds, forward and backward; the others recompute one: 7


@dataclass(frozen=True)
class Problem:
    """What is computed: T = softmax(h W^T) E and its gradients to h, W and E."""

    tokens: int = 2048
    hidden: int = 256
    vocabulary: int = 32000
    dtype: str = "float32"
    device: str = "cpu"
    top_k: int = 100

    def operands(self, tokens: int | None = None) -> list[Tensor]:
        """h (N, D), W (V, D), E (V, D) and dL/dT (N, D); scores have a standard deviation of 3, as trained ones."""
        generator = torch.Generator().manual_seed(0)
        rows = (tokens or self.tokens, self.vocabulary, self.vocabulary, tokens or self.tokens)
        made = [torch.randn(count, self.hidden, generator=generator) for count in rows]
        made[1] *= 3.0 / self.hidden**0.5
        made = [tensor.to(self.device, getattr(torch, self.dtype)) for tensor in made]
        return [*(tensor.requires_grad_() for tensor in made[:3]), made[3]]


def variants(problem: Problem) -> list[str]:
    """The published way first, then the backends that run on the device; "+" adds the statistics of each token."""
    names = ["chunked", "chunked+"] + (["sdpa", "sdpa+"] if problem.device == "cpu" else ["triton", "triton+"])
    return [NAIVE, *names, *(["top_k"] if problem.top_k < problem.vocabulary else [])]


def run(
    tokens: int = 2048,
    hidden: int = 256,
    vocabulary: int = 32000,
    dtype: str = "float32",
    runs: int = 5,
    device: str | None = None,
    top_k: int = 100,
    threads: int = 1,
) -> list[dict[str, float | str]]:
    """Measure, print the table, and return its rows.

    Args:
        dtype: one of `measure.DTYPES`.
        runs: measured runs of each variant, after one that is not.
        device: "cpu" or "cuda"; default the GPU where there is one.
        threads: of torch, on the CPU.

    Raises:
        ConfigError: a dtype that is not offered or a number below 1.
    """
    check_numbers(tokens=tokens, hidden=hidden, vocab=vocabulary, runs=runs, top_k=top_k, threads=threads)
    check_dtype(dtype)
    device = device or default_device()
    problem = Problem(tokens, hidden, vocabulary, dtype, device, top_k)
    torch.set_num_threads(threads)
    names = variants(problem)
    times = _times(problem, names, runs)
    rows: list[dict[str, float | str]] = []
    for name in names:
        peak, kept = _memory(problem, name, threads)
        value_error, gradient_error = _errors(problem, name)
        row = {"peak_mib": peak, "kept_mib": kept, "error": value_error, "gradient_error": gradient_error}
        rows.append({"variant": name, **times[name], **row})
    print(_table(problem, rows, runs, threads))
    return rows


def _function(problem: Problem, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name == NAIVE:
        return published.pondering_embedding
    backend = name.rstrip("+")
    top_k = problem.top_k if backend == "top_k" else None

    def through_backend(hidden: Tensor, head: Tensor, table: Tensor) -> Tensor:
        labels = None
        if name.endswith("+"):
            labels = torch.arange(hidden.shape[0], device=hidden.device) % head.shape[0]
        return pondering_embedding(hidden, head, table, labels=labels, top_k=top_k, backend=backend)[0]

    return through_backend


def _times(problem: Problem, names: list[str], runs: int) -> dict[str, dict[str, float]]:
    """Medians in seconds: forward and forward with backward, on the clock, and of the process on all processors."""
    *operands, upstream = problem.operands()

    def timed(function: Callable[..., Tensor]) -> Callable[[], list[float]]:
        def both() -> list[float]:
            for tensor in operands:
                tensor.grad = None
            mixed = function(*operands)
            wait(problem.device)
            middle = time.perf_counter()
            mixed.backward(upstream)
            return [middle]

        return both

    found = medians({name: timed(_function(problem, name)) for name in names}, runs, problem.device)
    return {
        name: {"forward_s": median.marks[0], "both_s": median.seconds, "processor_s": median.processor_s}
        for name, median in found.items()
    }


def _memory(problem: Problem, name: str, threads: int) -> tuple[float, float]:
    """MiB above the inputs: the peak of forward and backward, gradients included, and what forward keeps."""
    if problem.device == "cuda":
        return _memory_on_gpu(problem, name)
    found = in_fresh_process(__name__, threads, problem=asdict(problem), name=name)
    return (found[0], found[1]) if isinstance(found, list) else (found, found)


def _memory_on_gpu(problem: Problem, name: str) -> tuple[float, float]:
    *operands, upstream = problem.operands()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mixed = _function(problem, name)(*operands)
    kept = torch.cuda.memory_allocated() - before
    mixed.backward(upstream)
    return (torch.cuda.max_memory_allocated() - before) / MIB, kept / MIB


def _memory_in_this_process(problem: dict[str, Any], name: str) -> tuple[float, float]:
    full = Problem(**problem)
    *operands, upstream = full.operands()
    # what libraries allocate once for themselves is no cost of the variant
    small = Problem(8, 16, 128, full.dtype, top_k=4)
    *few, grad = small.operands()
    _function(small, name)(*few).backward(grad)
    before = reset_peak()
    mixed = _function(full, name)(*operands)
    kept = resident("VmRSS") - before
    mixed.backward(upstream)
    return resident("VmHWM") - before, kept


def _errors(problem: Problem, name: str) -> tuple[float, float]:
    """Of T, and the largest of the three gradients', relative to their norm in float64, on some of the tokens."""
    *operands, upstream = problem.operands(min(SAMPLE_TOKENS, problem.tokens))
    exact = [tensor.detach().double().requires_grad_() for tensor in operands]
    mixed = _function(problem, name)(*operands)
    top_k = problem.top_k if name == "top_k" else None
    expected, _ = pondering_embedding(*exact, top_k=top_k, backend="eager")
    mixed.backward(upstream)
    expected.backward(upstream.double())
    gradients = [_relative(got.grad, wanted.grad) for got, wanted in zip(operands, exact, strict=True)]
    return _relative(mixed, expected), max(gradients)


def _relative(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def _table(problem: Problem, rows: list[dict[str, float | str]], runs: int, threads: int) -> str:
    lines = [
        f"pondering embedding: {problem.tokens} tokens, D {problem.hidden}, V {problem.vocabulary}, {problem.dtype}, "
        f"top_k {problem.top_k}; {device_name(problem.device, threads)}; medians of {runs} interleaved runs; ratios to "
        f"{NAIVE}",
        f"{'':10s} {'forward':>9s} {'fwd+bwd':>9s} {'ratio':>6s} {'processor':>9s} {'ratio':>6s} {'TFLOP/s':>8s}"
        f" {'peak':>8s} {'ratio':>6s} {'kept':>8s} {'err T':>8s} {'err grad':>8s}",
        f"{'':10s} {'ms':>9s} {'ms':>9s} {'':6s} {'ms':>9s} {'':6s} {'':8s} {'MiB':>8s} {'':6s} {'MiB':>8s}",
    ]
    product = 2e-12 * problem.tokens * problem.vocabulary * problem.hidden
    for row in rows:
        cell = {key: float(value) for key, value in row.items() if key != "variant"}
        ratio = {key: cell[key] / float(rows[0][key]) for key in ("both_s", "processor_s", "peak_mib")}
        name = str(row["variant"])
        speed = PRODUCTS.get(name, 7) * product / cell["both_s"]
        lines.append(
            f"{name:10s} {1e3 * cell['forward_s']:9.1f} {1e3 * cell['both_s']:9.1f} {ratio['both_s']:6.2f}"
            f" {1e3 * cell['processor_s']:9.1f} {ratio['processor_s']:6.2f} {speed:8.3g} {cell['peak_mib']:8.0f}"
            f" {ratio['peak_mib']:6.2f} {cell['kept_mib']:8.1f} {cell['error']:8.1e} {cell['gradient_error']:8.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    answer(_memory_in_this_process)
