"""Shared measurements: medians of interleaved runs, and peak memory in a fresh process.

Peak memory of a CPU run is the largest resident set (VmHWM) of a fresh process, minus its resident set at the start.
The start comes after libraries have been loaded and warmed up on a tiny problem. glibc is told to return freed blocks
of more than 64 KiB at once, as allocators of devices can. Otherwise its moving threshold keeps some blocks by chance.
On a GPU, peak memory is that of torch's allocator.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ponder_scale.errors import ConfigError

MIB = 2**20
DTYPES = ("float32", "bfloat16", "float16")


def device_name(device: str, threads: int) -> str:
    """The device, for the head of a table."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread(s)"


def check_numbers(**numbers: int) -> None:
    """Raise ConfigError for an argument below 1, and name its flag."""
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {number}; expected at least 1")


def check_dtype(dtype: str) -> None:
    """Raise ConfigError for a dtype that is not supported here."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


class Median(NamedTuple):
    """Medians over the runs of one variant."""

    seconds: float  # wall time
    processor_s: float  # of this process on all processors
    marks: tuple[float, ...]  # wall time from the start to each mark that the variant returned


def medians(variants: Mapping[str, Callable[[], Sequence[float] | None]], runs: int, device: str) -> dict[str, Median]:
    """Run the variants in turns, so that other work on the machine affects all of them.

    A variant may return marks, which are values of `time.perf_counter`. The first round warms up and is not counted.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in variants}
    for number in range(runs + 1):
        for name, function in variants.items():
            gc.collect()
            wait(device)
            processor, start = time.process_time(), time.perf_counter()
            marks = function() or []
            wait(device)
            end, processor = time.perf_counter(), time.process_time() - processor
            if number:
                found[name].append([end - start, processor, *(mark - start for mark in marks)])
    columns = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    return {name: Median(values[0], values[1], tuple(values[2:])) for name, values in columns.items()}


def in_fresh_process(module: str, threads: int, **arguments: Any) -> Any:
    """Run `module` in a fresh process, with these arguments as JSON. Returns the JSON value that it prints last.

    The module must end with `answer(function)`. Returns NaN if there is no Linux /proc.
    """
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    command = [sys.executable, "-W", "ignore", "-m", module, json.dumps({**arguments, "threads": threads})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(function: Callable[..., Any]) -> None:
    """Run the function in the process that `in_fresh_process` started, and print its result."""
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(arguments.pop("threads"))
    print(json.dumps(function(**arguments)))


def reset_peak() -> float:
    """Reset the peak memory of this process. Returns its resident memory in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def resident(field: str) -> float:
    """Resident memory in MiB: now (VmRSS) or the peak (VmHWM). Unlike getrusage's, this peak excludes the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024
