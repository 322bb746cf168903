"""`python -m benchmarks op` compares every backend of the pondering embedding with the published way.

Times are medians of interleaved runs in one process. Ratios are to the published way in the same run. Peak memory of a
CPU run is measured in its own process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from ponder_scale.model.pondering_embedding import Statistics, pondering_embedding
from ponder_scale.setup.device import default_device

NAIVE = "published"
SAMPLE_TOKENS = 64  # tokens on which errors are measured
Mixture = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Statistics | None]]
# products of N x V x D multiply-adds, forward and backward; the other backends recompute one, so they have 7
PRODUCTS = {NAIVE: 6, "top_k": 1}


@dataclass(frozen=True)
class Problem:
    """The computation: T = softmax(h W^T) E and its gradients with respect to h, W and E."""

    tokens: int = 2048
    hidden: int = 256
    vocabulary: int = 32000
    dtype: str = "float32"
    device: str = "cpu"
    top_k: int = 100

    def operands(self, tokens: int | None = None) -> list[Tensor]:
        """h (N, D), W (V, D), E (V, D) and dL/dT (N, D). The scores' standard deviation is 3, as in trained models."""
        generator = torch.Generator(self.device).manual_seed(0)
        rows = (tokens or self.tokens, self.vocabulary, self.vocabulary, tokens or self.tokens)
        made = [torch.randn(count, self.hidden, generator=generator, device=self.device) for count in rows]
        made[1] *= 3.0 / self.hidden**0.5
        made = [tensor.to(getattr(torch, self.dtype)) for tensor in made]
        return [*(tensor.requires_grad_() for tensor in made[:3]), made[3]]

    def labels(self, tokens: int) -> Tensor:
        """Next tokens for the statistics, (tokens,)."""
        return torch.arange(tokens, device=self.device) % self.vocabulary


def variants(problem: Problem) -> list[str]:
    """The published way, then the backends that run on the device. "+" adds the statistics of each token."""
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
    taken = times(problem, names, runs)
    rows: list[dict[str, float | str]] = []
    for name in names:
        peak, kept = _memory(problem, name, threads)
        found = errors(problem, name, min(SAMPLE_TOKENS, problem.tokens))
        row = {"peak_mib": peak, "kept_mib": kept, "error": found["T"], "gradient_error": found["gradients"]}
        rows.append({"variant": name, **taken[name], **row})
    print(_table(problem, rows, runs, threads))
    return rows


def function(problem: Problem, name: str) -> Mixture:
    """A function that computes T from h, W and E by a variant. A name with "+" adds each token's statistics."""
    if name == NAIVE:
        return lambda hidden, head, table: (published.pondering_embedding(hidden, head, table), None)
    backend = name.rstrip("+")
    top_k = problem.top_k if backend == "top_k" else None

    def through_backend(hidden: Tensor, head: Tensor, table: Tensor) -> tuple[Tensor, Statistics | None]:
        labels = problem.labels(hidden.shape[0]) if name.endswith("+") else None
        return pondering_embedding(hidden, head, table, labels=labels, top_k=top_k, backend=backend)

    return through_backend


def times(problem: Problem, names: Sequence[str], runs: int) -> dict[str, dict[str, float]]:
    """Medians for each variant: seconds forward, forward with backward, and processor seconds of both."""
    *operands, upstream = problem.operands()

    def timed(mixture: Mixture) -> Callable[[], list[float]]:
        def both() -> list[float]:
            for tensor in operands:
                tensor.grad = None
            mixed, _ = mixture(*operands)
            wait(problem.device)
            middle = time.perf_counter()
            mixed.backward(upstream)
            return [middle]

        return both

    found = medians({name: timed(function(problem, name)) for name in names}, runs, problem.device)
    return {
        name: {"forward_s": median.marks[0], "both_s": median.seconds, "processor_s": median.processor_s}
        for name, median in found.items()
    }


def _memory(problem: Problem, name: str, threads: int) -> tuple[float, float]:
    """MiB above the inputs: the peak of forward and backward with gradients, and what forward keeps for backward."""
    if problem.device == "cuda":
        return memory_on_gpu(problem, name)
    found = in_fresh_process(__name__, threads, problem=asdict(problem), name=name)
    return (found[0], found[1]) if isinstance(found, list) else (found, found)


def memory_on_gpu(problem: Problem, name: str) -> tuple[float, float]:
    """MiB above the inputs at the peak and after forward, from torch's allocator."""
    *operands, upstream = problem.operands()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mixed, _ = function(problem, name)(*operands)
    kept = torch.cuda.memory_allocated() - before
    mixed.backward(upstream)
    return (torch.cuda.max_memory_allocated() - before) / MIB, kept / MIB


def _memory_in_this_process(problem: dict[str, Any], name: str) -> tuple[float, float]:
    full = Problem(**problem)
    *operands, upstream = full.operands()
    # Memory that libraries allocate once for themselves must not count as the variant's.
    small = Problem(8, 16, 128, full.dtype, top_k=4)
    *few, grad = small.operands()
    function(small, name)(*few)[0].backward(grad)
    before = reset_peak()
    mixed, _ = function(full, name)(*operands)
    kept = resident("VmRSS") - before
    mixed.backward(upstream)
    return resident("VmHWM") - before, kept


def errors(problem: Problem, name: str, tokens: int) -> dict[str, float]:
    """Compare a variant on some tokens with the equation in float64.

    Returns the relative error of T, and the largest relative error among the three gradients. With statistics also the
    largest errors of losses and entropies, in nats. "changed" counts numbers that differ when everything runs again.
    """
    *operands, upstream = problem.operands(tokens)
    exact = [tensor.detach().double().requires_grad_() for tensor in operands]
    top_k = problem.top_k if name == "top_k" else None
    labels = problem.labels(tokens) if name.endswith("+") else None
    expected, wanted = pondering_embedding(*exact, labels=labels, top_k=top_k, backend="eager")
    expected.backward(upstream.double())
    runs, seen = [], None
    for _ in range(2):
        for tensor in operands:
            tensor.grad = None
        mixed, seen = function(problem, name)(*operands)
        mixed.backward(upstream)
        runs.append([mixed.detach(), *(tensor.grad for tensor in operands if tensor.grad is not None)])
    references = [expected, *(tensor.grad for tensor in exact if tensor.grad is not None)]
    apart = [_relative(got, reference) for got, reference in zip(runs[0], references, strict=True)]
    found = {"T": apart[0], "gradients": max(apart[1:])}
    if seen is not None and wanted is not None:
        found |= {key: (getattr(seen, key) - getattr(wanted, key)).abs().max().item() for key in ("loss", "entropy")}
    return found | {"changed": float(sum((one != other).sum().item() for one, other in zip(*runs, strict=True)))}


def _relative(got: Tensor, wanted: Tensor) -> float:
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
