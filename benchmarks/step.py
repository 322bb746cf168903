"""`python -m benchmarks step` and `memory` compare a training step by recomputation policy with the published way.

A step is forward, backward and AdamW on a micro-batch of random tokens. Before timing, a check makes sure that both
ways compute the same loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import (
    MIB,
    answer,
    check_numbers,
    device_name,
    in_fresh_process,
    medians,
    reset_peak,
    resident,
)
from benchmarks.workload import POLICIES, PUBLISHED, Training, Workload
from ponder_scale.errors import ConfigError
from ponder_scale.planning.cost import step_flops
from ponder_scale.planning.hardware import peak_flops


def run(
    work: Workload,
    *,
    runs: int = 3,
    threads: int = 1,
    policies: Sequence[str] | None = None,
    largest: bool = False,
) -> list[dict[str, Any]]:
    """Measure time and peak memory of a step, print the table, and return its rows.

    Args:
        policies: recomputation policies. The default is all.
        largest: run each variant with the largest micro-batch, a power of two, that fits the GPU.

    Raises:
        ConfigError: `largest` without a GPU, because only a GPU's allocator reports when memory is full.
    """
    check_numbers(runs=runs, threads=threads)
    if largest and work.device != "cuda":
        raise ConfigError(
            "--largest needs a GPU, where it raises the micro-batch until memory is full; use --batch here"
        )
    torch.set_num_threads(threads)
    steps = work.model.pondering_steps
    training = Training(work)
    check_losses(training, steps)
    names = (PUBLISHED, *(policies or POLICIES))
    works = {name: replace(work, batch=_largest(training, name, steps) if largest else work.batch) for name in names}
    variants = {name: _timed(training, name, steps, works[name].batch) for name in names}
    times = medians(variants, runs, work.device)
    del training, variants
    rows = []
    for name, median in times.items():
        tokens = works[name].tokens
        flops = step_flops(work.shape, "none" if name == PUBLISHED else name, steps, tokens)
        row = {"variant": name, "batch": works[name].batch, "tokens": tokens, "model_flops": flops.model}
        row |= {"seconds": median.seconds, "processor_s": median.processor_s}
        rows.append({**row, "peak_mib": peak(works[name], name, steps, threads)})
    print(_table(work, rows, runs, threads))
    return rows


def memory(
    work: Workload, *, steps: Sequence[int], threads: int = 1, policies: Sequence[str] | None = None
) -> dict[str, list[float]]:
    """Measure a step's peak memory for several numbers of pondering steps, print the table, and return it in MiB."""
    check_numbers(threads=threads)
    peaks = {
        name: [peak(work, name, number, threads) for number in steps] for name in (PUBLISHED, *(policies or POLICIES))
    }
    print(f"peak memory of a step, MiB (ratio to {PUBLISHED}): with weights, gradients and AdamW's moments;")
    print(f"{work.line()}; {device_name(work.device, threads)}")
    print(f"{'':11s}" + "".join(f"{f'S = {number}':>15s}" for number in steps))
    for name, row in peaks.items():
        cells = (f"{mib:8.0f} ({mib / base:4.2f})" for mib, base in zip(row, peaks[PUBLISHED], strict=True))
        print(f"{name:11s}" + "".join(f"{cell:>15s}" for cell in cells))
    return peaks


def peak(work: Workload, variant: str, pondering_steps: int, threads: int) -> float:
    """MiB at the peak of a step, above an empty process: weights, gradients, moments and activations."""
    if work.device == "cuda":
        return _peak_on_gpu(work, variant, pondering_steps)
    arguments = {"work": work.to_dict(), "variant": variant, "pondering_steps": pondering_steps}
    return in_fresh_process(__name__, threads, **arguments)


def _peak_here(work: dict[str, Any], variant: str, pondering_steps: int) -> float:
    full = Workload.from_dict(work)
    Training(full.without_size()).step(variant, min(pondering_steps, 1))
    before = reset_peak()
    training = Training(full)
    training.step(variant, pondering_steps)  # creates AdamW's state
    reset_peak()
    training.step(variant, pondering_steps)
    return resident("VmHWM") - before


def _peak_on_gpu(work: Workload, variant: str, pondering_steps: int) -> float:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    training = Training(work)
    training.step(variant, pondering_steps)
    torch.cuda.reset_peak_memory_stats()
    training.step(variant, pondering_steps)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _timed(training: Training, variant: str, pondering_steps: int, batch: int) -> Any:
    def step() -> None:
        training.step(variant, pondering_steps, batch)

    return step


def _largest(training: Training, variant: str, pondering_steps: int) -> int:
    """The largest batch that a step can hold, as a power of two of sequences."""
    batch = 1
    while True:
        try:
            training.step(variant, pondering_steps, 2 * batch)
        except torch.OutOfMemoryError:
            for parameter in training.model.parameters():
                parameter.grad = None
            torch.cuda.empty_cache()
            return batch
        batch *= 2


def check_losses(training: Training, pondering_steps: int) -> None:
    """Raise RuntimeError unless the published way and our code give the same loss."""
    with torch.no_grad():
        losses = {name: training.loss(name, pondering_steps).item() for name in (PUBLISHED, "none")}
    # Tolerant for narrow dtypes, in which the published way sums T. The backends sum it in fp32.
    tolerance = 1e-5 if training.work.dtype == "float32" else 2e-2
    if abs(losses["none"] - losses[PUBLISHED]) > tolerance * losses[PUBLISHED]:
        raise RuntimeError(f"the ways to compare give different losses, so they are not the same model: {losses}")


def _table(work: Workload, rows: list[dict[str, Any]], runs: int, threads: int) -> str:
    name = device_name(work.device, threads)
    peak_rate = peak_flops(name)
    lines = [
        f"training step, S = {work.model.pondering_steps}: {work.line()}; {name}; medians of {runs} interleaved runs; "
        f"ratios to {PUBLISHED}, of times a token",
        f"{'':11s} {'batch':>5s} {'ms':>9s} {'ratio':>6s} {'CPU ms':>9s} {'ratio':>6s} {'tokens/s':>9s} {'MFU':>6s}"
        f" {'peak MiB':>9s} {'ratio':>6s}",
    ]
    base = rows[0]
    for row in rows:
        ratios = {key: row[key] / base[key] / row["batch"] * base["batch"] for key in ("seconds", "processor_s")}
        ratios["peak_mib"] = row["peak_mib"] / base["peak_mib"]
        mfu = "-" if peak_rate is None else f"{row['model_flops'] / row['seconds'] / peak_rate:.1%}"
        lines.append(
            f"{row['variant']:11s} {row['batch']:5d} {1e3 * row['seconds']:9.1f} {ratios['seconds']:6.2f} "
            f"{1e3 * row['processor_s']:9.1f} {ratios['processor_s']:6.2f} {row['tokens'] / row['seconds']:9,.0f} "
            f"{mfu:>6s} {row['peak_mib']:9.0f} {ratios['peak_mib']:6.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    answer(_peak_here)
